"""The kernels' benchmark, where there is no GPU: which sites, what they cost at least, what is checked and printed."""

import argparse
import json
from dataclasses import replace

import pytest
import torch
from ldm_tools.bench import kernels as command
from ldm_tools.cli import main

from ldm.bench import harness, kernels
from ldm.bench.kernel_predictions import A100, BATCHES, predict, predictions
from ldm.bench.kernel_sites import Site, prepare, sites
from ldm.bench.kernels import table

SELF = Site("attention", (4096, 4096, 8, 40), 5)


def test_the_sites_are_those_of_the_network():
    found = sites()
    counts = {op: sum(site.count for site in found if site.op == op) for op in {site.op for site in found}}
    assert counts == {
        "attention": 16,  # a transformer each
        "cross_attention": 16,
        "geglu": 16,
        "add_layer_norm": 32,
        "group_norm": 16 + 1,  # in front of a transformer, and the output
        "group_norm_silu": 2 * 22,
    }
    assert found[0] == SELF
    # 0.245 and 0.007 TFLOP a step at batch 2, counted by hand from the shapes.
    flops = {op: sum(site.count * site.flops(2) for site in found if site.op == op) for op in counts}
    assert flops["attention"] == pytest.approx(0.245e12, rel=0.005)
    assert flops["cross_attention"] == pytest.approx(0.007e12, rel=0.1)


def test_the_least_traffic_is_every_number_once():
    assert SELF.bytes(1) == 2 * 4 * 4096 * 320  # q, k, v, out
    assert Site("geglu", (4096, 1280), 5).bytes(2) == 2 * 2 * 3 * 4096 * 1280
    assert Site("group_norm_silu", (320, 64, 64), 1).bytes(1) == 2 * 2 * 320 * 64 * 64
    assert Site("add_layer_norm", (64, 1280), 1).bytes(1) == 2 * 4 * 64 * 1280
    # Backward, besides: q, k, v, out and its gradient read, three gradients written; what each other one reads, writes.
    assert SELF.bytes(1, backward=True) == 2 * (4 + 5 + 3) * 4096 * 320
    assert Site("geglu", (4096, 1280), 5).bytes(2, backward=True) == 2 * 2 * (3 + 5) * 4096 * 1280
    assert Site("group_norm_silu", (320, 64, 64), 1).bytes(1, backward=True) == 2 * (2 + 3) * 320 * 64 * 64
    assert Site("add_layer_norm", (64, 1280), 1).bytes(1, backward=True) == 2 * (4 + 4) * 64 * 1280


@pytest.mark.parametrize(
    "site",
    [
        Site("attention", (16, 16, 8, 40), 1),
        Site("cross_attention", (16, 77, 8, 40), 1),
        Site("geglu", (4, 8), 1),
        Site("add_layer_norm", (4, 16), 1),
        Site("group_norm", (32, 2, 3), 1),
        Site("group_norm_silu", (64, 2, 3), 1),
    ],
    ids=lambda site: site.name,
)
def test_a_site_is_prepared_as_the_network_would_call_it(site):
    call = prepare(site, 1, "cpu", torch.float32)
    out = call.run()
    torch.autograd.grad(out.sum(), call.leaves)
    assert out.isfinite().all()


def test_a_prediction_is_the_slowest_of_what_is_needed():
    code = {"kernel": "forward", "useful_ratio": 1.1, "own": 128, "loop": 64, "warps": 4, "loop_instructions": 500}
    found = predict(SELF, 2, A100, [code])
    # 4 B h N M d = 42.9 GFLOP at 312 TFLOP/s.
    assert found["floor_us"] == pytest.approx(137.7, abs=0.1)
    assert (found["predicted_us"], found["bound_by"]) == (pytest.approx(1.1 * 137.7, abs=0.1), "tensor cores")
    # 2 x 8 x 32 x 64 rounds of 900 instructions on 4 warps; 108 multiprocessors issue 4 at 1.41 GHz.
    found = predict(SELF, 2, A100, [{**code, "loop_instructions": 900}])
    expected = 2 * 8 * 32 * 64 * 900 * 4 / 4 / (108 * 1410)
    assert (found["predicted_us"], found["bound_by"]) == (pytest.approx(expected), "issue")
    # 2 x 8 x 4096 x 4096 exponentials, 16 a cycle and multiprocessor, when nothing else costs anything.
    found = predict(SELF, 2, A100, [{**code, "loop_instructions": 0, "useful_ratio": 0.0}])
    assert found["predicted_us"] == pytest.approx(2 * 8 * 4096**2 / 16 / (108 * 1410))
    assert found["bound_by"] == "exponentials"
    assert predict(Site("geglu", (64, 5120), 1), 2, A100)["bound_by"] == "bandwidth"


