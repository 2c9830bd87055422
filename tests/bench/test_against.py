"""Another library's samplers beside ours: what an adapter asks of it and gives back, on stand-ins for the libraries."""

import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
from ldm_tools import cli
from ldm_tools.bench import peers

from ldm.bench import known_flow
from ldm.bench.known_flow import KnownFlow, Question, measure
from ldm.schedule import SPACINGS, Schedule

SD15 = Schedule.sd15()


def sample_euler(model, x, sigmas, disable):
    """Karras' Euler, as k-diffusion calls a model: x_0 at sigma, latents divided by alpha."""
    for sigma, after in pairwise(sigmas):
        slope = (x - model(x, sigma * x.new_ones(len(x)))) / sigma
        x = x + (after - sigma) * slope
    return x


class Scheduler:
    """A scheduler as diffusers writes them: DDIM's step at its own, whole timesteps."""

    init_noise_sigma = 1.0
    clean = False

    def __init__(self, trained_betas, set_alpha_to_one=True, timestep_spacing="leading"):
        self.a = torch.cumprod(1 - torch.tensor(trained_betas, dtype=torch.float64), 0)
        self.spacing, self.set_alpha_to_one = timestep_spacing, set_alpha_to_one

    def set_timesteps(self, steps):
        self.timesteps = torch.tensor(SPACINGS[self.spacing](steps, SD15))

    def scale_model_input(self, x, t):
        return x

    def step(self, eps, t, x):
        at = self.timesteps.tolist().index(int(t))
        last = at + 1 == len(self.timesteps)
        a, b = self.a[int(t)], (1.0 if self.set_alpha_to_one else self.a[0]) if last else self.a[self.timesteps[at + 1]]
        x_0 = (x - (1 - a) ** 0.5 * eps) / a**0.5
        return SimpleNamespace(prev_sample=b**0.5 * x_0 + (1 - b) ** 0.5 * eps)


class EndsClean(Scheduler):
    """Ends without noise, and says so by its sigmas."""

    def __init__(self, trained_betas, timestep_spacing="leading"):
        super().__init__(trained_betas, True, timestep_spacing)
        self.sigmas = torch.zeros(1)


class Broken(EndsClean):
    def step(self, eps, t, x):
        return SimpleNamespace(prev_sample=x / 0)


DIFFUSERS = SimpleNamespace(
    __version__="0.0", DDIMScheduler=Scheduler, LMSDiscreteScheduler=EndsClean, HeunDiscreteScheduler=Broken
)


def test_k_diffusion_visits_our_levels_and_ends_where_we_do():
    flow = KnownFlow((0, 1), peer=peers.KDiffusion(SimpleNamespace(sample_euler=sample_euler)))
    row = measure(flow, "ddim", "karras", 10)
    assert row["peer_evaluations"] == 10
    assert row["peer_apart"] < 1e-6
    assert row["peer_error"] == pytest.approx(row["error"], rel=1e-4)
    assert "peer_error" not in measure(flow, "unipc", "karras", 10)  # it has none
    assert "AttributeError" in measure(flow, "heun", "karras", 10)["peer_refused"]  # this version has not


def test_diffusers_goes_by_the_spacings_name():
    flow = KnownFlow((0, 1), peer=peers.Diffusers(DIFFUSERS))
    row = measure(flow, "ddim", "leading", 10)
    assert (row["peer_evaluations"], flow.peer.name) == (10, "diffusers 0.0")
    assert row["peer_apart"] < 1e-6
    assert measure(flow, "heun", "leading", 10)["peer_refused"] == "its latents are not finite"
    assert "peer_error" not in measure(flow, "ddim", "karras", 10)  # its DDIM takes no such levels
    assert "peer_error" not in measure(flow, "ddim", "laplace", 10)


def test_a_peer_that_ends_without_noise_is_held_to_the_flow_without_noise():
    ends = measure(KnownFlow((0, 1), peer=peers.Diffusers(DIFFUSERS)), "lms", "leading", 40)
    alike = measure(KnownFlow((0, 1)), "ddim", "leading", 40)
    # The step from t = 1 to no noise is the same line as to t = 0 and on: without it, errors would be 1e-2 apart.
    assert ends["peer_error"] == pytest.approx(alike["error"], rel=0.02)


def test_the_same_levels_are_run_again_for_a_peer_which_goes_by_names():
    question = Question(samplers=("ddim",), spacings=("log_snr", "exponential"), budgets=(4,), seeds=(0,))
    rows = list(known_flow.compare(question, None, peers.Diffusers(DIFFUSERS)))
    assert not any("same_as" in row for (row,) in rows)


def test_the_command_has_the_peers_column(tmp_path, capsys, monkeypatch):
    package, sampling = ModuleType("k_diffusion"), ModuleType("k_diffusion.sampling")
    package.sampling, sampling.sample_euler = sampling, sample_euler
    monkeypatch.setitem(sys.modules, "k_diffusion", package)
    monkeypatch.setitem(sys.modules, "k_diffusion.sampling", sampling)
    base = ["bench", "samplers", "--known-flow", "--samplers", "ddim", "--spacings", "karras", "--seeds", "0"]
    options = ["--evaluations", "5,10", "--out", str(tmp_path)]
    assert cli.main([*base, *options, "--against", "k-diffusion"]) == 0
    assert "apart" in capsys.readouterr().out
    assert "peer_error" in (tmp_path / "known_flow.csv").read_text().splitlines()[0]
    assert cli.main([*base, *options]) == 2  # those rows have a column that was not asked for
    assert "other settings (against" in capsys.readouterr().err


def test_a_library_that_is_not_there_is_a_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert cli.main(["bench", "samplers", "--known-flow", "--against", "diffusers", "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "--against diffusers: it cannot be imported here" in error
    assert error.count("\n") == 1
