"""`ldm bench unet --against`: our U-Net and a peer's, in turn. No time itself is asserted."""

import json
import sys
from pathlib import Path

import pytest
import torch
from ldm_tools import cli
from ldm_tools.bench import against

from ldm.fast import backend

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bench(tiny, monkeypatch):
    rates = {"matmul_gflops": 50.0, "conv_gflops": 100.0}
    monkeypatch.setattr(against, "best_rates", lambda dtype, clock: rates)  # products of full size
    return lambda *options: cli.main(["bench", "unet", "--weights", str(tiny), "--rounds", "2", *options])


def test_another_checkout_is_timed_with_the_same_weights(bench, capsys):
    modules = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "ldm"}
    bench("--against", "previous", "--checkout", str(ROOT), "--clock", "cpu", "--json")
    result = json.loads(capsys.readouterr().out)
    assert (result["against"], result["clock"], result["rounds"]) == ("previous", "cpu", 2)
    assert result["interval"][0] <= result["ratio"] <= result["interval"][1]
    assert [way["error"] for way in result["ways"].values()] == [0, 0]  # this checkout against itself
    assert (result["conv_gflops"], result["matmul_gflops"]) == (100, 50)
    assert all(sys.modules[name] is module for name, module in modules.items())  # ours are back


def test_a_checkout_of_before_anything_was_installed_is_plain(bench, capsys, tmp_path):
    (tmp_path / "ldm").mkdir()
    for name in ("__init__", "blocks", "config", "unet"):
        source = "" if name == "__init__" else (ROOT / "ldm" / f"{name}.py").read_text()
        (tmp_path / "ldm" / f"{name}.py").write_text(source)
    assert not bench("--against", "previous", "--checkout", str(tmp_path), "--json")
    result = json.loads(capsys.readouterr().out)
    assert all(way["error"] < 1e-6 for way in result["ways"].values())


def test_a_checkout_whose_network_is_another_is_one_line(bench, capsys, tmp_path):
    (tmp_path / "ldm").mkdir()
    for name, source in {"__init__": "", "unet": "class UNet: ...", "config": "SD15 = None"}.items():
        (tmp_path / "ldm" / f"{name}.py").write_text(source)
    assert bench("--against", "previous", "--checkout", str(tmp_path)) == 2
    assert "is not made as this one's: " in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_table_reads(bench, capsys):
    bench("--against", "previous", "--checkout", str(ROOT))
    out = capsys.readouterr().out
    assert "x as fast as previous" in out
    assert "error to float32" in out


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["previous"], "--checkout: expected a folder"),
        (["previous", "--checkout", "/nowhere"], "has no ldm/unet.py"),
        (["openvino"], "openvino is not installed here"),
        (["diffusers"], "--against diffusers: it cannot be imported here"),
        (["openvino", "--checkout", str(ROOT)], "only there"),
        (["openvino", "--compile"], "--compile: it does nothing beside --against"),
    ],
)
def test_what_cannot_be_compared_is_one_line(bench, capsys, monkeypatch, options, complaint):
    monkeypatch.setattr(backend, "_OPENVINO", False)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert bench("--against", *options)
    err = capsys.readouterr().err.strip().splitlines()[-1]
    assert complaint in err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [(["--checkout", str(ROOT)], "--checkout: expected"), (["--clock", "cpu"], "--clock: it belongs to")],
)
def test_what_would_do_nothing_without_a_peer_is_refused(bench, capsys, options, complaint):
    assert bench(*options)
    assert complaint in capsys.readouterr().err


def test_a_peer_that_computes_something_else_is_not_timed(bench, capsys, monkeypatch):
    monkeypatch.setitem(against.PEERS, "diffusers", lambda network, args: (lambda x, t, c: torch.zeros_like(x), "0"))
    assert bench("--against", "diffusers")
    assert "away from ours in float32; not timed" in capsys.readouterr().err


def test_each_round_turns_the_order_and_the_ratio_is_the_peers_time_to_ours():
    order: list[str] = []
    costs = {"ours": 1, "peer": 3}
    calls = {name: lambda name=name: order.append(name) for name in costs}
    result = against.compared(calls, 4, lambda: float(sum(costs[name] for name in order)))
    assert order == ["ours", "peer", "peer", "ours"] * 2
    assert (result["ratio"], result["interval"]) == (3.0, [3.0, 3.0])
