"""`ldm traverse --fast`: where a branch asks the network, what it supposes in between, and what a run says of it."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from ldm_tools import demo
from ldm_tools.cli import main
from small_networks import ToyUNet, sampling_model, toy_context
from tiny_model import write_tiny_model
from torch import Tensor

import ldm
from ldm.finite import NotFinite, Watch
from ldm.pipeline import StableDiffusion
from ldm.samplers import initial_noise, noise_levels
from ldm.samplers.own import stored_spacing
from ldm.schedule import SPACINGS, Schedule
from ldm.traversal.following import asked, evaluations, follow_tree, followed_rows
from ldm.traversal.plan import Traversal
from ldm.traversal.prompt_tree import Branch, swaps, traverse_tree
from ldm.traversal.sampling import prompt_tree, sample
from ldm.traversal.store import load_latents

SCHEDULE, SHAPE = Schedule.sd15(), (4, 8, 8)
NEUTRAL, EFFUSION, DEVICES, EMPTY = (toy_context(value) for value in (0.1, 0.7, -0.5, 0.0))
PROMPTS = ["--neutral", "a chest", "--style", "effusion=a chest with effusion"]


class LinearInAlpha(ToyUNet):
    """x_0 = c + c^2 alpha_t, c the mean of the context: the difference of two prompts is on a line."""

    def __call__(self, x_t: Tensor, t: float, context: Tensor) -> Tensor:
        super().__call__(x_t, t, context)
        alphas_cumprod = SCHEDULE.alphas_cumprod_at(t)
        alpha, std = alphas_cumprod**0.5, (1 - alphas_cumprod) ** 0.5
        c = context.mean(dim=(1, 2))[:, None, None, None]
        return (x_t - alpha * (c + c * c * alpha)) / std


def sample_of(unet: ToyUNet):
    return partial(sampling_model(unet).sample, guidance_scale=1, negative=EMPTY)


def both(unet: ToyUNet, tree: Branch, steps: int, keep=()):
    x_T, sample = initial_noise([0, 1], SHAPE), sample_of(unet)
    levels = noise_levels(unet, x_T, SCHEDULE, steps)
    return (
        follow_tree(sample, x_T, tree, [0, 1], levels, keep=keep),
        traverse_tree(sample, x_T, tree, [0, 1], steps, keep=keep),
    )


def test_nine_swaps_take_two_and_a_half_times_fewer_evaluations():
    assert (evaluations(fast=False), evaluations(fast=True)) == (275, 110)
    tree = swaps(NEUTRAL, {"effusion": EFFUSION}, range(5, 50, 5))
    unet, done = ToyUNet(), []
    x_T = initial_noise([0, 1], SHAPE)
    result = follow_tree(
        sample_of(unet), x_T, tree, [0, 1], noise_levels(unet, x_T, SCHEDULE, 50), progress=done.append
    )
    assert followed_rows(tree, 50) == 110
    assert result.unet_rows == sum(done) == sum(rows for rows, *_ in unet.calls) == 2 * 110


@pytest.mark.parametrize("steps", [1, 2, 3, 10, 50, 1000])
def test_a_branch_asks_at_its_fork_and_at_steps_of_its_own(steps):
    for at in range(steps + 1):
        questions = asked(at, steps)
        assert list(questions) == sorted(set(questions))
        assert all(at <= index < steps for index in questions)
        assert questions[:1] == ((at,) if at < steps else ())
        assert len(questions) == steps - at or 3 <= len(questions) < steps - at


def test_differences_on_a_line_are_followed_exactly():
    """The x_0 of a prompt is c + c^2 alpha: what is supposed is then what the network would have said."""
    tree = Branch(
        "neutral",
        NEUTRAL,
        children=(
            Branch("effusion", EFFUSION, 3, children=(Branch("devices", DEVICES, 20),)),
            Branch("at once", DEVICES, 0),
            Branch("late", DEVICES, 48),
            Branch("too late", DEVICES, 50),
        ),
    )
    fast, usual = both(LinearInAlpha(), tree, 50, keep=("x_t", "x0_pred", "eps"))
    assert list(fast.latents) == list(usual.latents)
    assert fast.unet_rows < usual.unet_rows
    torch.testing.assert_close(fast.latents["neutral"], usual.latents["neutral"])
    # Up to the second question the difference is held: what that misses is made good by later questions in part only.
    for name in ("at once", "effusion", "devices"):
        second = asked({"at once": 0, "effusion": 3, "devices": 20}[name], 50)[1]
        torch.testing.assert_close(
            fast.path(name, "x0_pred")[second:], usual.path(name, "x0_pred")[second:], rtol=1e-4, atol=1e-5
        )
    torch.testing.assert_close(fast.latents["late"], usual.latents["late"])
    assert torch.equal(fast.latents["too late"], fast.latents["neutral"])


def test_what_is_kept_of_a_step_without_a_question_is_one_too():
    tree = swaps(NEUTRAL, {"effusion": EFFUSION}, (5,), 50)
    fast, _ = both(ToyUNet(), tree, 50, keep=("x_t", "x0_pred", "eps"))
    x_t, x0, eps = (fast.path("effusion/s05", quantity) for quantity in ("x_t", "x0_pred", "eps"))
    levels = noise_levels(None, fast.x_T, SCHEDULE, 50)
    for index in range(50):
        before = fast.x_T if index == 0 else x_t[index - 1]
        now, then = levels[index], levels[index + 1]
        torch.testing.assert_close(now.alpha * x0[index] + now.std * eps[index], before, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(then.alpha * x0[index] + then.std * eps[index], x_t[index], rtol=1e-4, atol=1e-4)


def test_a_branch_that_is_not_finite_is_said_at_the_end(monkeypatch):
    """As on a GPU, where steps are judged at a run's last step, which no branch needs to ask at."""
    monkeypatch.setattr("ldm.pipeline.Watch", lambda network: lambda *args, **named: None)

    class Bad(ToyUNet):
        def __call__(self, x_t, t, context):
            eps = super().__call__(x_t, t, context)
            return torch.where(context.mean(dim=(1, 2))[:, None, None, None] > 0.5, torch.nan, eps)

    with pytest.raises(NotFinite, match="effusion/s05: got NaN or Inf"):
        both(Bad(), swaps(NEUTRAL, {"effusion": EFFUSION}, (5,), 10), 10)


