"""The mistakes: the right recipe is the library's, and each mistake moves what it should and nothing else.

On images of 64 x 64 pixels, a quarter of the work: what a mistake moves does not depend on the size.
"""

import argparse
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ldm_tools import traps
from ldm_tools.traps import sampling, text, unet, vae
from ldm_tools.traps.command import TRAPS, Drift, Result, carried_out
from ldm_tools.traps.conventions import Conventions, Job, decode, draw

import ldm
from ldm.blocks import Downsample
from ldm.pipeline import PHANTOM_WEIGHTS, StableDiffusion, to_uint8
from ldm.samplers import initial_noise

JOB = Job((0, 1), "Normal chest X-ray with no significant findings", "Chest X-ray", swap_step=2, steps=4)

# Where a mistake shows: in the latents drawn from noise, in the encoded latents, or only in how latents become images.
ENCODES_WRONG = {"symmetric_padding", "epsilon", "no_scale_in_encoding", "posterior_sampled", "images_from_0_to_1"}
DECODES_WRONG = {"epsilon", "no_scale_in_decoding", "half_precision", "truncated_bytes"}


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return ldm.load(PHANTOM_WEIGHTS)


@pytest.fixture(scope="module")
def right(sd: StableDiffusion) -> Conventions:
    return replace(Conventions.right(sd), latent_shape=(4, 8, 8))


@pytest.fixture(scope="module")
def right_result(right: Conventions) -> Result:
    return carried_out(right, JOB, None)


def call(*arguments: object) -> None:
    parser = argparse.ArgumentParser()
    traps.add_arguments(parser)
    traps.run(parser.parse_args([str(argument) for argument in arguments]))


# ---- the right recipe ------------------------------------------------------------------------------


@torch.no_grad()
def test_the_right_recipe_is_what_the_library_does(sd, right, right_result):
    empty, neutral, style = sd.encode_prompts(["", JOB.neutral, JOB.style])[:, None]
    contexts = ldm.conditioning.swap(neutral, style, at=JOB.swap_step, steps=JOB.steps)
    eps_fn = ldm.guidance.guided(sd.unet, contexts, JOB.guidance, empty)
    *_, last = ldm.samplers.ddim(eps_fn, initial_noise(JOB.seeds, right.latent_shape), sd.schedule, JOB.steps)
    torch.testing.assert_close(right_result.latents, last.x_prev, rtol=1e-5, atol=1e-5)  # the same sums in float32
    assert np.array_equal(right_result.images, to_uint8(sd.decode_latents(right_result.latents)))
    pixels = torch.from_numpy(right_result.images).permute(0, 3, 1, 2) / 127.5 - 1
    assert torch.equal(right_result.encoded, sd.encode_image(pixels))


def test_the_right_recipe_does_not_drift(right, right_result):
    assert Drift.between(carried_out(right, JOB, right_result.images), right_result) == Drift(0, 0, 0, 0)


# ---- every mistake ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAPS)
def test_a_mistake_moves_what_it_should_and_nothing_else(name, right, right_result):
    wrong = carried_out(TRAPS[name].trap(right), JOB, right_result.images)
    drift = Drift.between(wrong, right_result)
    draws_wrong = name not in ENCODES_WRONG | DECODES_WRONG
    assert (drift.latents > 0) == draws_wrong
    assert (drift.encoded > 0) == (name in ENCODES_WRONG)
    if draws_wrong:
        assert drift.returned == 0
    elif name not in DECODES_WRONG:
        assert drift.image == 0


def test_the_networks_are_left_as_they_were(right, right_result):
    for known in TRAPS.values():
        known.trap(right)
    assert torch.equal(draw(right, JOB), right_result.latents)


def test_every_mistake_says_what_is_wrong():
    for name, known in TRAPS.items():
        assert known.what.endswith("."), name
        assert known.seen, name


# ---- some of them by hand --------------------------------------------------------------------------


