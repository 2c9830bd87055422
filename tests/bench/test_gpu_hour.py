"""`ldm bench gpu`: parts that fail, hang or are skipped, what is kept of them, and the dry run's own parts."""

import json
import os
import sys
import time

import pytest
import torch
from ldm_tools import cli
from ldm_tools.bench import gpu as command

from ldm.bench import gpu_hour, gpu_tuning
from ldm.bench.gpu_hour import Part


def script(name, code, minutes=1.0):
    return Part(name, "", minutes, [sys.executable, "-c", code])


def states(out):
    return {name: of["state"] for name, of in json.loads((out / "results.json").read_text())["parts"].items()}


def test_a_part_that_fails_or_hangs_is_noted_and_the_next_one_follows(tmp_path):
    hangs = "import subprocess, sys; print('{\"ok\": true}', flush=True); subprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"  # noqa: E501
    listed = [
        script("good", 'print(\'{"way": "a", "ok": true}\'); print(\'said beside\')'),
        script("raises", "raise SystemExit('no such kernel')"),
        script("crashes", "import os; os.kill(os.getpid(), 11)"),
        script("wrong", "print('{\"ok\": false}')"),
        script("hangs", hangs, minutes=0.05),
        script("last", "print('{\\n \"broken\": []\\n}')"),
    ]
    began, seen = time.monotonic(), []
    for part, found in gpu_hour.run(listed, tmp_path, 5):
        seen.append(part.name)
        assert list(states(tmp_path)) == seen, "written after each"
        assert states(tmp_path)[part.name] == found["state"]
    assert time.monotonic() - began < 50
    assert states(tmp_path) == {
        **{"good": "ok", "raises": "exit status 1", "crashes": "exit status -11", "wrong": "1 wrong"},
        **{"hangs": "cut off after 3 s", "last": "ok"},
    }
    parts = json.loads((tmp_path / "results.json").read_text())["parts"]
    assert parts["good"]["rows"] == [{"way": "a", "ok": True}]
    assert parts["hangs"]["rows"] == [{"ok": True}]
    assert parts["last"]["rows"] == [{"broken": []}]
    assert parts["raises"]["last_lines"] == ["no such kernel"]
    assert "| raises | exit status 1 |" in (tmp_path / "results.md").read_text()


def test_what_an_earlier_run_left_is_not_taken_for_this_ones(tmp_path):
    record = tmp_path / "traverse" / "run.json"
    record.parent.mkdir()
    writes = script("traverse", f"open({str(record)!r}, 'w').write('{{}}')")
    ((_, found),) = gpu_hour.run([writes], tmp_path, 1.0)
    assert (found["state"], found["run"]) == ("ok", {})
    os.utime(record, (1e9, 1e9))
    ((_, found),) = gpu_hour.run([script("traverse", "pass")], tmp_path, 1.0)
    assert found["state"] == f"{record} is an earlier run's: nothing was measured, take another --out"
    assert "run" not in found


def test_a_part_brings_what_it_needs(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_hour, "parts", lambda out, dry: [script(name, "pass") for name in ("weights", "traverse")])
    assert cli.main(["bench", "gpu", "--dry-run", "--only", "traverse", "--out", str(tmp_path)]) == 0
    assert set(json.loads((tmp_path / "results.json").read_text())["parts"]) == {"weights", "traverse"}


def test_what_there_is_no_time_for_is_skipped(tmp_path):
    listed = [script("one", "pass"), script("two", "pass")]
    assert [found["state"] for _, found in gpu_hour.run(listed, tmp_path, 0.0)] == ["skipped: no time"] * 2