def test_a_neutral_path_that_is_not_finite_is_not_blamed_on_the_last_step(monkeypatch):
    class LastOnly(Watch):
        """As on a GPU: judged at a run's last step, by what this run saw."""

        def __call__(self, index: int, x0_pred: Tensor, last: bool) -> None:
            if last:
                super().__call__(index, x0_pred, last)

    class BadAtFirst(ToyUNet):
        def __call__(self, x_t, t, context):
            return super().__call__(x_t, t, context) + (torch.nan if t > 800 else 0)

    monkeypatch.setattr("ldm.pipeline.Watch", LastOnly)
    with pytest.raises(NotFinite, match="neutral: got NaN or Inf in its latents; leave out --fast"):
        both(BadAtFirst(), swaps(NEUTRAL, {"effusion": EFFUSION}, (5,), 10), 10)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("weights") / "tiny.safetensors")


def traverse(weights: Path, out: Path, *options: str) -> int:
    fixed = ["--weights", str(weights), "--device", "cpu", "--guidance", "2", "--bezier-points", "5", "--out", str(out)]
    return main(["traverse", *PROMPTS, *fixed, *options])


@pytest.mark.parametrize(
    "options", [[], ["--spacing", "karras", "--end", "zero"], ["--steps", "20", "--swap-steps", "0,7,19,20"]]
)
def test_a_run_says_it_and_keeps_the_neutral_path(weights: Path, tmp_path: Path, options: list[str]) -> None:
    assert traverse(weights, tmp_path / "fast", "--fast", "--no-images", *options) == 0
    assert traverse(weights, tmp_path / "usual", "--no-images", *options) == 0
    fast, usual = (json.loads((tmp_path / name / "run.json").read_text()) for name in ("fast", "usual"))
    assert fast["fast"] is True
    assert "fast" not in usual
    assert fast["unet_rows"] == evaluations(fast["swap_steps"], fast["steps"], fast=True) < usual["unet_rows"]
    one, other = (load_latents(tmp_path / name / "latents.safetensors").latents for name in ("fast", "usual"))
    assert one.keys() == other.keys()
    for name in other:
        exact = name.endswith(("neutral", "x_T", "s19", "s20"))
        of_largest = 1e-5 if exact else 0.2  # batches round differently; a network of random weights is no smooth one
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=of_largest * float(other[name].abs().max()))


def from_pure_noise(sd: StableDiffusion) -> StableDiffusion:
    """Its first alpha is 0, so it predicts v."""
    sd.unet.prediction = "v"
    return replace(sd, schedule=Schedule.of(replace(sd.diffusion, prediction="v", zero_terminal_snr=True)))


