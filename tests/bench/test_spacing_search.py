"""Levels chosen by search: better than any fixed spacing on the known flow, and a file that --spacing takes."""

import json
from argparse import Namespace
from dataclasses import dataclass, replace

import numpy as np
import pytest
from ldm_tools import cli, own_code
from ldm_tools.bench import optimise_spacing, spacing_judge
from ldm_tools.bench import samplers as command
from test_samplers_bench import COMPARISON, MixtureModel

from ldm.bench import known_flow, spacing_search
from ldm.bench.sampler_statistics import errors_by_seed, mean_error
from ldm.bench.samplers import Bench
from ldm.samplers import SAMPLERS
from ldm.schedule import SPACINGS, Schedule, ToldTime, told_at

SD15 = Schedule.sd15()
UNIPC = SAMPLERS["unipc"]
FLOW = known_flow.KnownFlow((0, 1))


def aim(name: str, tell: bool = True, flow: known_flow.KnownFlow = FLOW) -> spacing_search.Aim:
    exact = flow.ends_at(SD15.alphas_cumprod_at(999))
    return spacing_search.Aim(spacing_search.follow(flow, SAMPLERS[name]), exact, SD15, tell)


def test_a_spacing_is_its_numbers():
    karras = tuple(SPACINGS["karras"](10, SD15))
    for tell in (True, False):
        numbers = spacing_search.numbers_of(karras, aim("unipc", tell))
        assert len(numbers) == (20 if tell else 10)
        again = spacing_search.timesteps_of(numbers, karras, aim("unipc", tell))
        assert again == pytest.approx(karras, abs=1e-4)
        assert tuple(map(told_at, again)) == again
    numbers = np.concatenate([numbers, np.full(10, 0.5)])
    told = [told_at(t) for t in spacing_search.timesteps_of(numbers, karras, aim("unipc"))]
    assert told == pytest.approx([min(t + 50, 999) for t in karras], abs=1e-3)


def test_a_spacing_that_visits_the_end_can_be_searched_from():
    begin = (999.0, 700.0, 300.0, 0.0)
    found = spacing_search.search(aim("unipc"), begin, 60)
    assert found.error < 0.5 * spacing_search.search(aim("unipc"), begin, 1).error


@pytest.mark.parametrize("name", ["unipc", "deis", "heun"])
def test_what_a_number_does_is_measured_where_it_first_matters_and_as_if_the_whole_run_were_taken(name):
    target, begin = aim(name), tuple(SPACINGS["karras"](6, SD15))
    numbers = spacing_search.numbers_of(begin, target)
    taken = target.run(begin, ())
    jacobian = spacing_search.differences(target, begin, numbers, taken, target.residual(taken))
    for index in (0, 3, 6, 8, 11):
        ends = []
        for stride in (1e-2, -1e-2):
            moved = numbers.copy()
            moved[index] += stride
            ends.append(target.residual(target.run(spacing_search.timesteps_of(moved, begin, target), ())))
        central = (ends[0] - ends[1]) / 2e-2
        if index != 6:  # above t = 999 there is no time to tell
            assert np.linalg.norm(jacobian[..., index] - central) < 0.05 * np.linalg.norm(central)


def test_a_search_is_never_worse_than_what_it_begins_from_and_keeps_to_its_tries():
    begin, counted = tuple(SPACINGS["karras"](10, SD15)), []
    target = aim("unipc")

    def run(timesteps, taken):
        counted.append(timesteps)
        return target.run(timesteps, taken)

    at_once = spacing_search.search(aim("unipc"), begin, 1)
    assert at_once.timesteps == begin
    found = spacing_search.search(replace(target, run=run), begin, 60)
    assert found.tried == len(counted) <= 60
    assert found.error < at_once.error / 2
    assert spacing_search.search(aim("unipc"), begin, 60) == found


@pytest.mark.parametrize("name", ["unipc", "deis", "dpm_solver_pp_2m"])
def test_on_the_known_flow_it_beats_every_fixed_spacing_on_other_seeds_many_times(name):
    found = spacing_search.on_known_flow(SAMPLERS[name], 10, seeds=(0, 1))
    other = aim(name, flow=known_flow.KnownFlow((50, 51)))

    def error(timesteps):
        return mean_error(errors_by_seed(other.run(timesteps, ())[-1].x_prev, other.exact))

    errors = {spacing: error(timesteps) for spacing, timesteps in spacing_search.fixed(UNIPC, 10, SD15).items()}
    assert error(found.timesteps) < min(errors.values()) / 3
    levels = spacing_search.search(aim(name, tell=False), tuple(SPACINGS["karras"](10, SD15)), 300)
    assert error(levels.timesteps) < errors["karras"]
    assert "told" not in levels.content()


