"""How the small text encoder learns captions: drawn captions, the contrastive loss, where it begins."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from ldm.clip import CLIPTextEncoder
from ldm.config import CLIPConfig
from ldm.tokenizer import Tokenizer
from ldm.train import text_encoder

CAPTIONS = [("a cat", "one cat"), ("a dog",), ("a cat",), ("no animal", "nothing")]


@pytest.fixture(scope="module")
def tokens() -> text_encoder.CaptionTokens:
    return text_encoder.CaptionTokens(CAPTIONS, Tokenizer())


def test_captions_are_tokenised_once_each(tokens):
    assert tokens.texts == ["a cat", "a dog", "no animal", "nothing", "one cat"]
    assert torch.equal(tokens.ids, Tokenizer()(tokens.texts))


def test_a_drawn_caption_is_one_of_the_images_own(tokens):
    images = np.arange(4)
    seen = {i: set() for i in range(4)}
    for step in range(50):
        drawn = tokens.draw(images, seed=0, step=step)
        assert torch.equal(drawn, tokens.draw(images, seed=0, step=step))
        for i, number in enumerate(drawn.tolist()):
            seen[i].add(tokens.texts[number])
    assert seen == {i: set(texts) for i, texts in enumerate(CAPTIONS)}  # all wordings: missed with odds of 4 in 2^50


class Logits:
    """A contrastive model that answers with a row of logits an image, one for each distinct caption of the batch."""

    def __init__(self, logits: Tensor, expected_ids: Tensor) -> None:
        self.logits, self.expected_ids = logits, expected_ids

    def __call__(self, latents: Tensor, ids: Tensor) -> Tensor:
        assert torch.equal(ids, self.expected_ids)
        return self.logits


def test_every_pair_that_belongs_together_is_a_target(tokens):
    # Images 0 and 2 show the caption 4, image 1 the caption 1: the columns of (images, distinct captions) are 1, 4.
    captions, columns = torch.tensor([4, 1, 4]), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    model = Logits(columns, tokens.ids[[1, 4]])
    logits = columns[:, [1, 0, 1]]  # (image, caption of image)
    targets = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    rows = -(targets * logits.log_softmax(dim=1)).sum(1).mean()
    columns_ = -(targets * logits.log_softmax(dim=0)).sum(0).mean()
    loss = text_encoder.contrastive_loss(model, torch.empty(3, 4, 1, 1), captions, tokens)
    torch.testing.assert_close(loss, (rows + columns_) / 2)


def test_a_perfect_model_is_left_with_the_ambiguity_of_equal_captions(tokens):
    captions = torch.tensor([0, 3, 0, 0])
    model = Logits(50.0 * torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0]]), tokens.ids[[0, 3]])
    loss = text_encoder.contrastive_loss(model, torch.empty(4, 4, 1, 1), captions, tokens)
    # Three of four images cannot tell three equal captions apart: log 3 each. exp(-50) is below float32's rounding.
    assert float(loss) == pytest.approx(0.75 * math.log(3), rel=1e-6)


def contrastive_model() -> text_encoder.ContrastiveModel:
    torch.manual_seed(0)
    clip = CLIPTextEncoder(CLIPConfig(width=16, layers=1, heads=2, mlp_width=32))
    text_encoder.initialise(clip)
    return text_encoder.ContrastiveModel(clip, (4, 8, 8), width=8)


@torch.no_grad()
def test_the_two_towers_meet_in_scaled_cosines(tokens):
    model, latents = contrastive_model(), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    logits = model(latents, tokens.ids)
    assert logits.shape == (3, 5)
    assert logits.abs().max() <= (1 / 0.07) * 1.0001  # CLIP's first temperature; rounding of the cosine
    model.log_scale.fill_(20.0)
    assert model(latents, tokens.ids).abs().max() <= 100.01  # and its largest


@torch.no_grad()
def test_a_caption_is_read_at_its_end_token(tokens):
    # What follows the first end token is padding: a causal encoder's state there must not matter, nor be what is read.
    model, latents = contrastive_model(), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    padded_otherwise = tokens.ids.clone()
    padded_otherwise[:, 20:-1] = 320
    # Cosines of float32 vectors times a scale of 14.
    torch.testing.assert_close(model(latents, padded_otherwise), model(latents, tokens.ids), rtol=0, atol=1e-4)
    other_text = tokens.ids.clone()
    other_text[:, 1] = 4558
    assert not torch.allclose(model(latents, other_text), model(latents, tokens.ids), atol=1e-2)


def test_the_contrastive_loss_reaches_every_weight_of_the_text_encoder(tokens):
    model = contrastive_model()
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    text_encoder.contrastive_loss(model, latents, torch.tensor([0, 1, 2, 0]), tokens).backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == set()


def test_the_text_encoder_begins_with_clips_standard_deviations():
    torch.manual_seed(0)
    clip = CLIPTextEncoder(CLIPConfig(width=64, layers=2, heads=4, mlp_width=256))
    text_encoder.initialise(clip)
    model, layer = clip.text_model, clip.text_model.encoder.layers[1]
    expected = {
        model.embeddings.token_embedding.weight: 0.02,
        model.embeddings.position_embedding.weight: 0.01,
        layer.self_attn.q_proj.weight: 64**-0.5,
        layer.self_attn.out_proj.weight: 64**-0.5 * 4**-0.5,
        layer.mlp.fc1.weight: 128**-0.5,
        layer.mlp.fc2.weight: 64**-0.5 * 4**-0.5,
    }
    for p, std in expected.items():
        assert p.std().item() == pytest.approx(std, rel=0.06)  # 4096 values: 1.1 % of noise, five times that
    assert all(
        not p.any() for name, p in clip.named_parameters() if name.endswith(("proj.bias", "fc1.bias", "fc2.bias"))
    )
