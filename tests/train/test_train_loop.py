"""The training loop's promises: stops, resumes, saves, schedules, averages, and refuses what is not finite."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.train import state
from ldm.train.learner import Ema, Recipe
from ldm.train.loop import fit

RECIPE = Recipe(steps=17, lr=1e-2, warmup=4, ema_decay=0.9, save_every=5)


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 1))


def regression(module: nn.Module) -> Callable[[int], Tensor]:
    """Fit the sum of three numbers; the batch is a function of the step."""

    def loss_at(step: int) -> Tensor:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return F.mse_loss(module(x), x.sum(1, keepdim=True))

    return loss_at


def run(folder: Path, recipe: Recipe = RECIPE, seed: int = 0) -> dict[str, Tensor]:
    module = tiny(seed)
    fit("tiny", module, regression(module), recipe, folder)
    return {name: p.detach() for name, p in module.named_parameters()}


class Stopped(Exception):
    pass


def run_until(folder: Path, stop: int, seed: int = 0) -> None:
    """A run that dies while it computes the loss of step `stop`."""
    module = tiny(seed)
    loss_at = regression(module)

    def or_stop(step: int) -> Tensor:
        if step == stop:
            raise Stopped
        return loss_at(step)

    with pytest.raises(Stopped):
        fit("tiny", module, or_stop, RECIPE, folder)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two empty folders."""
    folders = tmp_path / "one", tmp_path / "other"
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.mark.parametrize("stops", [(3,), (5,), (6,), (16,), (7, 12), (2, 2, 14)])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(two, stops):
    whole = run(two[0])

    def seed() -> int:
        """A restart that finds a checkpoint may begin from whatever weights: they are replaced."""
        return 1 if (two[1] / "tiny.safetensors").exists() else 0

    for stop in stops:
        run_until(two[1], stop, seed())
    resumed = run(two[1], seed=seed())
    assert_equal(resumed, whole)
    assert_equal(*(load_file(folder / "tiny.safetensors") for folder in two))


def test_a_run_that_dies_while_saving_goes_on_from_the_save_before(two, monkeypatch):
    whole, write_tensors = run(two[0]), state.write_tensors
    saves = []

    def second_one_fails(path: Path, tensors: object, metadata: object) -> None:
        saves.append(path)
        if len(saves) == 2:
            path.write_bytes(b"half a checkpoint")
            raise OSError("disk full")
        write_tensors(path, tensors, metadata)

    monkeypatch.setattr(state, "write_tensors", second_one_fails)
    with pytest.raises(OSError, match="disk full"):
        run(two[1])
    monkeypatch.undo()
    assert_equal(run(two[1], seed=1), whole)
    assert sorted(path.name for path in two[1].iterdir()) == ["tiny.jsonl", "tiny.safetensors"]


def test_a_finished_run_gives_its_weights_without_training(two):
    done = run(two[0])
    module = tiny(seed=1)

    def not_called(step: int) -> Tensor:
        raise AssertionError(f"step {step} was trained again")

    fit("tiny", module, not_called, RECIPE, two[0])
    assert_equal({name: p.detach() for name, p in module.named_parameters()}, done)
    assert not module.training


def test_training_reduces_the_loss_and_the_journal_says_so(tmp_path):
    recipe = replace(RECIPE, steps=120, ema_decay=0.0)
    run(tmp_path, recipe)
    rows = [json.loads(line) for line in (tmp_path / "tiny.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [50, 100, 120]
    assert rows[0]["loss"] > 2 * rows[-1]["loss"] > 0
    assert rows[-1]["lr"] == recipe.lr_at(119)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    recipe = Recipe(steps=100, lr=2.0, warmup=10, final_lr=0.1)
    rates = [recipe.lr_at(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(0.5 * (2.0 + 0.2))  # half way down
    assert rates[100] == pytest.approx(0.2)
    assert all(later < rate for rate, later in pairwise(rates[10:]))
    assert Recipe(steps=5, lr=1.0, warmup=0).lr_at(0) == 1.0


def test_the_optimiser_uses_that_rate_and_clips(tmp_path):
    # Adam's first step is the rate times the gradient's sign, as long as the gradient is far above its epsilon 1e-8.
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    recipe = Recipe(steps=1, lr=0.5, warmup=4, weight_decay=0.0)
    fit("one", module, lambda step: 1e6 * module.weight.sum(), recipe, tmp_path)
    assert module.weight.item() == pytest.approx(1 - recipe.lr_at(0), rel=1e-5)
    moment = load_file(tmp_path / "one.safetensors")["exp_avg.weight"]
    assert float(moment) == pytest.approx((1 - 0.9) * 1.0, rel=1e-4)  # of the gradient 1e6, clipped to norm 1


def test_the_moving_average_is_the_formula():
    module = nn.Linear(1, 1, bias=False)
    values = [0.0, 1.0, -2.0, 5.0, 0.5]
    nn.init.constant_(module.weight, values[0])
    ema, expected = Ema(module, decay=0.25), values[0]
    for step, value in enumerate(values[1:]):
        nn.init.constant_(module.weight, value)
        ema.update(module, step)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert float(ema.values["weight"]) == pytest.approx(expected, rel=1e-6)  # float32
    assert decay == 0.25  # the last update was past the short beginning


def test_a_run_ends_with_the_moving_average_where_one_is_kept(two):
    averaged = run(two[0])
    saved = load_file(two[0] / "tiny.safetensors")
    assert_equal(averaged, {name.removeprefix("ema."): p for name, p in saved.items() if name.startswith("ema.")})
    assert not torch.equal(saved["ema.0.weight"], saved["model.0.weight"])

    plain = run(two[1], replace(RECIPE, ema_decay=0.0))
    unaveraged = load_file(two[1] / "tiny.safetensors")
    assert_equal(plain, {name.removeprefix("model."): saved[name] for name in saved if name.startswith("model.")})
    assert not any(name.startswith("ema.") for name in unaveraged)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_does_harm(bad, tmp_path):
    module = tiny()
    loss_at = regression(module)
    before = {}

    def then_bad(step: int) -> Tensor:
        before.update({name: p.detach().clone() for name, p in module.named_parameters()})
        return loss_at(step) * (bad if step == 7 else 1.0)

    with pytest.raises(ValueError, match=rf"tiny: the loss at step 8 is {bad}"):
        fit("tiny", module, then_bad, RECIPE, tmp_path)
    assert_equal({name: p.detach() for name, p in module.named_parameters()}, before)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "tiny.safetensors").values())
