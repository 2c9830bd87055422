"""`ldm evaluate` as it is typed: a table of predictions alone, and one line for whatever does not fit."""

import json
from pathlib import Path

import pytest

from tools.cli import main

STEPS = (5, 10, 15, 20)
HEADER = ",".join(["seed", "path", *(f"{s}_{a}" for a in ("hair", "ink") for s in ("neutral", *STEPS))])


def table(path: Path, *rows: str, header: str = HEADER) -> Path:
    path.write_text("\n".join([header, *rows]) + "\n")
    return path


def row(seed: int, hair: list, ink: list) -> str:
    return ",".join(map(str, [seed, f"{seed}.png", *hair, *ink]))


HAIR_ONLY = row(0, [0.1, 0.9, 0.8, 0.7, 0.2], [0.1, 0.2, 0.1, 0.1, 0.1])  # d = 0.7 and 0.033
INK_MORE = row(1, [0.1, 0.3, 0.3, 0.3, 0.9], [0.1, 0.9, 0.9, 0.9, 0.1])
A_TIE = row(2, [0.1, 0.4, 0.4, 0.4, 0.4], [0.2, 0.5, 0.5, 0.5, 0.5])
A_HOLE = row(3, [0.1, "nan", 0.4, 0.4, 0.4], [0.2, 0.5, 0.5, 0.5, 0.5])


def test_a_table_alone_gives_the_report(tmp_path, capsys):
    path = table(tmp_path / "p.csv", HAIR_ONLY, INK_MORE, A_TIE, A_HOLE)
    out = tmp_path / "out"
    assert main(["evaluate", "--predictions", str(path), "--attribute", "hair", "--out", str(out)]) == 0
    scores = json.loads((out / "metrics.json").read_text())
    signed = scores["cfrt"]["own_head_signed"]
    assert (signed["value"], signed["n"], signed["ties"], signed["dropped"]) == (pytest.approx(1 / 3), 3, 1, 1)
    assert signed["interval"][0] < 1 / 3 < signed["interval"][1]
    assert scores["cfrt"]["single_f"]["value"] is None
    assert "CFRT of hair, mean of swap steps 5, 10, 15" in capsys.readouterr().out


def test_the_averaged_columns_can_be_chosen(tmp_path):
    path = table(tmp_path / "p.csv", HAIR_ONLY, INK_MORE)
    command = ["evaluate", "--predictions", str(path), "--attribute", "hair", "--swap-steps", "20"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    scores = json.loads((tmp_path / "out/metrics.json").read_text())
    assert scores["cfrt"]["own_head_signed"]["value"] == 1.0  # at s = 20 hair rises in both, ink in neither


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--attribute", "hiar"], "did you mean 'hair'?"),
        ([], "--attribute: missing; which one do the trajectories swap in? The table has hair, ink"),
        (["--attribute", "hair", "--swap-steps", "5,45"], "the table has [5, 10, 15, 20], not [45]"),
        (["--attribute", "hair", "RUN"], "expected one or the other"),
    ],
)
def test_what_a_table_cannot_answer_is_said_in_one_line(tmp_path, capsys, options, complaint):
    path = table(tmp_path / "p.csv", HAIR_ONLY)
    out = tmp_path / "out"
    assert main(["evaluate", "--predictions", str(path), "--out", str(out), *options]) == 2
    message = capsys.readouterr().err
    assert complaint in message
    assert message.count("\n") == 1
    assert not out.exists()


def test_rows_that_do_not_fit_are_named_by_line(tmp_path, capsys):
    path = table(tmp_path / "p.csv", HAIR_ONLY, "1,x", row(2, [0.1, 1.2, 0, 0, 0], [0] * 5))
    assert main(["evaluate", "--predictions", str(path), "--attribute", "hair"]) == 2
    message = capsys.readouterr().err
    assert "line 3" in message
    assert "line 4" in message
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--cells", "nevvus", "--out", "o"], "did you mean 'nevus'?"),
        (["--seeds", "0-3"], "--out: missing"),
        (["--attribute", "hair", "--out", "o"], "it belongs to --predictions"),
        (["nowhere", "--out", "o"], "expected a finished traversal"),
        (["--swap-steps", "7", "--out", "o"], "[7] are not among the trajectory's"),
        (["--steps", "20", "--out", "o"], "expected a swap after 0..20 steps"),
        (["--shown-seeds", "0", "--out", "o"], "--shown-seeds: got 0"),
        (["--classifier", "none.safetensors", "--seeds", "0-1", "--out", "o"], "none.safetensors: no such file"),
    ],
)
def test_bad_options_are_one_line_and_write_nothing(tmp_path, capsys, monkeypatch, options, complaint):
    monkeypatch.chdir(tmp_path)
    assert main(["evaluate", *options]) == 2
    message = capsys.readouterr().err
    assert complaint in message
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
