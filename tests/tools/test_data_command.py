"""`ldm data`: what it prints for both data sets, and how it ends on folders that are none."""

import json

import numpy as np
import pytest
from ldm_tools.cli import main
from lookalikes import chexpert, isic, many_radiographs, picture, radiograph, write_inferred

from ldm.data import folders, traps
from ldm.data import isic as isic_reader


@pytest.fixture
def chest(tmp_path):
    """90 images of 30 patients."""
    return chexpert(tmp_path / "chest", many_radiographs(30))


@pytest.fixture
def skin(tmp_path):
    """120 images; every ink shows a ruler too, and the last ten are not annotated."""
    diagnoses = {f"ISIC_{i:07d}": "MEL" if i % 3 == 0 else "NV" for i in range(120)}
    lesions = {name: f"L{i // 2}" for i, name in enumerate(diagnoses)}
    inferred = {
        name: {"ink": 0.95 * (i % 5 == 0), "ruler": 0.95 * (i % 5 == 0 or i % 9 == 1), "dark_corner": 0.95 * (i % 2)}
        for i, name in enumerate(diagnoses)
        if i < 110
    }
    return isic(tmp_path / "skin", diagnoses, lesions, inferred)


def run(capsys, *arguments: object) -> str:
    assert main(["data", *map(str, arguments)]) == 0
    return capsys.readouterr().out


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("split", ["grouped", "paper"])
def test_json_is_the_counts_and_nothing_else(capsys, chest, split):
    parts = json.loads(run(capsys, chest, "--split", split, "--json"))
    assert list(parts) == ["train", "validation", "test"]
    for counts in parts.values():
        assert list(counts) == ["images", "Pleural Effusion", "Support Devices"]
    totals = {name: sum(counts[name] for counts in parts.values()) for name in parts["train"]}
    assert totals == {"images": 90, "Pleural Effusion": 45, "Support Devices": 30}
    if split == "paper":
        assert [counts["images"] for counts in parts.values()] == [64, 12, 14]  # ceil(.15 * 90), ceil(.15 * 76)


def test_json_of_isic(capsys, skin, tmp_path):
    parts = json.loads(run(capsys, skin, "--split", "paper", "--json"))
    assert list(parts["test"]) == ["images", "MEL", "NV", "hair", "gel_bubble", "ruler", "ink"]
    assert [counts["images"] for counts in parts.values()] == [79, 14, 17]  # of the 110 that are annotated
    other = write_inferred(tmp_path / "other.csv", {f"ISIC_{i:07d}": {"hair": 0.6} for i in range(40)})
    parts = json.loads(run(capsys, skin, "--artifacts", other, "--threshold", 0.6, "--split", "paper", "--json"))
    assert sum(counts["hair"] for counts in parts.values()) == 40


def test_policies_are_options(capsys, tmp_path):
    rows = many_radiographs(20)
    rows[0]["Pleural Effusion"] = -1.0
    rows[0]["Edema"] = 1.0
    lateral = "CheXpert-v1.0-small/train/patient00001/study1/view2_lateral.jpg"
    chest = chexpert(tmp_path, [*rows, radiograph(lateral)])

    def total(name, *options):
        parts = json.loads(run(capsys, chest, "--json", *options))
        return sum(counts[name] for counts in parts.values())

    assert total("Pleural Effusion") == total("Pleural Effusion", "--uncertain", "zeros") + 1
    assert total("images", "--all-views") == 61
    assert total("Edema", "--attributes", "edema,support_devices") == 1


def test_a_split_is_saved_and_used_again(capsys, chest, tmp_path):
    file = tmp_path / "split.csv"
    first = run(capsys, chest, "--seed", 3, "--save-split", file, "--json")
    assert json.loads(run(capsys, chest, "--split", file, "--json")) == json.loads(first)
    assert json.loads(run(capsys, chest, "--json")) != json.loads(first)


# ---------------------------------------------------------------- text


def test_rows_with_their_captions(capsys, chest):
    out = run(capsys, chest, "--show", 2, "--row", 90)
    assert "row 1  train/patient00001/study1/view1_frontal.jpg  (patient patient00001)" in out
    assert "row 2  train/patient00001/study2/view1_frontal.jpg" in out
    assert "row 3  " not in out
    assert "row 90  train/patient00030/study3/view1_frontal.jpg" in out
    assert "Pleural Effusion 1, Support Devices 1" in out
    assert "\n  Chest X-ray of a subject with Pleural Effusion" in out
    assert "\n  Chest X-ray showing Pleural Effusion" in run(capsys, chest, "--row", 2, "--template", "code")


def test_the_description(capsys, chest):
    picture(chest / "train/patient00001/study1/view1_frontal.jpg")
    out = run(capsys, chest)
    assert "90 images of 30 patients" in out
    assert "image files: 1 of 90 looked for are there" in out
    assert "Normal chest X-ray with no significant findings" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["Pleural", "Effusion", "45", "45", "0"] in lines  # present, absent, unknown
    assert "leaks" not in out


def test_a_single_patient_is_described_but_not_split(capsys, tmp_path):
    chest = chexpert(tmp_path, many_radiographs(1))
    out = run(capsys, chest, "--show", 1)
    assert "row 1  train/patient00001" in out
    assert "warning: no split: fractions: 1 groups are too few" in out
    assert main(["data", str(chest), "--json"]) == 2


