"""`ldm classify` on folders of phantoms."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from classifier_training import SIZE
from ldm_tools import cli
from safetensors.torch import load_file

from ldm import checkpoint
from ldm.study import classifier

QUICK = ("--model", "test_efficientnet", "--size", str(SIZE), "--epochs", "1", "--batch", "16", "--from-scratch")


@pytest.fixture(scope="module")
def trained(skin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "skin.safetensors"
    assert cli.main(["classify", "train", str(skin), "--out", str(out), *QUICK]) == 0
    return out


def test_the_command_leaves_a_classifier_and_its_report(trained: Path) -> None:
    assert sorted(path.name for path in trained.parent.iterdir()) == ["skin.json", "skin.safetensors"]
    loaded = classifier.load(trained)
    assert loaded.attributes == ("melanoma", "hair", "gel_bubble", "ruler", "ink")
    assert loaded.input_size == SIZE
    report = loaded.report
    assert (report["data_set"], report["phantoms"], report["split"]) == ("isic", True, "grouped")
    assert report["imagenet_weights"] is False
    assert sum(report["images"].values()) == 120
    assert [row["attribute"] for row in report["test"]] == list(loaded.attributes)


def test_eval_repeats_the_report(trained: Path, skin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.json"
    assert cli.main(["classify", "eval", str(trained), str(skin), "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["scores"] == classifier.load(trained).report["test"]
    table = capsys.readouterr().out
    assert table.splitlines()[0] == "| attribute | n | positives | accuracy | F1 | AUROC | ECE |"
    assert len(table.splitlines()) == 2 + 5


def test_a_run_from_given_weights_kept_in_half_the_bytes(trained: Path, skin: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.safetensors"
    quick = [option for option in QUICK if option != "--from-scratch"]
    command = ["classify", "train", str(skin), "--out", str(out), *quick, "--start", str(trained), "--float16"]
    assert cli.main(command) == 0
    assert {value.dtype for value in load_file(out).values()} == {torch.float16, torch.int64}
    report = classifier.load(out).report
    assert report["training"]["start"] == checkpoint.sha256(trained)  # type: ignore[index]
    assert cli.main(["classify", "eval", str(out), str(skin), "--out", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["scores"] == report["test"]  # tested as it is read


def test_eval_of_some_attributes_on_all_images(trained: Path, skin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["classify", "eval", str(trained), str(skin), "--attributes", "ink", "melanoma", "--part", "all"]
    assert cli.main(command) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["| ink", "120"], ["| melanoma", "120"]]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command ends with."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return next(line for line in lines if line.startswith("ldm classify"))


def test_bad_input_is_one_line(
    trained: Path, skin: Path, chest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new.safetensors"
    assert "exists" in refused(capsys, "classify", "train", skin, "--out", trained)
    assert "did you mean 'hair'?" in refused(
        capsys, "classify", "train", skin, "--out", new, "--attributes", "hiar", *QUICK
    )
    assert "did you mean 'pleural_effusion'?" in refused(
        capsys, "classify", "train", chest, "--out", new, "--attributes", "plural_effusion", *QUICK
    )
    assert "got 'melanoma'; expected one of no_finding" in refused(capsys, "classify", "eval", trained, chest)
    assert "has no 'hiar'; did you mean 'hair'?" in refused(
        capsys, "classify", "eval", trained, skin, "--attributes", "hiar"
    )
    assert "NAME.safetensors" in refused(capsys, "classify", "train", skin, "--out", tmp_path / "new.bin")
    assert "--device: torch cannot use 'gpu'" in refused(capsys, "classify", "eval", trained, skin, "--device", "gpu")
    assert "--lr: got -1.0" in refused(capsys, "classify", "train", skin, "--out", new, "--lr", "-1")
    assert "did you mean 'mobilenetv3_small_050'?" in refused(
        capsys, "classify", "train", skin, "--out", new, *QUICK, "--model", "mobilenetv3_smal_050"
    )
    assert not new.exists()


def test_a_class_that_is_missing_is_one_line_before_any_training(
    skin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(skin, folder)
    file = folder / "isic_inferred_wocarcinoma.csv"
    header, *lines = file.read_text().splitlines()
    ink = header.split(",").index("ink")
    rows = [line.split(",") for line in lines]
    file.write_text("\n".join([header, *(",".join([*row[:ink], "0.1", *row[ink + 1 :]]) for row in rows)]) + "\n")
    line = refused(capsys, "classify", "train", folder, "--out", tmp_path / "x.safetensors", *QUICK)
    assert "attribute 'ink'" in line
    assert "0 positive" in line


def test_a_broken_image_is_named(skin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    shutil.copytree(skin, folder)
    broken = min((folder / "ISIC_2019_Training_Input").iterdir())
    broken.write_bytes(broken.read_bytes()[:200])
    out = tmp_path / "x.safetensors"
    assert broken.name in refused(capsys, "classify", "train", folder, "--out", out, *QUICK)
    assert cli.main(["classify", "train", str(folder), "--out", str(out), *QUICK, "--max-bad", "1"]) == 0
    assert sum(classifier.load(out).report["images"].values()) == 119
