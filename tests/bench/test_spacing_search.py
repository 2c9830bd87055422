"""Levels chosen by search: better than any fixed spacing on the known flow, and a file that --spacing takes."""

import json
from argparse import Namespace
from dataclasses import replace

import numpy as np
import pytest
from ldm_tools import cli, own_code
from ldm_tools.bench import optimise_spacing
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


def test_seeds_that_levels_are_chosen_by_are_no_seeds_to_hold_them_to(tmp_path):
    bench = Bench(Named(), replace(COMPARISON, guidances=(1.0,)))
    args = Namespace(seeds="1000003", steps=6, tries=80, training_seeds=4, samplers="unipc", out=tmp_path)
    with pytest.raises(ValueError, match="--seeds: got 1000003, by which levels are chosen"):
        optimise_spacing.run(args, bench)


class Named(MixtureModel):
    def weights_sha256(self) -> str:
        return "0" * 64


def test_on_a_checkpoint_levels_are_held_to_seeds_that_they_were_not_chosen_by(capsys):
    bench = Bench(Named(), replace(COMPARISON, guidances=(1.0,)))
    args = Namespace(seeds="0-2", reference_steps=80, steps=6, tries=80, training_seeds=4)
    judge = optimise_spacing.Judge(bench, args)
    assert not set(judge.training) & set(judge.held)
    told, verified = judge.optimised("unipc")
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