def test_the_paper_split_warns(capsys, chest, skin):
    out = run(capsys, chest, "--split", "paper")
    assert "of the test images have their patient in train" in out
    assert "have their lesion in train" in run(capsys, skin, "--split", "paper")


def test_unknown_lesions_are_said(capsys, tmp_path):
    isic(tmp_path, {f"ISIC_{i:07d}": "NV" if i % 2 else "MEL" for i in range(20)})
    out = run(capsys, tmp_path)
    assert "20 images of unknown lesions" in out
    assert "warning: lesions are not known" in out
    assert "no artifact annotations" in out


def test_broken_images_are_named(capsys, chest):
    for row in many_radiographs(30):
        picture(chest / str(row["Path"]).removeprefix("CheXpert-v1.0-small/"))
    run(capsys, chest, "--scan")
    broken = chest / "train/patient00007/study1/view1_frontal.jpg"
    broken.write_bytes(b"no image")
    assert main(["data", str(chest), "--scan"]) == 2
    assert f"1 of 90 images cannot be read (max_bad is 0): {broken}: cannot identify" in capsys.readouterr().err
    run(capsys, chest, "--scan", "--max-bad", 1)


# ---------------------------------------------------------------- traps


def test_confounded_attributes(skin):
    images = isic_reader.read(skin)
    table = traps.cooccurrence(images)
    assert table.loc["ink", "ruler"] == 1.0
    assert table.loc["ruler", "ink"] == 22 / 32  # 22 of 110 show ink, and 10 more a ruler
    assert np.isnan(table.loc["hair", "ink"])  # no hair at all
    sentences = [sentence for sentence in traps.found(images) if "confounded" in sentence]
    assert sentences == [
        "ink and ruler are confounded: ruler is in 100% of the images with ink (22 of 22) and in 11% of the others"
    ]


def test_traps_of_isic(skin):
    found = traps.found(isic_reader.read(skin))
    assert any(sentence.startswith("10 images have no artifact annotation") for sentence in found)
    clean = [i for i in range(110) if i % 5 and i % 9 != 1]
    expected = f"{sum(i % 2 for i in clean)} of the {len(clean)} captions 'with no visible artifacts'"
    assert any(sentence.startswith(expected) for sentence in found)


def test_traps_of_chexpert(tmp_path):
    cells = [
        {"no_finding": 1.0, "support_devices": 1.0},
        {"no_finding": 1.0, "edema": 1.0},
        {"fracture": 1.0},
        {},
        {"edema": 1.0, "Age": 0, "Sex": "Unknown"},
    ]
    rows = [radiograph(f"train/patient{i:05d}/study1/view1_frontal.jpg", **c) for i, c in enumerate(cells)]
    found = "\n".join(traps.found(folders.read(chexpert(tmp_path, rows))))
    assert "1 captions contradict themselves or the labels" in found
    assert "2 images without a finding are captioned 'Chest X-ray of a subject with No Finding'" in found
    assert "1 of the 2 captions 'Normal chest X-ray with no significant findings'" in found
    assert "Age is 0 in 1 rows" in found
    assert "Sex is neither Male nor Female in 1 rows" in found
    assert "confounded" not in found


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--csv", "trian.csv"], "csv: no 'trian.csv'"),
        (["--attributes", "pleural_efusion"], "did you mean 'pleural_effusion'?"),
        (["--split", "gruoped"], "split: got 'gruoped', expected grouped, stratified, official, paper, or a csv file"),
        (["--row", "91"], "row: 91 is not among the 90 images"),
        (["--row", "0"], "row: 0 is not among the 90 images"),
        (["--show", "-1"], "show: got -1"),
        (["--artifacts", "x.csv"], "artifacts: annotations are of ISIC 2019"),
    ],
)
def test_bad_options_end_in_one_line(capsys, chest, arguments, complaint):
    assert main(["data", str(chest), *arguments]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        (
            ["df_chexpert_plus_240401.csv", "a.png"],
            "holds CheXpert Plus, which is not read; expected CheXpert (train.csv",
        ),
        (["chexbert_labels/findings_fixed.json"], "holds CheXpert Plus"),
        (["notes.txt", "b.txt"], "holds b.txt, notes.txt; expected CheXpert"),
        ([f"{i}.jpg" for i in range(9)], "0.jpg, 1.jpg, 2.jpg, 3.jpg, 4.jpg and 4 more; expected"),
        ([], "holds nothing; expected"),
        (["train.csv", "ISIC_2019_Training_GroundTruth.csv"], "holds both CheXpert and ISIC 2019"),
    ],
)
def test_folders_that_are_no_data_set(capsys, tmp_path, files, complaint):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert main(["data", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert complaint in captured.err
    assert captured.err.count("\n") == 1


def test_the_table_of_chexpert_plus(capsys, tmp_path):
    (tmp_path / "df_chexpert_plus_240401.csv").touch()
    assert main(["data", str(tmp_path), "--csv", "df_chexpert_plus_240401.csv"]) == 2
    assert "holds CheXpert Plus, which is not read" in capsys.readouterr().err


def test_a_file_and_nothing(capsys, tmp_path):
    (tmp_path / "train.csv").touch()
    assert main(["data", str(tmp_path / "train.csv")]) == 2
    assert "train.csv is a file; expected" in capsys.readouterr().err
    assert main(["data", str(tmp_path / "nowhere")]) == 2
    assert "nowhere is not there; expected" in capsys.readouterr().err
