"""`ldm traverse --fast`: what it chooses, refuses and records, and that its runs are read as those of 50 steps."""

import json
from pathlib import Path

import pytest
from ldm_tools import demo
from ldm_tools.cli import main
from tiny_model import write_tiny_model

from ldm.samplers import ddim
from ldm.traversal.fewer_steps import FAST, USUAL, stands_for
from ldm.traversal.plan import Traversal
from ldm.traversal.store import load_latents

PROMPTS = ["--neutral", "a chest", "--style", "effusion=a chest with effusion"]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def traverse(weights: Path, out: Path, *options: str) -> int:
    fixed = ["--weights", str(weights), "--device", "cpu", "--guidance", "2", "--bezier-points", "5", "--out", str(out)]
    return main(["traverse", *PROMPTS, *fixed, *options])


def test_it_takes_at_least_two_and_a_half_times_fewer_evaluations() -> None:
    assert USUAL.evaluations == 275
    assert USUAL.evaluations / FAST.evaluations >= 2.5
    assert len(FAST.swap_steps) == len(USUAL.swap_steps)


def test_a_run_is_that_of_its_settings_and_says_what_was_chosen(weights: Path, tmp_path: Path) -> None:
    assert traverse(weights, tmp_path / "fast", "--fast", "--no-images") == 0
    record = json.loads((tmp_path / "fast" / "run.json").read_text())
    assert record["unet_rows"] == FAST.evaluations
    assert record["fast"] == {**FAST.record(), "instead_of": USUAL.record()}
    assert (record["sampler"], record["spacing"], record["steps"]) == (FAST.sampler, FAST.spacing, FAST.steps)
    assert record["swap_steps"] == list(FAST.swap_steps)
    assert stands_for(record, (5, 10, 15)) == FAST.swap_steps[:3]

    swaps = ",".join(map(str, FAST.swap_steps))
    typed = ["--spacing", FAST.spacing, "--steps", str(FAST.steps), "--swap-steps", swaps, "--sampler", "ddim"]
    assert traverse(weights, tmp_path / "typed", *typed, "--no-images") == 0
    one, other = (load_latents(tmp_path / name / "latents.safetensors").latents for name in ("fast", "typed"))
    assert all(one[name].equal(other[name]) for name in other)


def test_without_it_nothing_is_said_of_it(weights: Path, tmp_path: Path) -> None:
    assert traverse(weights, tmp_path, "--steps", "5", "--swap-steps", "2", "--no-images") == 0
    record = json.loads((tmp_path / "run.json").read_text())
    assert "fast" not in record
    assert (record["sampler"], record["spacing"]) == (ddim.name, "leading")
    assert stands_for(record, (5,)) is None


@pytest.mark.parametrize(
    "typed",
    [
        *(["--steps", "50"], ["--sampler", "ddim"], ["--swap-steps", "5"], ["--spacing", "karras"], ["--end", "zero"]),
        *(["--eta", "0.5"], ["--indexing", "authors"], ["--image", "x.png"]),
    ],
)
def test_what_it_would_override_is_refused_in_one_line(weights: Path, tmp_path: Path, capsys, typed: list[str]) -> None:
    assert traverse(weights, tmp_path, "--fast", *typed) == 2
    assert f"leave out {typed[0]}, or --fast" in capsys.readouterr().err
    assert not (tmp_path / "run.json").exists()


def test_evaluate_averages_the_swaps_that_stand_for_the_authors(weights: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert traverse(weights, run, "--fast", "--seeds", "0-1") == 0
    out = ["--out", str(tmp_path / "scores"), "--shown-seeds", "1"]
    assert main(["evaluate", str(run), "--weights", str(weights), *out]) == 0
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert metrics["sampling"]["averaged"] == list(FAST.swap_steps[:3])
    assert metrics["sampling"]["swap_steps"] == list(FAST.swap_steps)
    assert (tmp_path / "scores" / "index.html").stat().st_size > 0


def test_the_demo_takes_fewer_steps_unless_it_is_to_be_the_papers() -> None:
    for part in demo.parts():
        fewer, paper = demo.plan_of(part, (0,), paper=False), demo.plan_of(part, (0,), paper=True)
        usual = Traversal(neutral=part.cell.neutral, styles=part.cell.styles, seeds=(0,), guidance=paper.guidance)
        assert paper == usual
        assert (fewer.spacing, fewer.steps, fewer.swap_steps) == (FAST.spacing, FAST.steps, FAST.swap_steps)
        assert len(fewer.swap_steps) > max(demo.ON_MAP)
