"""Where words look: tokens belong to the right words, maps lie the right way round, overlaps are as found by hand."""

import json

import numpy as np
import pytest
import torch
from ldm_tools import attend
from ldm_tools.cli import main
from pretended_gpu import pretended_gpu

import ldm
from ldm.phantom.prompts import ATTRIBUTE_WORDS, DOMAINS
from ldm.pipeline import PHANTOM_WEIGHTS, StableDiffusion
from ldm.probe.words import END, PADDING, START, Word, own_words, words
from ldm.samplers import initial_noise
from ldm.study.structure.attention import Looks, MaskedImages, limits, look, of_words, on_grid, overlap
from ldm.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return ldm.load(PHANTOM_WEIGHTS)


# ---- words -----------------------------------------------------------------------------------------


def test_words_of_a_prompt():
    found = words(Tokenizer(), "Chest X-ray of a subject with Pleural Effusion")
    assert [word.text for word in found] == [
        *(START, "chest", "x", "-", "ray", "of", "a", "subject", "with", "pleural", "effusion", END, PADDING)
    ]
    assert [token for word in found for token in word.tokens] == list(range(77))


def test_a_rare_word_is_several_tokens():
    tokenizer = Tokenizer()
    _, word, other, *_ = words(tokenizer, "hyperkeratosis seen")
    count = len(tokenizer.encode("hyperkeratosis"))
    assert count > 1
    assert word == Word("hyperkeratosis", tuple(range(1, 1 + count)))
    assert other == Word("seen", (1 + count,))


def test_every_attributes_words_are_in_its_prompt():
    tokenizer = Tokenizer()
    for cell in DOMAINS.values():
        for attribute, prompt in cell.styles.items():
            assert len(own_words(words(tokenizer, prompt), ATTRIBUTE_WORDS[attribute])) > 0
    with pytest.raises(ValueError, match="words: the prompt has no 'ruler'; it has"):
        own_words(words(tokenizer, "hair"), ["ruler"])


def test_prompts_that_are_cut_off_are_refused():
    assert words(Tokenizer(), "hair " * 75)[-1].text == END  # no room for padding
    with pytest.raises(ValueError, match="prompt: 76 tokens, expected at most 75"):
        words(Tokenizer(), "hair " * 76)


# ---- maps ------------------------------------------------------------------------------------------


def test_a_word_gets_what_its_tokens_get():
    p = torch.tensor([[[0.1, 0.2, 0.3, 0.4]]])
    together = of_words(p, [Word("a", (0, 2)), Word("b", (1,)), Word("c", (3,))])
    torch.testing.assert_close(together, torch.tensor([[[0.4, 0.2, 0.4]]]))


def test_positions_lie_row_by_row():
    looked = torch.arange(6.0).view(1, 1, 6, 1)  # S, B, N, V
    assert on_grid(looked, aspect=2 / 3)[0, 0, 0].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_layers_meet_on_the_finest_grid():
    coarse, fine = torch.full((1, 1, 1, 2, 2), 0.25), torch.zeros(1, 1, 1, 4, 4)
    fine[..., 0, 0] = 1.0
    mean = Looks(("a", "b"), (coarse, fine)).mean_over_layers()
    assert mean.shape == (1, 1, 1, 4, 4)
    assert mean[0, 0, 0, 0, 0] == 0.625
    assert mean[0, 0, 0, 3, 3] == 0.125


def test_overlap_by_hand():
    mask = np.zeros((1, 4, 4), bool)
    mask[0, :2] = True  # the upper half: 8 of 16
    right = torch.from_numpy(mask).float()
    left = torch.zeros(1, 4, 4)
    left[0, :, :2] = 1.0
    # The left half meets 4 of the mask's 8: 4 / (8 + 8 - 4).
    scores = overlap(torch.stack([right, 1 - right, left]), mask)
    np.testing.assert_allclose(scores[:, 0], [1.0, 0.0, 1 / 3])
    assert np.isnan(overlap(right, np.zeros((1, 4, 4), bool))).all()


def test_maps_on_a_gpu_are_brought_back():
    maps, masks = torch.rand(2, 3, 4, 4), np.arange(3 * 64).reshape(3, 8, 8) % 5 == 0
    with pretended_gpu():
        there = maps.to("cuda")
        with pytest.raises(TypeError, match="on cuda to numpy"):
            there.numpy()
        assert np.array_equal(overlap(there, masks), overlap(maps, masks))
        looks = Looks(("down_blocks.0.attentions.0.transformer_blocks.0.attn2",), (there[None],))
        said = [Word(f"w{i}", (i,)) for i in range(3)]
        patients = MaskedImages(torch.zeros(2, 3, 8, 8), masks[:2])
        assert attend.every_word(looks, said, patients).keys() == {"0: w0", "1: w1", "2: w2"}
        assert isinstance(attend.plain(looks.maps[0][0, 0, 0]), np.ndarray)


def test_what_a_map_could_score():
    mask = np.zeros((1, 16, 16), bool)
    mask[0, :, :8] = True
    found = limits(mask, grid=4)
    assert found["chance"] == pytest.approx(0.5 / 1.5)  # half the pixels: a quarter is met, three quarters are covered
    assert found["ceiling"] == 1.0  # a straight edge between two cells
    mask[0, :, :8] = False
    mask[0, 4, 4] = True  # the corner of a cell, whose middle is the brightest
    assert limits(mask, grid=4)["ceiling"] == 0.0


@torch.no_grad()
def test_looking_changes_nothing_and_adds_up(sd):
    prompt = DOMAINS["chest"].styles["pleural_effusion"]
    said, context = words(sd.tokenizer, prompt), sd.encode_prompts([prompt])
    x_T = initial_noise([0, 1], sd.latent_shape)
    looks, latents = look(sd, x_T, context, said, steps=2)
    assert len(looks.maps) == len(looks.layers) == 7
    for maps in looks.maps:
        assert maps.shape[:3] == (2, 2, len(said))  # steps, images, words
        torch.testing.assert_close(maps.sum(dim=2), torch.ones_like(maps[:, :, 0]))
    eps_fn = ldm.guidance.guided(sd.unet, ldm.conditioning.constant(context, 2), 1.0)
    *_, last = ldm.samplers.ddim(eps_fn, x_T, sd.schedule, 2)
    assert torch.equal(latents, last.x_prev)


# ---- the command -----------------------------------------------------------------------------------


def test_the_command(tmp_path, capsys):
    arguments = ["--domains", "chest", "--seeds", "0", "--steps", "2", "--device", "cpu"]
    assert main(["attend", *arguments, "--out", str(tmp_path)]) == 0
    names = {"words", "depth_and_time", "overlap", "layers"}
    assert {path.name for path in tmp_path.iterdir()} == {"attention.json"} | {
        f"{name}.{end}" for name in names for end in ("png", "pdf")
    }
    effusion = json.loads((tmp_path / "attention.json").read_text())["attributes"]["pleural_effusion"]
    assert effusion["attribute_words"] == ["pleural", "effusion"]
    assert sum(effusion["share"]["mid 0"]) == pytest.approx(1.0, abs=1e-5)
    assert len(effusion["overlap"]["own"]["all layers"]) == 2
    assert 0 < effusion["chance"] < effusion["ceiling"] <= 1
    assert main(["attend", "--domains", "chest", "--seeds", "x", "--out", str(tmp_path)]) == 2
    assert "--seeds" in capsys.readouterr().err
