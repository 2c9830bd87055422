"""Directions at the bottleneck: rows swap where they should, and lines are measured as lines."""

import json

import numpy as np
import pytest
import torch
from ldm_tools.cli import main
from tiny_model import write_tiny_model

import ldm
from ldm import probe
from ldm.conditioning import swap
from ldm.phantom.prompts import DOMAINS
from ldm.pipeline import PHANTOM_WEIGHTS, StableDiffusion
from ldm.samplers import ddim, initial_noise
from ldm.study.structure.bottleneck import scaled_swap_steps, seen_in, shared, trajectories
from ldm.study.structure.domains import Prompts
from ldm.traversal.plan import SWAP_STEPS


@pytest.fixture(scope="module")
def sd() -> StableDiffusion:
    return ldm.load(PHANTOM_WEIGHTS)


def test_swap_steps_scale_with_the_steps():
    assert scaled_swap_steps(50) == SWAP_STEPS
    assert scaled_swap_steps(20) == (2, 4, 6, 8, 10, 12, 14, 16, 18)


@pytest.fixture(scope="module")
def on_a_tiny_model(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command and its model: what it writes does not depend on the network."""
    weights = write_tiny_model(tmp_path_factory.mktemp("weights") / "tiny.safetensors")
    return ["hspace", "--weights", str(weights), "--device", "cpu"]


@torch.no_grad()
def test_a_row_is_the_trajectory_that_it_is_called(sd):
    cell, steps = DOMAINS["chest"], 3
    spaces = trajectories(sd, cell, 7, (1, 2), ["mid_block", "conv_out"], steps, 3.0)
    prompts = Prompts.of(sd, cell)
    eps_fn = ldm.guidance.guided(
        sd.unet, swap(prompts.neutral, prompts.styles[1:2], at=1, steps=steps), 3.0, prompts.empty
    )
    run = list(ddim(eps_fn, initial_noise([7], sd.latent_shape), sd.schedule, steps))
    row = 1 + 2 + 0  # the second attribute's first swap step
    # Rows of a batch of another size are summed in another order: float32's last digits over three steps.
    torch.testing.assert_close(spaces["z"][row], run[-1].x_prev[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        spaces["x_t, all steps"][row], torch.stack([step.x_prev[0] for step in run]), rtol=1e-4, atol=1e-4
    )
    # The rows with the prompt, not those without: eps of the prompt alone, by the last call's second half.
    with probe.capture(sd.unet, "conv_out") as seen:
        sd.unet(run[-1].x_t, run[-1].t, prompts.styles[1:2])
    torch.testing.assert_close(spaces["conv_out, last step"][row], seen["conv_out"][0], rtol=1e-3, atol=1e-3)
    assert spaces["mid_block, all steps"].shape == (5, steps, 128, 4, 4)
    assert torch.equal(spaces["mid_block, all steps"][:, -1], spaces["mid_block, last step"])
    # Before its swap a row is the neutral one: the same numbers in one batch of equal rows.
    late = spaces["mid_block, all steps"][2, :2]
    torch.testing.assert_close(late, spaces["mid_block, all steps"][0, :2], rtol=1e-5, atol=1e-5)


def test_a_straight_line_is_straight():
    direction = torch.linspace(-1, 1, 12)
    strengths = torch.tensor([3.0, 2.0, 1.0])  # early swaps edit more
    space = torch.cat([torch.zeros(1, 12), strengths[:, None] * direction])
    seen = seen_in(space, attributes=1, swap_steps=3)
    np.testing.assert_allclose(seen.cosines, np.ones((1, 3, 3)))
    assert seen.geometry[0]["arc_over_chord"] == pytest.approx(1.0)
    assert seen.geometry[0]["first_direction"] == pytest.approx(1.0)
    assert seen.geometry[0]["total_turning"] == pytest.approx(0.0, abs=1e-6)


def test_directions_that_seeds_share():
    x, y = np.eye(2, dtype=np.float32)
    assert shared([x[None], x[None]]) == [1.0]
    assert shared([x[None], -x[None]]) == [-1.0]
    assert shared([x[None], y[None]]) == [0.0]
    # Three seeds: pairs of cosine 1, 0, 0.
    assert shared([x[None], x[None], y[None]])[0] == pytest.approx(1 / 3)
    assert shared([x[None]]) == [None]


def test_the_command(on_a_tiny_model, tmp_path, capsys):
    arguments = [*on_a_tiny_model, "--domains", "chest", "--seeds", "0,1", "--out", str(tmp_path)]
    assert main([*arguments, "--steps", "10"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        *("hspace.json", "directions.png", "directions.pdf", "straightness.png", "straightness.pdf")
    }
    spaces = json.loads((tmp_path / "hspace.json").read_text())["attributes"]["support_devices"]["spaces"]
    assert list(spaces) == ["z", "mid_block, last step", "x_t, all steps", "mid_block, all steps"]
    assert np.array(spaces["z"]["directions"]["mean"]).shape == (9, 9)
    assert main([*arguments, "--steps", "5"]) == 2
    assert "--steps: got 5, expected 10 or more" in capsys.readouterr().err
    assert main([*arguments, "--steps", "10", "--places", "mid_blok"]) == 2
    assert "did you mean 'mid_block'?" in capsys.readouterr().err


def test_the_command_with_prompts_of_ones_own(on_a_tiny_model, tmp_path, capsys):
    arguments = [*on_a_tiny_model, "--seeds", "0", "--steps", "10", "--out", str(tmp_path)]
    assert main([*arguments, "--neutral", "a chest"]) == 2
    assert "--neutral, --style: expected both or neither" in capsys.readouterr().err
    assert main([*arguments, "--neutral", "a chest", "--style", "wires"]) == 2
    assert "--style: got ['wires'], expected NAME=PROMPT" in capsys.readouterr().err
    assert main([*arguments, "--neutral", "a chest", "--style", "wires=a chest with wires"]) == 0
    found = json.loads((tmp_path / "hspace.json").read_text())["attributes"]
    assert list(found) == ["wires"]
    assert found["wires"]["spaces"]["z"]["shared"] == [None] * 9  # one seed has nobody to share with
