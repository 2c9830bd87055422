"""`ldm evaluate` as it is typed: a table of predictions alone, and one line for whatever does not fit."""

import argparse
import json
import logging
from pathlib import Path

import pytest
from ldm_tools import processes
from ldm_tools.cli import main
from ldm_tools.evaluate import command, options, tasks

from ldm.phantom.prompts import Cell
from ldm.pipeline import PHANTOM_WEIGHTS
from ldm.study import shipped
from ldm.study.classifier import PHANTOM_CLASSIFIERS
from ldm.study.evaluation.judges import Judge, choose
from ldm.study.evaluation.run import Task

CHEST = PHANTOM_CLASSIFIERS["chest"]
SHIPPED = list(dict.fromkeys(file for model in shipped.MODELS for file in model.classifiers.values()))

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


def test_without_an_attribute_every_one_is_reported(tmp_path, capsys):
    path = table(tmp_path / "p.csv", HAIR_ONLY, INK_MORE)
    assert main(["evaluate", "--predictions", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "CFRT of hair, mean of swap steps 5, 10, 15" in shown
    assert "CFRT of ink, mean of swap steps 5, 10, 15" in shown
    assert [line.split()[-4:] for line in shown.splitlines() if "own_head_signed" in line][1] == [
        *("0.50", "0.50", "0.50", "1.00"),  # hair by swap step: at s = 20 it rises in both
    ]


def test_a_table_does_not_replace_an_evaluation_nor_the_other_way_round(tmp_path, capsys):
    path, out = table(tmp_path / "p.csv", HAIR_ONLY), tmp_path / "out"
    out.mkdir()
    (out / "metrics.json").write_text('{"cells": {}}')
    assert main(["evaluate", "--predictions", str(path), "--attribute", "hair", "--out", str(out)]) == 2
    assert "is an evaluation, which this would replace; name another folder" in capsys.readouterr().err
    assert (out / "metrics.json").read_text() == '{"cells": {}}'
    (out / "metrics.json").write_text('{"cfrt": {}}')
    assert main(["evaluate", "--seeds", "0", "--out", str(out)]) == 2
    assert "is the report of a table, which this would replace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--attribute", "hiar"], "did you mean 'hair'?"),
        ([], "--attribute: missing; which one do the trajectories swap in? The table has hair, ink"),
        (["--attribute", "hair", "--swap-steps", "5,45"], "the table has [5, 10, 15, 20], not [45]"),
        (["--attribute", "hair", "RUN"], "expected one or the other"),
        (["--attribute", "hair", "--seeds", "0-3"], "--seeds: it does nothing beside --predictions"),
        (["--attribute", "hair", "--classifier", "c.safetensors"], "--classifier: it does nothing beside"),
        (["--attribute", "hair", "--processes", "2"], "--processes: it does nothing beside"),
        (["--attribute", "hair", "--swap-steps", ""], "--swap-steps: got ''"),
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
        (["nowhere", "--guidance", "9", "--out", "o"], "--guidance: it does nothing beside RUN"),
        (["--swap-steps", "7", "--out", "o"], "[7] are not among the trajectory's"),
        (["--steps", "20", "--swap-steps", "15", "--out", "o"], "[15] are not among the trajectory's"),
        (["--steps", "20", "--sampled-swap-steps", "2,25", "--out", "o"], "expected a swap after 0..20 steps"),
        (["--map", "effusion=pleural_effusion", "--out", "o"], "--map: it belongs to a RUN"),
        (["--shown-seeds", "0", "--out", "o"], "--shown-seeds: got 0"),
        (["--threads", "0", "--out", "o"], "--threads: got 0"),
        (["--processes", "0", "--out", "o"], "--processes: got 0"),
        (["--truth-swap-steps", "10,15", "--out", "o"], "expected [5, 10, 15] among them, missing [5]"),
        (["--seeds", "0", "--baseline-seeds", "1", "--out", "o"], "expected two or more"),
        (["--classifier", str(CHEST), "--seeds", "0-1", "--out", "o"], "the classifier has no 'hair'"),
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


