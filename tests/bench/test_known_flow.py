"""Samplers on the known flow: its flow is the exact one, errors are what they say, rows survive a kill."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm_tools import cli
from mixture import Mixture as Reference

from ldm.bench import known_flow, samplers_page
from ldm.bench.known_flow import KnownFlow, Mixture, Question, measure
from ldm.bench.rows import RowFile
from ldm.bench.sampler_statistics import cheapest, fitted_order, pareto, ratio_interval
from ldm.samplers import SAMPLERS, Sampler, initial_noise
from ldm.schedule import SPACINGS, Schedule

SD15 = Schedule.sd15()


def test_the_first_of_a_pair_is_the_mixture_of_the_tests():
    x = initial_noise([3], (4, 8, 8)).double()
    for t in (0, 321.5, 999):
        ours = Mixture(SD15).eps(x, t)[..., ::2]
        torch.testing.assert_close(ours, Reference(SD15).eps(x, t)[..., ::2], rtol=0, atol=1e-12)
    a, b = SD15.alphas_cumprod_at(999), SD15.alphas_cumprod_at(100)
    torch.testing.assert_close(Mixture(SD15).flow(x, a, b)[..., ::2], Reference(SD15).flow(x, a, b)[..., ::2])


def test_the_flow_moves_with_its_prompt_and_a_fine_run_follows_it():
    flow = KnownFlow((0, 1))
    row = measure(flow, "unipc", "log_snr", 400)
    assert row["error"] < 1e-6
    assert row["swap_error"] < 1e-6
    assert row["swap_cosine"] == pytest.approx(1)
    assert row["swap_length"] == pytest.approx(1)
    assert row["start_error"] == 0  # log_snr begins at 999; leading at 981 with 50 steps
    assert measure(flow, "ddim", "leading", 50)["start_error"] > 1e-5


def test_orders_are_the_methods_with_intervals_around_them():
    question = Question(samplers=("ddim", "heun", "unipc"), spacings=("karras",), seeds=(0, 1, 2, 3))
    rows = [row for of_pair in known_flow.compare(question) for row in of_pair]
    orders = {entry["sampler"]: entry for entry in known_flow.orders(rows)}
    for sampler, theory in (("ddim", 1), ("heun", 2), ("unipc", 3)):
        assert orders[sampler]["theory"] == theory
        assert orders[sampler]["order"] == pytest.approx(theory, abs=0.15)
        assert orders[sampler]["order_low"] <= orders[sampler]["order"] <= orders[sampler]["order_high"]
    assert {row["evaluations"] for row in rows} == {10, 20, 40, 80}


def test_random_samplers_are_scored_by_their_distribution():
    flow = KnownFlow(tuple(range(8)))
    few, many = (measure(flow, "ddpm", "karras", budget) for budget in (5, 160))
    assert "error" not in few
    assert many["distance"] < few["distance"] / 2
    assert measure(flow, "unipc", "karras", 40)["distance"] < 1.63 / np.sqrt(8 * 256)  # Kolmogorov's 1 % bound


def test_what_does_not_run_is_a_row_that_says_so(monkeypatch):
    def broken(now, then, x_t, eps, run):
        return x_t / 0

    monkeypatch.setitem(SAMPLERS, "broken", Sampler("broken", broken, order=1))
    monkeypatch.setitem(SPACINGS, "flat", lambda steps, schedule: (1,) * steps)
    flow = KnownFlow((0,))
    assert "expected 10 falling values" in measure(flow, "ddim", "flat", 10)["refused"]
    row = measure(flow, "broken", "karras", 10)
    assert row["finite"] is False
    json.dumps(row, allow_nan=False)
    with pytest.raises(ValueError, match="samplers: expected some of"):
        Question(samplers=("absent",))


def test_evaluations_that_vary_are_the_mean_over_seeds():
    first, second, both = (
        measure(KnownFlow(seeds), "dpm_adaptive", "karras", 20)["evaluations"] for seeds in ((0,), (1,), (0, 1))
    )
    assert both == (first + second) / 2
    assert both >= 18  # six steps of three evaluations each, or more
    assert measure(KnownFlow((0, 1)), "plms", "leading", 20)["evaluations"] == 20


def test_the_same_levels_are_run_once_and_said_to_be_the_same(tmp_path, monkeypatch):
    asked = []

    def counted(flow, sampler, spacing, budget):
        asked.append((spacing, budget))
        return measure(flow, sampler, spacing, budget)

    monkeypatch.setattr(known_flow, "measure", counted)
    question = Question(
        samplers=("unipc",), spacings=("log_snr", "karras", "exponential"), seeds=(0,), budgets=(10, 20)
    )
    first, other, again = known_flow.compare(question)
    assert asked == [("log_snr", 10), ("log_snr", 20), ("karras", 10), ("karras", 20)]
    assert [row["same_as"] for row in again] == ["log_snr", "log_snr"]
    assert not any("same_as" in row for row in first + other)
    assert again == [{**row, "spacing": "exponential", "same_as": "log_snr"} for row in first]

    file = RowFile(tmp_path / "rows.jsonl", {}, ("sampler", "spacing", "budget"))
    for row in first:
        file.add(row)  # a run that was cut off here says the same
    assert [row["same_as"] for row in list(known_flow.compare(question, file))[2]] == ["log_snr", "log_snr"]


def test_every_registered_pair_runs_or_says_why_not():
    question = Question(budgets=(10,), seeds=(0,))
    rows = [row for of_pair in known_flow.compare(question) for row in of_pair]
    assert {row["sampler"] for row in rows} == set(SAMPLERS)
    assert {row["spacing"] for row in rows} == set(SPACINGS)
    assert all(row["finite"] for row in rows if "refused" not in row)


# ---- rows, statistics ------------------------------------------------------------------------------


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been(tmp_path):
    settings, names = {"seeds": (0,)}, ("sampler", "budget")
    asked = []

    def fill(path: Path) -> list[dict]:
        file = RowFile(path, settings, names)
        rows = []
        for budget in (10, 20, 30):
            name = {"sampler": "ddim", "budget": budget}
            rows.append(file.get(name, lambda budget=budget: asked.append(budget) or {"error": 1 / budget}))
        return rows

    whole = fill(tmp_path / "a.jsonl")
    assert asked == [10, 20, 30]
    text = (tmp_path / "a.jsonl").read_text()
    (tmp_path / "b.jsonl").write_text(text[: text.index('"budget": 20') + 7])  # in the middle of a row
    asked.clear()
    assert fill(tmp_path / "b.jsonl") == whole
    assert asked == [20, 30]
    assert (tmp_path / "b.jsonl").read_text() == text
    with pytest.raises(ValueError, match=r"seeds was \[0\], is \[1\]"):
        RowFile(tmp_path / "b.jsonl", {"seeds": [1]}, names)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("my notes\n", 1),
        ('{"seeds": [0]', 1),  # no first line is ever cut short: it is there whole or not at all
        ("[1, 2]\n", 1),
        ('{"seeds": [0]}\nnotes\n{"sampler": "ddim"}\n', 2),
        ('{"seeds": [0]}\n7\n', 2),
        (b"\x89PNG\r\n\x1a\n\x00\xff", 1),
    ],
)
def test_a_file_that_holds_something_else_is_left_as_it_is(tmp_path, content, line):
    path, content = tmp_path / "mine.jsonl", content if isinstance(content, bytes) else content.encode()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"mine.jsonl: line {line} is no JSON object.*give another --out"):
        RowFile(path, {"seeds": (0,)}, ("sampler",))
    assert path.read_bytes() == content
    path.write_bytes(b"")  # nothing to lose
    assert not RowFile(path, {"seeds": (0,)}, ("sampler",)).rows


def test_of_settings_within_settings_the_one_that_differs_is_named(tmp_path):
    def opened(**skin: object) -> RowFile:
        return RowFile(tmp_path / "rows.jsonl", {"cells": {"skin": {"prompts": {"a": "b"}, **skin}}}, ("seed",))

    opened(guidance=1.0, lpips=None)
    opened(guidance=1.0)
    with pytest.raises(ValueError, match=r"settings \(cells\.skin\.guidance was 1\.0, is 3\.0\); give"):
        opened(guidance=3.0)
    with pytest.raises(ValueError, match=r"\(cells\.skin\.usual was None, is {steps, eta}\)"):
        opened(guidance=1.0, usual={"steps": 50, "eta": 0})


def test_a_power_law_has_its_order():
    seeds = np.random.default_rng(1).uniform(1, 2, 6)
    order, low, high = fitted_order([10, 20, 40], [list(seeds * n**-2.5) for n in (10, 20, 40)])
    assert order == pytest.approx(2.5)
    assert low == pytest.approx(2.5)
    assert high == pytest.approx(2.5)
    noisy = [list(seeds[::k] * n**-2.5) for k, n in ((1, 10), (1, 20), (-1, 40))]
    order, low, high = fitted_order([10, 20, 40], noisy)
    assert low < order < high
    assert fitted_order([10, 10], [[1], [2]]) is None
    assert fitted_order([10, 20], [[1], [0]]) is None
    assert ratio_interval([1.0, 2.0], [2.0, 4.0]) == pytest.approx((2, 2, 2))


def test_the_front_and_the_cheapest():
    rows = [
        {"evaluations": n, "error": error} for n, error in ((10, 0.1), (10, 0.05), (20, 0.06), (20, 0.009), (40, 0.002))
    ] + [{"evaluations": 1, "error": None}, {"evaluations": 1, "refused": "no"}]
    assert [row["error"] for row in pareto(rows)] == [0.05, 0.009, 0.002]
    assert cheapest(rows)["evaluations"] == 20
    assert cheapest(rows[:3]) is None


# ---- the command -----------------------------------------------------------------------------------

MINE = """
FACTS = {"order": 1}

