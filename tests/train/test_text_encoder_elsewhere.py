"""The second stage of a small model where the networks are on a GPU and captions on the CPU."""

import copy

import pytest
import torch
from networks import small
from pretended_gpu import OnGpu, pretended_gpu

from ldm.tokenizer import Tokenizer
from ldm.train import text_encoder

CAPTIONS = [["a chest"], ["a nevus"], ["a chest"]]


def test_what_would_fail_on_a_gpu_fails_here():
    with pretended_gpu():
        x, linear = torch.randn(2, 3).to("cuda"), torch.nn.Linear(3, 3).to("cuda")
        assert isinstance(linear(x), OnGpu)
        assert linear.weight.device == x.device == (2 * x).device == torch.device("cuda", 0)
        assert type(x.cpu()) is torch.Tensor
        assert isinstance(torch.zeros(3, device="cuda") + x.sum().cpu(), OnGpu)
        for wrong in (
            x.numpy,
            lambda: x + torch.randn(2, 3),
            lambda: torch.cat([x, torch.randn(1, 3)]),
            lambda: linear(torch.randn(2, 3)),
            lambda: torch.randn(3)[torch.zeros(1, dtype=torch.int64, device="cuda")],
            lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
        ):
            with pytest.raises((RuntimeError, TypeError), match="cuda"):
                wrong()


def test_a_step_on_a_gpu_is_the_step_on_the_cpu():
    tokens = text_encoder.CaptionTokens(CAPTIONS, Tokenizer())
    model = text_encoder.ContrastiveModel(copy.deepcopy(small("clip")), (4, 8, 8)).eval()
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    captions = tokens.draw(torch.arange(3), 0, 0)
    with torch.no_grad():
        expected = text_encoder.contrastive_loss(model, latents, captions, tokens)
        with pretended_gpu():
            loss = text_encoder.contrastive_loss(model.to("cuda"), latents.to("cuda"), captions, tokens)
            assert isinstance(loss, OnGpu)
            assert torch.equal(loss.cpu(), expected)