def test_a_file_is_no_folder_to_write_to(tmp_path, capsys):
    out = tmp_path / "o"
    out.write_text("mine")
    assert main(["evaluate", "--seeds", "0-1", "--out", str(out)]) == 2
    assert "o is a file, expected a folder" in capsys.readouterr().err  # and no model was loaded for it
    assert out.read_text() == "mine"


def test_processes_are_started_by_one_of_two(tmp_path, capsys, monkeypatch):
    options = ["evaluate", "--processes", "2", "--cells", "nevvus", "--out", str(tmp_path / "o")]
    for started, complaint in (("2", "torchrun has started some already"), ("1", "did you mean 'nevus'?")):
        monkeypatch.setenv("WORLD_SIZE", started)  # 1: the only one, and some machines set it for every program
        assert main(options) == 2
        assert complaint in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    options.add_arguments(parser)
    return argparse.Namespace(**options.SAMPLED | vars(parser.parse_args(words)))


@pytest.mark.parametrize(
    ("words", "shared"),
    [
        (["--seeds", "0", "--processes", "2"], 1),  # a second one would load the models for nothing
        (["--seeds", "0-2", "--processes", "8"], 3),
        (["--seeds", "0-2", "--processes", "2"], 2),
        (["--seeds", "0", "--truth-seeds", "3", "--processes", "8"], 3),
        (["--seeds", "0-6"], 1),
        (["--seeds", "0-7"], 2),
        (["--seeds", "0-399"], 4),
    ],
)
def test_no_more_processes_than_have_something_to_do(words, shared, monkeypatch, caplog):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setattr(processes, "of_this_machine", lambda: 4)
    args = parsed(*words, "--cells", "chest", "--device", "cpu")
    caplog.set_level(logging.INFO)
    found = command.processes_for(args, tasks.sampled_tasks(args, None), {PHANTOM_WEIGHTS})
    assert found == shared
    assert ("would have nothing to do" in caplog.text) == (args.processes is not None and shared < args.processes)


def test_fewer_steps_have_the_same_shares_of_swaps():
    (few,) = tasks.sampled_tasks(parsed("--steps", "10", "--cells", "chest", "--seeds", "0-1"), None)
    assert few.plan.swap_steps == (1, 2, 3, 4, 5, 6, 7, 8, 9)
    assert few.averaged == (1, 2, 3)
    assert few.truth_swap_steps == (1, 2, 3, 5, 7)
    (many,) = tasks.sampled_tasks(parsed("--steps", "100", "--cells", "chest"), None)
    assert many.plan.swap_steps == tuple(range(5, 50, 5))  # where the authors' fit they are taken
    (own,) = tasks.sampled_tasks(parsed("--sampled-swap-steps", "4,8", "--cells", "chest"), (4,))
    assert (own.plan.swap_steps, own.averaged) == ((4, 8), (4,))
    (half,) = tasks.sampled_tasks(parsed("--sampled-swap-steps", "4,8,40", "--cells", "chest"), None)
    assert half.averaged == (4, 8)


def test_every_cell_is_sampled_at_its_models_guidance_unless_told():
    own = {task.cell.name: task.plan.guidance for task in tasks.sampled_tasks(parsed(), None)}
    assert own == {name: shipped.model_of(name).guidance for name in shipped.CELLS}
    assert {task.plan.guidance for task in tasks.sampled_tasks(parsed("--guidance", "2"), None)} == {2.0}