def test_the_tables_have_every_number_that_came():
    rows = [
        {"way": "torch", "dtype": "float16", "rows": 2, "ok": True, "error": 1e-3, "first_call_s": 2.0},
        {"way": "torch", "dtype": "float16", "rows": 2, "median_ms": 18.25, "p20_ms": 18.0, "p80_ms": 19.0},
    ]
    best = [{"us": 31.5, "candidate": "forward d40 128x64 w8 s3 split8", "shipped": True}]
    site = {"kernel": "forward", "width": 40, "n": 4096, "batch": 2}
    faster = {"us": 21.5, "candidate": "forward d40 128x64 w8 s3 box", "shipped": False}
    tune = [
        {**site, "best": best, "failed": ["forward d40 1x1: error"]},
        {**site, "best": [faster, *best], "failed": []},
    ]
    sites = {"rows": [{"site": "attention 4096x4096 8x40", "by": "triton", "median_us": 99.0}]}
    run = {"seconds": 4.5, "unet_rows": 275, "max_batch": 64}
    record = {
        "environment": {"device": "NVIDIA H100", "torch": "2.14"},
        "parts": {
            "step": {"state": "ok", "seconds": 1.0, "rows": rows},
            "kernels": {"state": "ok", "seconds": 1.0, "rows": [], "kernels": sites},
            "traverse": {"state": "ok", "seconds": 9.0, "rows": [], "run": run},
            "tune": {"state": "ok", "seconds": 1.0, "rows": tune},
        },
    }
    text = gpu_hour.tables(record)
    for cell in ("NVIDIA H100", "18.2", "attention 4096x4096 8x40", "| traverse | 4.5 | 275 |", "31.5", "split8"):
        assert cell in text
    assert text.count("split8") == 1  # the later row of a site has what the earlier one had
    assert "## Block sizes that failed\n\n    forward d40 1x1: error" in text


def test_every_part_has_a_bound_and_all_of_them_fit_an_hour(tmp_path):
    listed = gpu_hour.parts(tmp_path, dry=False)
    assert len({part.name for part in listed}) == len(listed) >= 9
    assert all(0 < part.minutes < 10 for part in listed)
    assert sum(part.minutes for part in listed) < 60
    assert {part.name for part in gpu_hour.parts(tmp_path, dry=True)} == {part.name for part in listed}


def test_without_a_gpu_it_says_so_and_an_unknown_part_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["bench", "gpu", "--out", str(tmp_path)]) == 2
    assert "no CUDA GPU that torch can use here; --dry-run takes the same steps" in capsys.readouterr().err
    assert cli.main(["bench", "gpu", "--dry-run", "--only", "step,nonsense", "--out", str(tmp_path)]) == 2
    assert "--only: got nonsense, expected some of doctor, agree, step, kernels" in capsys.readouterr().err


def test_the_command_ends_with_what_was_wrong(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu_hour, "parts", lambda out, dry: [script("a", "pass"), script("b", "raise SystemExit(3)")])
    assert cli.main(["bench", "gpu", "--dry-run", "--out", str(tmp_path)]) == 2
    said = capsys.readouterr()
    assert "results.md" in said.out
    assert "1 parts not all right: b: exit status 3" in said.err


@pytest.mark.parametrize("name", ["tune", "weights"])
def test_parts_print_a_json_object_a_line(name, tmp_path, capsys):
    assert cli.main(["bench", "gpu", "--dry-run", "--part", name, "--out", str(tmp_path)]) == 0
    rows = list(gpu_hour.rows(capsys.readouterr().out))
    assert len(rows) == 1
    assert "candidates" in rows[0] or rows[0]["gigabytes"] > 0


def test_candidates_hold_what_is_shipped_first():
    from ldm_kernels.attention import CONFIGURATIONS
    from ldm_kernels.configurations import SM90

    tried = {str(c) for c in gpu_tuning.candidates()}
    for kernel in ("forward", "dq"):
        for width in gpu_tuning.LENGTHS:
            first = next(c for c in CONFIGURATIONS if (c.kernel, c.width) == (kernel, width) and SM90 in c.capabilities)
            assert str(first) in tried | {"dq d160 64x32 w4 s2 split"}
    assert command.OWN.keys() == {"agree", "step", "tune", "weights"}


