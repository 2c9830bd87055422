"""What `ldm bench traverse --fast` measures: usual steps agree with themselves; no seed is measured twice."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm_tools import cli
from ldm_tools.bench import fast_traverse

import ldm
from ldm.bench import fast_traversal
from ldm.bench.fast_traversal import Comparison
from ldm.bench.rows import RowFile
from ldm.images import Pixels
from ldm.phantom.prompts import Cell
from ldm.study.evaluation.instruments import Instruments
from ldm.study.metrics import perceptual

CELL = Cell("skin", "Skin", "a lesion", {"hair": "a lesion with hair", "ink": "a lesion showing ink"})


class Judged(Instruments):
    """Two heads that look at the brightness of an image's halves."""

    @property
    def attributes(self) -> tuple[str, ...]:
        return ("hair", "ink")

    def probabilities(self, pixels: Pixels) -> torch.Tensor:
        halves = [pixels[:, :8].mean(axis=(1, 2, 3)), pixels[:, 8:].mean(axis=(1, 2, 3))]
        return torch.from_numpy(np.stack(halves, axis=1) / 255)


@pytest.fixture(scope="module")
def instruments(tiny: Path) -> Judged:
    sd = ldm.load(tiny)
    return Judged(sd, None, None, perceptual.Unavailable("not asked for", "nothing"))


def measured(instruments: Judged, how: dict, folder, seeds: Sequence[int] = (0, 1)) -> dict:
    comparison = Comparison(CELL, instruments, 2.0, how)
    file, rows = RowFile(folder / "fast.jsonl", {}, ("cell", "seed")), []
    fast_traversal.measure_all([comparison], seeds, file, rows.append)
    assert sum(rows) == len(seeds) * comparison.rows_a_seed
    found = [file[{"cell": CELL.name, "seed": seed}] for seed in seeds]
    return fast_traversal.summarise(comparison, found)


def test_the_usual_steps_by_other_name_agree_in_everything(instruments, tmp_path):
    summary = measured(instruments, {"sampler": "euler"}, tmp_path)  # DDIM's step
    assert summary["error"]["value"] < 1e-5
    for one in summary["attributes"].values():
        assert one["cosine"]["value"] == pytest.approx(1, abs=1e-3)
        assert one["length"]["value"] == pytest.approx(1, abs=1e-2)
        assert one["difference"]["own_head_abs"]["value"] == 0
    json.dumps(summary, allow_nan=False)


def test_fewer_questions_are_near_and_a_run_goes_on(instruments, tmp_path, monkeypatch):
    summary = measured(instruments, {"fast": True}, tmp_path)
    assert summary["error"]["value"] < 1e-5
    assert all(one["cosine"]["value"] < 1 - 1e-6 for one in summary["attributes"].values())
    assert summary["evaluations"] == {"fast": 110, "usual": 275}
    assert "hair" in fast_traverse.table({"skin": summary})

    def not_again(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr(Comparison, "measure", not_again)
    assert measured(instruments, {"fast": True}, tmp_path) == summary


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--fast", "--steps", "20"], "--steps: it does nothing beside --fast"),
        (["--fast", "--weights", "mine.safetensors"], "--weights: it does nothing beside --fast"),
        (["--seeds", "0-3"], "--seeds: it belongs to --fast"),
        (["--fast", "--cells", "nevos"], "--cells: got 'nevos'"),
    ],
)
def test_what_does_not_fit_is_one_line(options, message, capsys):
    assert cli.main(["bench", "traverse", *options]) == 2
    assert message in capsys.readouterr().err