@pytest.mark.parametrize(
    ("swap_steps", "averaged"), [((5, 10, 15, 40), (5, 10, 15)), ((2, 6, 8), (2, 6)), ((9, 12), (9,))]
)
def test_a_run_is_scored_by_its_own_early_swaps(tmp_path, swap_steps, averaged, caplog):
    """Of its 20 steps, those up to 6, as 15 is of 50; the authors' where it has them."""
    written = {"seeds": [0], "steps": 20, "guidance": 1.0, "negative": "", "eta": 0.0, "latent_size": [16, 16]}
    written |= {"neutral": "a", "styles": {"x": "b"}, "swap_steps": swap_steps, "indexing": "steps"}
    (tmp_path / "run.json").write_text(json.dumps(written | {"bezier_points": 3}))
    (tmp_path / "latents.safetensors").touch()
    if 40 in swap_steps:
        (tmp_path / "run.json").write_text(json.dumps(written | {"bezier_points": 3, "steps": 50}))
    assert tasks.task_of_run(tmp_path, None).averaged == averaged
    assert ("--swap-steps names others" in caplog.text) == (40 not in swap_steps)


def test_the_judge_of_a_run():
    assert choose(("pleural_effusion",), SHIPPED, {}) == Judge(CHEST, {"pleural_effusion": "pleural_effusion"})
    mapped = choose(("water", "support_devices"), SHIPPED, {"water": "pleural_effusion"})
    assert mapped == Judge(CHEST, {"water": "pleural_effusion", "support_devices": "support_devices"})
    some = choose(("effusion", "support_devices"), SHIPPED, {})
    assert (some.file, dict(some.styles)) == (CHEST, {"support_devices": "support_devices"})
    assert some.lacking.startswith("effusion: no CFRT, flip rate and probabilities, for a shipped classifier has no")
    nobody = choose(("glasses",), SHIPPED, {})
    assert (nobody.file, nobody.styles) == (None, {})


@pytest.mark.parametrize(
    ("given", "arguments", "complaint"),
    [
        (True, (("hair",), [CHEST], {}), "the classifier has no 'hair'; it has .*--map STYLE=ATTRIBUTE"),
        (False, (("hair",), SHIPPED, {"hiar": "hair"}), "--map: no style 'hiar'; did you mean 'hair'"),
        (False, (("x",), SHIPPED, {"x": "hiar"}), "--map: no classifier has 'hiar'; did you mean 'hair'"),
    ],
)
def test_judges_that_do_not_fit(given, arguments, complaint):
    with pytest.raises(ValueError, match=complaint):
        choose(*arguments, given=given)


def test_a_run_of_the_real_model_is_judged_by_its_classifier():
    """Both skin classifiers know hair: that of the model whose images they are goes first."""
    run = Task(
        cell=Cell("x", "x", "", {}), plan=tasks.sampled_tasks(parsed("--cells", "nevus"), None)[0].plan, run=Path()
    )
    for weights, name in ((shipped.REAL.weights, "real_skin_classifier"), (Path("own.safetensors"), "skin_classifier")):
        files = tasks.classifiers_for(run, parsed(), weights)
        assert choose(("hair",), files, {}).file.stem == name


def test_every_cell_is_sampled_by_the_model_that_it_belongs_to():
    sampled = tasks.sampled_tasks(parsed(), None)
    assert [task.cell.name for task in sampled] == ["chest", "melanoma", "nevus", "real_melanoma", "real_nevus"]
    weights = [tasks.weights_for(task, parsed()).name for task in sampled]
    assert weights == ["phantom.safetensors"] * 3 + ["real.safetensors"] * 2
    assert [task.truth_seeds for task in sampled] == [16, 16, 16, 0, 0]  # nobody knows a real lesion's counterfactual
    for model in shipped.MODELS:
        given = parsed("--weights", str(model.weights))
        assert [task.cell.name for task in tasks.sampled_tasks(given, None)] == list(model.cells)


def test_what_was_not_typed_fits_what_was():
    one = tasks.sampled_tasks(parsed("--seeds", "3"), (5, 20))
    assert {task.baseline_seeds for task in one} == {0}  # no other seeds to take a mean over
    assert {task.truth_swap_steps for task in one} == {(5, 10, 15, 20, 25, 35)}
    (many,) = tasks.sampled_tasks(parsed("--seeds", "0-19", "--cells", "nevus"), (5, 10, 15))
    assert (many.baseline_seeds, many.truth_seeds, many.truth_swap_steps) == (8, 20, (5, 10, 15, 25, 35))