@pytest.mark.parametrize(
    ("change", "spacing", "end"),
    [(from_pure_noise, "trailing", None), (lambda sd: sd, "told", None), (lambda sd: sd, "linspace", "zero")],
)
def test_steps_without_a_question_are_on_the_levels_of_the_plan(weights: Path, monkeypatch, change, spacing, end):
    """What the kept x_0 and eps say of x_t, by the schedule and the timesteps alone."""
    timesteps = [981 - 48 * i for i in range(20)]
    told = {"steps": 20, "timesteps": timesteps, "told": [t - 6 for t in timesteps]}
    monkeypatch.setitem(SPACINGS, "told", stored_spacing("told", told))
    styles, keep = {"effusion": "a chest with effusion"}, ("x_t", "x0_pred", "eps")
    plan = Traversal(neutral="a chest", styles=styles, seeds=(0,), steps=20, swap_steps=(0, 3), guidance=2.0, fast=True)
    plan, sd = replace(plan, spacing=spacing, end=end, keep=keep), change(ldm.load(weights))
    result = sample(sd, plan, prompt_tree(sd, plan), plan.seeds)
    schedule = sd.schedule.ending_at(end) if end else sd.schedule
    bars = [schedule.alphas_cumprod_at(t) for t in SPACINGS[spacing](20, schedule)] + [schedule.final_alpha_cumprod]
    for name in ("neutral", "effusion/s00", "effusion/s03"):
        after, x0, eps = (result.path(name, quantity) for quantity in keep)
        for index, (before, x_prev) in enumerate(zip([result.x_T, *after], after, strict=False)):
            for bar, latents in ((bars[index], before), (bars[index + 1], x_prev)):
                implied = bar**0.5 * x0[index] + (1 - bar) ** 0.5 * eps[index]
                torch.testing.assert_close(implied, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("typed", "got"), [(["--sampler", "unipc"], "sampler 'unipc'"), (["--eta", "0.5"], "eta 0.5")])
def test_what_does_not_fit_is_refused_in_one_line(weights: Path, tmp_path: Path, capsys, typed, got) -> None:
    assert traverse(weights, tmp_path, "--fast", *typed) == 2
    assert f"fast: it takes the steps of ddim without eta, got {got}" in capsys.readouterr().err
    assert not (tmp_path / "run.json").exists()


def test_a_folder_is_not_mixed(weights: Path, tmp_path: Path, capsys) -> None:
    assert traverse(weights, tmp_path, "--fast", "--no-images") == 0
    assert traverse(weights, tmp_path, "--no-images", "--seeds", "1") == 2
    assert "fast" in capsys.readouterr().err


def test_evaluate_takes_such_a_run_as_any_other(weights: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert traverse(weights, run, "--fast", "--seeds", "0-1") == 0
    out = ["--out", str(tmp_path / "scores"), "--shown-seeds", "1"]
    assert main(["evaluate", str(run), "--weights", str(weights), *out]) == 0
    metrics = json.loads((tmp_path / "scores" / "metrics.json").read_text())
    assert metrics["sampling"]["averaged"] == [5, 10, 15]
    assert (metrics["sampling"]["sampler"], metrics["sampling"]["spacing"]) == ("ddim", "leading")
    assert metrics["cells"]["run"]["fast"] is True
    assert "run: by ldm traverse --fast." in (tmp_path / "scores" / "index.html").read_text()
    assert "by ldm traverse --fast: run." in (tmp_path / "scores" / "tables" / "table_2.md").read_text()


def test_what_runs_were_sampled_with_is_told_of_each_where_they_differ(weights: Path, tmp_path: Path) -> None:
    runs = [tmp_path / name for name in ("one", "other")]
    for run, options in zip(runs, ([], ["--steps", "20", "--swap-steps", "2,4,6"]), strict=True):
        assert traverse(weights, run, "--seeds", "0", "--no-images", *options) == 0
    out = ["--out", str(tmp_path / "scores"), "--shown-seeds", "1"]
    assert main(["evaluate", *map(str, runs), "--weights", str(weights), *out]) == 0
    sampling = json.loads((tmp_path / "scores" / "metrics.json").read_text())["sampling"]
    assert sampling["steps"] == {"one": 50, "other": 20}
    assert sampling["averaged"] == {"one": [5, 10, 15], "other": [2, 4, 6]}
    assert sampling["sampler"] == "ddim"


def test_the_demo_asks_seldom_unless_it_is_to_be_the_papers() -> None:
    for part in demo.parts():
        fewer, paper = demo.plan_of(part, (0,), paper=False), demo.plan_of(part, (0,), paper=True)
        usual = Traversal(neutral=part.cell.neutral, styles=part.cell.styles, seeds=(0,), guidance=paper.guidance)
        assert paper == usual
        assert fewer.fast
        assert (fewer.steps, fewer.swap_steps) == (usual.steps, usual.swap_steps)