@pytest.mark.parametrize(
    ("kernel", "layout"), [("forward", "split8"), ("forward", "box"), ("dq", "split"), ("dkdv", "split")]
)
def test_a_candidate_is_timed_only_if_it_is_right(kernel, layout, monkeypatch):
    from ldm_kernels import attention
    from ldm_kernels.configurations import Configuration

    c = Configuration(40, kernel, 32, 32, 4, 2, (80,), layout)
    gpu_tuning.require_right(c, "cpu", n=64)
    right = attention.launch

    def one_tile_short(kernel, c, causal, tensors, views):
        right(kernel, c, causal, tensors, [*views[:1], *(x[:, :-32] for x in views[1:3]), *views[3:]])

    monkeypatch.setattr(attention, "launch", one_tile_short)
    with pytest.raises(ValueError, match=r"error .* allowed"):
        gpu_tuning.require_right(c, "cpu", n=64)


def test_what_no_gpu_has_run_is_timed_last():
    layouts = [c.layout == "box" for c in gpu_tuning.candidates()]
    assert layouts == sorted(layouts)
    assert any(layouts)


def test_a_product_with_geglu_is_timed_only_if_it_is_right(monkeypatch):
    from ldm_kernels import geglu_product

    c = geglu_product.Tiles(32, 32, 16, 4, 2, (80,))
    inputs = gpu_tuning.product_inputs(40, 128, "cpu")
    gpu_tuning.require_right_product(c, *inputs)
    right = geglu_product.launch_forward
    monkeypatch.setattr(geglu_product, "launch_forward", lambda x, weight, bias, c: right(x, weight, 0 * bias, c))
    with pytest.raises(ValueError, match=r"error .* allowed"):
        gpu_tuning.require_right_product(c, *inputs)


def test_a_tuned_site_lists_what_is_right_and_says_why_others_are_not(monkeypatch):
    from ldm_kernels import geglu_product
    from ldm_kernels.configurations import Configuration

    from ldm.bench.kernel_sites import Site

    def small(kernel, own, layout):
        return Configuration(40, kernel, own, 16, 4, 2, (80, 90), layout)

    work, inputs, right = gpu_tuning._work, gpu_tuning.product_inputs, gpu_tuning.require_right
    stand_ins = {
        "candidates": lambda: [small("forward", 32, "split8"), small("dq", 24, "split"), small("forward", 16, "box")],
        "_work": lambda c, n, batch=2, heads=8, device="": work(c, n, 1, 2, "cpu"),
        "require_right": lambda c: right(c, "cpu", n=32),
        "product_inputs": lambda rows, channels, device: inputs(rows, channels, "cpu"),
        "gpu_ms": lambda call, rounds: [call() is None or 0.5] * 3,
        "sites": lambda: [Site("geglu", (20, 32), 1), Site("add_layer_norm", (4, 16), 1)],
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(gpu_tuning, name, stand_in)
    monkeypatch.setitem(gpu_tuning.LENGTHS, 40, 48)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(geglu_product, "CANDIDATES", [geglu_product.Tiles(32, 16, 16, 4, 2, (c,)) for c in (80, 90)])
    forward, dq, product, with_descriptors = gpu_tuning.tune(dry=False)
    assert [row["candidate"] for row in forward["best"]] == ["forward d40 32x16 w4 s2 split8"]
    assert dq["best"] == []
    assert dq["failed"][0].startswith("dq d40 24x16 w4 s2 split: ")
    assert [(row["candidate"], row["shipped"]) for row in product["best"]] == [
        ("geglu_product 32x16x16 w4 s2", False),
        (gpu_tuning.PAIR, True),
    ]
    assert [row["candidate"] for row in with_descriptors["best"]] == [
        "forward d40 16x16 w4 s2 box",
        "forward d40 32x16 w4 s2 split8",
    ]
    assert forward["failed"] == product["failed"] == with_descriptors["failed"] == []