def test_the_backwards_kernels_run_one_after_the_other():
    code = {"useful_ratio": 1.0, "own": 64, "loop": 64, "warps": 4, "loop_instructions": 0}
    kernels_of_both = [{**code, "kernel": name} for name in ("forward", "dq", "dkdv")]
    found = predict(SELF, 2, A100, kernels_of_both, backward=True)
    # Seven products of 2 B h N M d are asked for, 2 + 3 + 4 are computed: q k^T and g v^T in both of the backward's.
    assert found["floor_us"] == pytest.approx(3.5 * 137.7, abs=0.5)
    assert found["predicted_us"] == pytest.approx(4.5 * 137.7, abs=0.5)
    slow = {**kernels_of_both[1], "loop_instructions": 2000}
    issue = 2 * 8 * 64 * 64 * 2000 * 4 / 4 / (108 * 1410)
    found = predict(SELF, 2, A100, [kernels_of_both[0], slow, kernels_of_both[2]], backward=True)
    assert (found["predicted_us"], found["bound_by"]) == (pytest.approx(3 * 137.7 + issue, abs=0.5), "issue")
    # A GPU whose matrix products take no time at all: as many exponentials as weights, in each of three kernels.
    found = predict(SELF, 2, replace(A100, tensor_tflops=1e9), kernels_of_both, backward=True)
    assert found["predicted_us"] == pytest.approx(3 * 2 * 8 * 4096**2 / 16 / (108 * 1410))


def test_every_self_attention_is_predicted_from_compiled_code_forward_and_backward():
    rows = {(row["site"], row["batch"], row["backward"], row["gpu"]): row for row in predictions()}
    assert len(rows) == 2 * len(BATCHES) * 2 * len(sites())
    for batch in BATCHES:
        for gpu in ("A100", "H100"):
            forward, both = (rows[SELF.name, batch, backward, gpu] for backward in (False, True))
            assert forward["predicted_us"] >= 1.1 * forward["floor_us"]  # 40 columns as 32 + 8, and 16 in q k^T
            # The backward's products are 3.5 times the forward's, of 48 columns instead of 44; or something is slower.
            assert both["predicted_us"] - forward["predicted_us"] >= 3.5 * 1.2 * forward["floor_us"] * 0.999


def test_the_check_before_the_clock_refuses_a_wrong_kernel(monkeypatch):
    site = Site("geglu", (4, 8), 1)

    def with_error(wrong):
        exact = kernels._results

        def results(site, dtype, device, backend):
            return [x + wrong * (backend == "triton") for x in exact(site, dtype, device, "torch")]

        return results

    monkeypatch.setattr(kernels, "_results", with_error(0.0))
    kernels.check(site, torch.float16, "cpu")
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "_results", with_error(0.1))
    with pytest.raises(ValueError, match=r"geglu 4x8: error .*; not timed"):
        kernels.check(site, torch.float16, "cpu")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "geglu"], "--only: it belongs to --compile-only"),
        (["--predict", "--capability", "90"], "--capability: it belongs to --compile-only"),
        (["--predict", "--rounds", "3"], "--rounds: it does nothing beside --predict"),
        (["--compile-only", "--out", "x"], "--out: it does nothing beside --compile-only"),
        (["--rounds", "1"], "--rounds: got 1, expected 2 or more"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(options, message, capsys):
    assert main(["bench", "kernels", *options]) == 2
    assert message in capsys.readouterr().err


def test_a_wrong_site_is_noted_and_the_others_are_timed(monkeypatch, tmp_path, capsys):
    """Nothing is lost: the files are whole after every site, one that fails ends nothing, and time is bounded."""
    known = (Site("geglu", (2, 8), 1), Site("geglu", (2, 16), 1), Site("geglu", (2, 24), 1), Site("geglu", (2, 32), 1))
    clock = iter([0, 1, 2, 3, 1000])
    seen = []

    def check(site, dtype, device):
        if (tmp_path / "ldm_kernels.json").exists():
            seen.append(len(json.loads((tmp_path / "ldm_kernels.json").read_text())["rows"]))
        if site == known[0]:
            raise ValueError(f"{site.name}: error 1, torch's own 0; not timed")
        if site == known[2]:
            raise RuntimeError("CUDA out of memory")
        return {"triton": 0.0, "torch": 0.0}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernels, "sites", lambda: known)
    monkeypatch.setattr(kernels, "matmul_gflops", lambda *args: 1e6)
    monkeypatch.setattr(kernels, "_copy_rate", lambda: 3.0)
    monkeypatch.setattr(kernels, "check", check)
    monkeypatch.setattr(kernels, "_measure_site", lambda site, batch, *rest: [{"site": site.name, "batch": batch}])
    monkeypatch.setattr(kernels.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(harness, "environment", dict)
    assert main(["bench", "kernels", "--out", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "3 sites not timed: geglu 2x8: error 1" in printed.err
    assert "geglu 2x24: CUDA out of memory" in printed.err
    assert "geglu 2x32: skipped, no time left" in printed.err
    assert "| geglu 2x16 | 2 |" in printed.out
    assert seen == [0, 4]
    assert json.loads((tmp_path / "ldm_kernels.json").read_text())["skipped"] == ["geglu 2x32"]


def test_a_table_is_markdown():
    assert table([{"a": 1.23456, "b": None}, {"a": "x", "b": 2}]) == "| a | b |\n| --- | --- |\n| 1.23 | - |\n| x | 2 |"


def parse(*options):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(options)


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    command.run(parse())
    assert capsys.readouterr().out == "no CUDA GPU here: nothing to time (see --compile-only and --predict)\n"


def test_a_prediction_says_that_it_is_one(capsys):
    command.run(parse("--predict"))
    out = capsys.readouterr().out
    assert out.startswith("A PREDICTION")
    assert out.count("| A100 |") == out.count("| H100 |") == 2 * 2 * len(sites())


@pytest.mark.parametrize("options", [["--record"], ["--compile-only", "--record", "--only", "geglu"]])
def test_a_record_is_of_everything(options):
    with pytest.raises(ValueError, match="--record: expected with --compile-only and without --only"):
        command.run(parse(*options))
