"""Levels chosen by search: better than any fixed spacing on the known flow, and a file that --spacing takes."""

import json
from argparse import Namespace
from dataclasses import replace

import pytest
from ldm_tools import cli, own_code
from ldm_tools.bench import optimise_spacing
from test_samplers_bench import COMPARISON, MixtureModel

from ldm.bench import known_flow, spacing_search
from ldm.bench.samplers import Bench
from ldm.samplers import SAMPLERS
from ldm.schedule import SPACINGS, Schedule

SD15 = Schedule.sd15()
UNIPC = SAMPLERS["unipc"]


@pytest.mark.parametrize("name", ["karras", "log_snr", "beta"])
def test_a_few_knots_hold_a_spacing(name):
    timesteps = tuple(SPACINGS[name](10, SD15))
    again = spacing_search.through(spacing_search.knots_of(timesteps, SD15), 10, SD15)
    assert again == pytest.approx(timesteps, abs=30)
    assert spacing_search.through([0.0] * spacing_search.KNOTS, 10, SD15) is None  # levels that fall together


def test_a_search_is_never_worse_than_what_it_begins_from_and_keeps_to_its_tries():
    begin, asked = tuple(SPACINGS["karras"](10, SD15)), []

    def objective(timesteps):
        asked.append(timesteps)
        return sum((t - 990 * (1 - i / 10) ** 1.2) ** 2 for i, t in enumerate(timesteps))

    found = spacing_search.search(objective, begin, SD15, 60)
    assert len(asked) == found.tried <= 60
    assert found.error == min(map(objective, list(asked))) < objective(begin) / 4
    unmoved = spacing_search.search(lambda timesteps: float(timesteps != begin), begin, SD15, 60)
    assert (unmoved.timesteps, unmoved.error) == (begin, 0)


def test_on_the_known_flow_it_beats_every_fixed_spacing_on_other_seeds():
    found = spacing_search.on_known_flow(UNIPC, 10, seeds=(0, 1), tries=100)
    flow = known_flow.KnownFlow((50, 51))
    errors = {
        name: known_flow.error_of(flow, UNIPC, timesteps)
        for name, timesteps in spacing_search.fixed(UNIPC, 10, SD15).items()
    }
    assert known_flow.error_of(flow, UNIPC, found.timesteps) < min(errors.values())


def test_the_command_writes_what_spacing_takes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(spacing_search, "on_known_flow", lambda sampler, steps: FOUND)
    assert cli.main(["bench", "samplers", "--optimise", "spacing", "--known-flow", "--out", str(tmp_path)]) == 0
    monkeypatch.setitem(SPACINGS, "unipc_10.json", None)  # so that it is taken out again
    name, source = own_code.spacing(str(tmp_path / "unipc_10.json"))
    assert SPACINGS[name](10, SD15) == FOUND.timesteps
    assert source["file"] == "unipc_10.json"
    bad = ["bench", "samplers", "--optimise", "spacing", "--known-flow", "--samplers", "ddpm", "--out", str(tmp_path)]
    assert cli.main(bad) == 2
    assert "expected one sampler that follows the flow" in capsys.readouterr().err


FOUND = spacing_search.Found((990.0, 880.5, 700.0, 560.0, 400.0, 250.0, 120.0, 50.0, 20.0, 5.0), 0.01, 9)


class Named(MixtureModel):
    def weights_sha256(self) -> str:
        return "0" * 64


def test_on_a_checkpoint_levels_are_held_to_seeds_that_they_were_not_chosen_by(capsys):
    bench = Bench(Named(), replace(COMPARISON, reference_steps=80))
    args = Namespace(seeds="0-2", reference_steps=80, steps=6, tries=25)
    candidates = {name: tuple(SPACINGS[name](6, SD15)) for name in ("leading", "trailing", "karras")}
    told = optimise_spacing.on_checkpoint(args, bench, "unipc", candidates)
    assert told["errors"]["found"] < 1.5 * min(told["errors"][name] for name in candidates)
    assert told["times_smaller"]["value"] == pytest.approx(told["errors"][told["best_fixed"]] / told["errors"]["found"])
    assert told["times_smaller"]["low"] <= told["times_smaller"]["value"] <= told["times_smaller"]["high"]
    printed = capsys.readouterr().out
    assert "on 3 unseen seeds" in printed
    json.dumps(told, allow_nan=False)