def mine(now, then, x_t, eps, run):
    return then.alpha * (x_t / now.alpha + (then.sigma - now.sigma) * eps)

def levels(steps, schedule):
    return [999 - 999 * i / steps for i in range(steps)]
"""


def test_the_command_compares_ones_own_beside_the_others(tmp_path, capsys, monkeypatch, own_names):
    (tmp_path / "mine.py").write_text(MINE)
    file, out = tmp_path / "mine.py", tmp_path / "out"
    base = ["bench", "samplers", "--known-flow", "--samplers", "ddim,ddpm", "--spacings", "linspace", "--seeds", "0-1"]
    options = ["--evaluations", "10,20", "--sampler", f"{file}:mine", "--spacing", f"{file}:levels", "--out", str(out)]
    assert cli.main([*base, *options]) == 0
    first = capsys.readouterr().out
    assert "6 pairs of sampler and spacing" in first
    result = json.loads((out / "known_flow.json").read_text())
    errors = {(row["sampler"], row["spacing"], row["budget"]): row.get("error") for row in result["rows"]}
    # One's own are Euler and linspace: what ddim and linspace are, by other arithmetic.
    assert errors["mine.py:mine", "mine.py:levels", 20] == pytest.approx(errors["ddim", "linspace", 20], rel=1e-6)
    assert set(result["own_code"]) == {"mine.py:mine", "mine.py:levels"}
    assert (out / "known_flow.png").stat().st_size > 10_000
    page = (out / "known_flow.html").read_text()
    assert not re.findall(r"(?:src|href)=\"(?!data:)|https?://|@import|url\(", page)
    data = json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.S)[1])
    assert len(data["paths"]["runs"]["mine.py:mine|mine.py:levels"]) == 10
    assert [len(path) for path in data["paths"]["runs"]["ddim|linspace"]] == [11] * 10  # the noise, and ten steps

    written = (out / "known_flow.jsonl").read_text()
    assert cli.main([*base, *options]) == 0  # again: nothing is left to do, and all is the same
    assert (out / "known_flow.jsonl").read_text() == written
    assert json.loads((out / "known_flow.json").read_text()) == result
    monkeypatch.delitem(SAMPLERS, "mine.py:mine")
    assert cli.main([*base[:-1], "0-2", *options]) == 2
    assert "seeds was [0, 1], is [0, 1, 2]" in capsys.readouterr().err


@pytest.fixture
def own_names(monkeypatch):
    for table in (SAMPLERS, SPACINGS):
        for name in ("mine.py:mine", "mine.py:levels"):
            monkeypatch.setitem(table, name, None)  # so that it is taken out again
            monkeypatch.delitem(table, name)


def compared(out: Path, *options: str) -> set[tuple[str, str]]:
    base = ["bench", "samplers", "--known-flow", "--seeds", "0", "--evaluations", "4", "--out", str(out)]
    assert cli.main([*base, *options]) == 0
    rows = json.loads((out / "known_flow.json").read_text())["rows"]
    return {(row["sampler"], row["spacing"]) for row in rows}


def test_the_lists_take_names_from_elsewhere_and_files(tmp_path, capsys, own_names):
    (tmp_path / "mine.py").write_text(MINE)
    file = tmp_path / "mine.py"
    found = compared(tmp_path / "a", "--samplers", f"DPM++ 2M Karras,{file}:mine", "--spacings", f"{file}:levels,beta")
    both = {"dpm_solver_pp_2m", "mine.py:mine"}
    assert found == {(name, spacing) for name in both for spacing in ("mine.py:levels", "beta", "karras")}
    assert "DPM++ 2M Karras: dpm_solver_pp_2m, spacing karras" in capsys.readouterr().out
    # Names that all say a spacing need no list of them; one that says none has every one.
    assert compared(tmp_path / "b", "--samplers", "dpmpp_2m_karras") == {("dpm_solver_pp_2m", "karras")}
    assert len(compared(tmp_path / "c", "--samplers", "dpmpp_2m_karras,euler_a")) >= 2 * 12


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samplers", "dpmpp_9m_karras"], "samplers: expected some of ddim"),
        (["--samplers", "absent.py:mine"], "--samplers: there is no file absent.py"),
        (["--spacings", "absent.json"], "--spacings: there is no file absent.json"),
    ],
)
def test_a_name_that_means_nothing_is_refused(tmp_path, capsys, options, message):
    assert cli.main(["bench", "samplers", "--known-flow", "--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_the_page_cannot_be_broken_out_of():
    page = samplers_page.page(
        "</script><b>", [{"sampler": "</script>", "spacing": "x", "evaluations": 1, "error": 0.1}]
    )
    assert page.count("</script>") == 2