def test_padding_with_zero_leaves_the_text_and_one_end(right):
    prompts = ["", "chest"]
    ids = text.pad_token_zero(right).tokens(right.tokenizer, prompts)
    expected = right.tokenizer(prompts)
    assert ids[0, :3].tolist() == [right.tokenizer.start, right.tokenizer.end, 0]
    words = len(right.tokenizer.encode("chest"))
    assert torch.equal(ids[1, : words + 2], expected[1, : words + 2])
    assert not ids[1, words + 2 :].any()


def test_the_other_spacings(right):
    assert sampling.trailing_spacing(right).timesteps(50) == tuple(range(999, 0, -20))
    assert sampling.no_offset(right).timesteps(50) == tuple(range(980, -1, -20))
    assert sampling.even_spacing(right).timesteps(4) == (999, 666, 333, 0)


def test_symmetric_padding_looks_one_pixel_up_and_left(right):
    """On an image cut by a pixel at its upper left the right layer is the wrong one, less a row and a column."""
    layer = next(module for module in right.vae.modules() if isinstance(module, Downsample))
    wrong = next(module for module in vae.symmetric_padding(right).vae.modules() if isinstance(module, vae.Symmetric))
    x = torch.randn(1, layer.conv.in_channels, 9, 9, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(wrong(x)[:, :, 1:, 1:], layer(x[:, :, 1:, 1:]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_skips_first_is_a_matter_of_order_alone(right):
    """A resnet that is given its channels in the other order by a network in that order computes what it should."""
    resnet = right.unet.up_blocks[0].resnets[0]
    wrong = unet.skips_first(right).unet.up_blocks[0].resnets[0]
    own, width = right.unet.config.widths[-1], right.unet.config.widths[0]
    x = torch.randn(1, resnet.norm1.num_channels, 4, 4, generator=torch.Generator().manual_seed(0))
    time = torch.randn(1, 4 * width)
    exchanged = torch.cat([x[:, -own:], x[:, :-own]], dim=1)
    assert torch.equal(wrong(exchanged, time), resnet(x, time))


def test_the_wrong_time_of_a_wrong_time(right):
    """Under a right embedding the recovered timestep is exact: the mistake at t = 981 is the network's own at 49."""
    x, context = torch.randn(1, 4, 16, 16), torch.randn(1, 5, right.unet.config.context_width)
    wrong = unet.wrong_time(right).unet
    with torch.no_grad():
        for t in (981, 501, 21, 1):
            torch.testing.assert_close(wrong(x, t, context), right.unet(x, t // 20, context), rtol=1e-5, atol=1e-5)


def test_an_overflow_is_black(right):
    class Overflows(torch.nn.Module):
        def decode(self, z):
            return torch.full((1, 3, 8, 8), torch.inf) - torch.inf

    recipe = vae.half_precision(right)
    object.__setattr__(recipe, "vae", Overflows())
    assert not decode(recipe, torch.zeros(1, 4, 1, 1)).any()


# ---- the command -----------------------------------------------------------------------------------


def test_the_command_writes_numbers_a_table_and_a_figure(tmp_path, capsys):
    names = ["final_alpha_one", "symmetric_padding"]
    call("--only", ",".join(names), "--seeds", "0", "--steps", "16", "--out", tmp_path)
    facts = json.loads((tmp_path / "traps.json").read_text())
    assert list(facts["traps"]) == names
    drift = facts["traps"]["final_alpha_one"]["drift"]
    assert set(drift) == {"chest", "skin"}
    assert drift["chest"]["latents"] > 0
    assert drift["chest"]["encoded"] == 0
    assert facts["traps"]["symmetric_padding"]["drift"]["skin"]["returned"] > 0
    assert (tmp_path / "traps.png").stat().st_size > 10_000
    assert "final_alpha_one" in (tmp_path / "traps.md").read_text()
    assert "symmetric_padding" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--only", "final_alpha_two"), "final_alpha_two unknown, expected some of pad_token_zero"),
        (("--neutral", "a"), "expected both"),
        (("--steps", "10"), "expected 16 or more"),
        (("--dtype", "bfloat16"), "expected float32"),
        (("--weights", "elsewhere.safetensors"), "expected two prompts that this model knows"),
    ],
)
def test_bad_options_are_refused(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        call(*options, "--out", tmp_path)