FOUND = spacing_search.Found(
    tuple(
        map(
            ToldTime,
            (990.0, 880.5, 700.0, 560.0, 400.0, 250.0, 120.0, 50.0, 20.0, 5.0),
            (999.0, 870.0, 701.5, 561.0, 399.0, 251.0, 121.0, 53.0, 22.0, 5.0),
        )
    ),
    0.01,
    9,
)


def test_the_command_writes_what_spacing_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spacing_search, "on_known_flow", lambda sampler, steps, tries: FOUND)
    assert cli.main(["bench", "samplers", "--optimise", "spacing", "--known-flow", "--out", str(tmp_path)]) == 0
    monkeypatch.setitem(SPACINGS, "deis_10.json", None)  # so that it is taken out again
    name, source = own_code.spacing(str(tmp_path / "deis_10.json"))
    timesteps = SPACINGS[name](10, SD15)
    assert timesteps == FOUND.timesteps
    assert [told_at(t) for t in timesteps] == [told_at(t) for t in FOUND.timesteps]
    assert source["file"] == "deis_10.json"
    bad = ["bench", "samplers", "--optimise", "spacing", "--known-flow", "--out", str(tmp_path)]
    assert cli.main([*bad, "--samplers", "unipc,ddpm"]) == 2
    assert "got 'ddpm', expected samplers that follow the flow" in capsys.readouterr().err
    assert cli.main([*bad, "--steps", "1"]) == 2
    assert "--steps, --tries, --training-seeds: expected 2..100" in capsys.readouterr().err
    assert cli.main([*bad, "--training-seeds", "8"]) == 2
    assert "--training-seeds: it does nothing beside --optimise --known-flow" in capsys.readouterr().err
    assert cli.main(["bench", "samplers", "--known-flow", "--tries", "30"]) == 2
    assert "--tries: it belongs to --optimise" in capsys.readouterr().err
    assert cli.main(["bench", "samplers", "--optimise", "spacing", "--evaluations", "20"]) == 2
    assert "--evaluations: it does nothing beside --optimise" in capsys.readouterr().err
    assert cli.main([*bad, "--tries", "21"]) == 2
    assert "--tries: got 21, expected 22 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--spacings", "karras"], "--spacings: it does nothing beside --optimise"),
        (["--rounds", "3"], "--rounds: it does nothing beside --optimise"),
        (["--cfrt-seeds", "0"], "--cfrt-seeds: it does nothing beside --optimise"),
        (["--classifier", "x.safetensors"], "--classifier: it does nothing beside --optimise"),
        (["--no-images"], "--no-images: it does nothing beside --optimise"),
        (["--style", "a=b"], "--style: it does nothing beside --optimise"),
        (["--against", "diffusers"], "--against: it does nothing beside --optimise"),
        (["--guidance", "1,7.5"], "--guidance: got 1,7.5, expected one scale"),
        (["--samplers", "dpmpp_2m_karras"], "'dpmpp_2m_karras' says a spacing, which --optimise spacing searches"),
        (["--samplers", "plms"], "--samplers: got 'plms', expected samplers that follow the flow"),
        (["--seeds", "1000003"], "--seeds: got 1000003, by which levels are chosen"),
        (["--seeds", "x"], "--seeds"),
        (["--tries", "21"], "--tries: got 21, expected 22 or more"),
        (["--steps", "60"], "reference steps: got 100, expected at least 120"),
        (["--known-flow", "--device", "cpu"], "--device: it does nothing beside --optimise --known-flow"),
        (["--known-flow", "--guidance", "1"], "--guidance: it does nothing beside --optimise --known-flow"),
        (["--known-flow", "--seeds", "1"], "--seeds: it does nothing beside --optimise --known-flow"),
    ],
)
def test_what_a_search_does_not_take_is_refused_before_weights_are_read(
    tmp_path, monkeypatch, capsys, options, message
):
    monkeypatch.setattr(command, "load_model", None)
    out = tmp_path / "out"
    assert cli.main(["bench", "samplers", "--optimise", "spacing", "--out", str(out), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists()


def test_spacings_and_samplers_of_ones_own_are_seen_to_fit_before_weights_are_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "load_model", None)
    for table, name in ((SPACINGS, "mine.py:levels"), (SAMPLERS, "mine.py:mine")):
        monkeypatch.setitem(table, name, None)  # so that it is taken out again
        monkeypatch.delitem(table, name)
    file = tmp_path / "mine.py"
    file.write_text(MINE)
    base = ["bench", "samplers", "--optimise", "spacing", "--out", str(tmp_path)]
    assert cli.main([*base, "--samplers", f"{file}:mine"]) == 2
    assert "mine.py:mine is a generator of its own, which knows no told times" in capsys.readouterr().err
    assert cli.main([*base, "--steps", "6", "--spacing", f"{file}:levels"]) == 2
    assert "mine.py:levels: failed for 6 steps" in capsys.readouterr().err


MINE = """
from ldm.samplers import SAMPLERS

def mine(eps_fn, x_T, schedule, steps=50, *, eta=None, start=0, history=(), noise=None, timesteps=None):
    yield from SAMPLERS["ddim"](eps_fn, x_T, schedule, steps, start=start, timesteps=timesteps)

def levels(steps, schedule):
    return {n: [900 - 10 * i for i in range(n)] for n in (1, 2, 10, 50)}[steps]
"""


class Named(MixtureModel):
    def weights_sha256(self) -> str:
        return "0" * 64


SMALL = {"seeds": "0-2", "reference_steps": 80, "steps": 6, "tries": 80, "training_seeds": 4}


def test_on_a_checkpoint_levels_are_held_to_seeds_that_they_were_not_chosen_by(tmp_path, capsys):
    bench = Bench(Named(), replace(COMPARISON, guidances=(1.0,)))
    judge = optimise_spacing.Judge(bench, Namespace(**SMALL, out=tmp_path), {})
    assert not set(judge.training) & set(judge.held)
    told, verified = judge.optimised("unipc", judge.file("unipc"))
    errors = told["errors"]
    assert errors["found"] < min(error for spacing, error in errors.items() if spacing != "found") / 2
    assert told["times_smaller"]["value"] == pytest.approx(errors[told["best_fixed"]] / errors["found"])
    assert told["times_smaller"]["low"] <= told["times_smaller"]["value"] <= told["times_smaller"]["high"]
    assert len(told["timesteps"]) == len(told["told"]) == 6
    printed = capsys.readouterr().out
    assert "on 3 unseen seeds" in printed
    json.dumps(told, allow_nan=False)
    both = {("unipc", spacing): found for spacing, found in verified.items()}
    both[("deis", "karras")] = [error / 10 for error in verified["found"]]
    assert "0.10 x" in optimise_spacing.of_all(both)


class Killed(Exception):
    """Instead of a signal."""


@dataclass
class Mortal(Named):
    """Dies at a call of the network."""

    calls: int = 0
    dies_at: int = -1

    def unet(self, x_t, t, context):
        self.calls += 1
        if self.calls == self.dies_at:
            raise Killed
        return super().unet(x_t, t, context)


def optimise(out, model, **changes):
    args = Namespace(**{**SMALL, **changes}, samplers="unipc,deis", out=out, ema=None, blocks=None, backend="auto")
    optimise_spacing.run(args, Bench(model, replace(COMPARISON, guidances=(1.0,))), {})


def test_a_search_that_is_killed_goes_on_to_the_same_bytes_and_does_nothing_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spacing_judge.time, "perf_counter", lambda: 0.0)
    whole = Mortal()
    optimise(tmp_path / "whole", whole)
    files = {path.name: path.read_bytes() for path in (tmp_path / "whole").iterdir()}
    assert sorted(files) == ["deis_6.json", "deis_6.jsonl", "unipc_6.json", "unipc_6.jsonl"]
    out = tmp_path / "killed"
    for share in (0.02, 0.2, 0.4, 0.3):  # of all calls: in the reference, in rounds, at the other sampler
        with pytest.raises(Killed):
            optimise(out, Mortal(dies_at=int(share * whole.calls)))
    last = Mortal()
    optimise(out, last)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == files
    assert last.calls < 0.7 * whole.calls
    again = Mortal()
    capsys.readouterr()
    optimise(out, again)
    assert again.calls == 0
    assert "rounds and parts are read from" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"unipc_6\.jsonl: holds rows of other settings \(tries was 80, is 81\)"):
        optimise(out, Mortal(), tries=81)


def test_between_any_two_rounds_a_search_can_stop_and_goes_on_as_if_it_had_not():
    begin = tuple(SPACINGS["karras"](6, SD15))
    every = list(spacing_search.stages(aim("deis"), begin, 80))
    assert len(every) > 3
    for k, stage in enumerate(every):
        stored = json.loads(json.dumps(stage.content()))
        rest = list(spacing_search.stages(aim("deis"), begin, 80, spacing_search.Stage.read(stored)))
        assert [later.content() for later in rest] == [later.content() for later in every[k + 1 :]]
