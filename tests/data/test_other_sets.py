"""Data sets other than the paper's two, each in the files that its hospital or archive hands out, oddities and all."""

import re
from pathlib import Path

import lookalikes
import numpy as np
import pytest
from PIL import Image

from ldm.data import captions, folders, splits
from ldm.data.images import load_image
from ldm.data.reading import Reading
from ldm.data.table import Columns

MAKERS = {
    "isic2018": lookalikes.isic2018,
    "isic2020": lookalikes.isic2020,
    "ham10000": lookalikes.ham10000,
    "mimic": lookalikes.mimic,
    "nih": lookalikes.nih,
    "padchest": lookalikes.padchest,
    "vindr": lookalikes.vindr,
}


@pytest.mark.parametrize("name", MAKERS)
def test_each_is_recognised_and_its_files_are_found(tmp_path, name):
    images = folders.read(MAKERS[name](tmp_path))
    assert images.name == name == folders.recognise(tmp_path)
    assert [file for file in images.files if not Path(file).is_file()] == []
    assert len(set(images.keys)) == len(images) == len(images.captions())
    assert images.labels.shape == (len(images), len(images.attributes))
    assert images.kind in ("chest", "skin")
    assert all(isinstance(prompt, str) for prompt in images.prompts())


@pytest.mark.parametrize("name", MAKERS)
def test_images_need_not_exist(tmp_path, name):
    folder = MAKERS[name](tmp_path)
    for path in folder.rglob("*"):
        if path.suffix.lower() in (".png", ".jpg"):
            path.unlink()
    assert all(Path(file).suffix for file in folders.read(folder).files)


@pytest.mark.parametrize("name", MAKERS)
def test_an_unknown_attribute_offers_the_nearest(tmp_path, name):
    near = "melanom" if folders.read(MAKERS[name](tmp_path)).kind == "skin" else "pleural_efusion"
    with pytest.raises(ValueError, match=f"attributes: got '{near}'; did you mean"):
        folders.read(tmp_path, attributes=[near])


# ---------------------------------------------------------------- skin


def test_isic_2018_has_akiec(tmp_path):
    folder = lookalikes.isic2018(tmp_path)
    images = folders.read(folder)
    assert images.keys.tolist() == ["ISIC_0024306", "ISIC_0024307", "ISIC_0024309"]
    assert images.groups.tolist() == ["HAM_0", "HAM_0", "HAM_1"]
    assert images.files[1].endswith("ISIC_0024307.png")
    assert images.notes[0].startswith("1 of 4 images are neither MEL nor NV")
    everything = folders.read(folder, diagnoses=("MEL", "NV", "AKIEC"))
    assert everything.captions()[2] == "a dermoscopic image with actinic keratosis or Bowen's disease (AKIEC)"
    assert everything.counts() == {"MEL": 1, "NV": 2, "AKIEC": 1}
    with pytest.raises(ValueError, match="diagnoses: got 'SCC'"):
        folders.read(folder, diagnoses=("SCC",))


def test_isic_2020_has_patients_and_unknown_benign_images(tmp_path):
    images = folders.read(lookalikes.isic2020(tmp_path))
    assert images.keys.tolist() == ["ISIC_0015710", "ISIC_0015711", "ISIC_0015714"]
    assert images.labels[:, 0].tolist() == [1, 0, 0]
    assert images.groups.tolist() == ["IP_0", "IP_0", "IP_2"]
    assert images.group_kind == "patient"
    assert images.notes[0].startswith("2 of 5 images are neither MEL nor NV")
    assert "BKL" in folders.read(tmp_path, diagnoses=("BKL",)).captions()[0]


def test_isic_2020_with_a_contradiction(tmp_path):
    path = lookalikes.isic2020(tmp_path) / "train.csv"
    path.write_bytes(path.read_bytes().replace(b"nevus,x,0", b"nevus,x,1", 1))
    with pytest.raises(ValueError, match="line 3: target is 1 and diagnosis 'nevus'"):
        folders.read(tmp_path)


def test_ham10000(tmp_path):
    images = folders.read(lookalikes.ham10000(tmp_path))
    assert images.keys.tolist() == ["ISIC_0027411", "ISIC_0027412", "ISIC_0027413"]
    assert images.groups.tolist() == ["HAM_0", "HAM_1", "HAM_1"]
    assert [Path(file).suffix for file in images.files] == [".jpg", ".jpg", ".JPG"]
    assert images.captions()[2] == captions.ISIC_NEUTRAL["MEL"]


def test_artifacts_go_with_every_set_of_the_archive(tmp_path):
    rows = [{"image": "ISIC_0027413.png", "hair": 1, "gel_bubble": 0, "ruler": 1, "ink": 0}]
    file = lookalikes.write_csv(tmp_path / "isic_bias.csv", tuple(rows[0]), rows, separator=";")
    images = folders.read(lookalikes.ham10000(tmp_path))
    assert images.attributes == ("melanoma", "hair", "gel_bubble", "ruler", "ink")
    assert images.captions()[2].endswith("(MEL) showing hair, ruler")
    assert any(str(file) in note for note in images.notes)


# ---------------------------------------------------------------- chests


def test_mimic_joins_three_tables(tmp_path):
    images = folders.read(lookalikes.mimic(tmp_path))
    assert images.keys.tolist() == [
        "p10/p10000032/s50414267/02aa804e-bde0afdd",
        "p10/p10000764/s57375967/096052b7-d256dc40",
    ]
    assert images.groups.tolist() == ["p10000032", "p10000764"]
    assert images.labels.tolist() == [[1, 1], [0, 0]]
    assert images.frame["split"].tolist() == ["train", "validation"]
    parts = {name: rows.tolist() for name, rows in splits.official(images).parts().items()}
    assert parts == {"train": [0], "validation": [1], "test": []}
    assert images.captions()[1] == "Chest X-ray of a subject with No Finding"
    assert images.notes[0].startswith("2 of 4 images have no labels or no frontal view")
    assert len(folders.read(tmp_path, frontal_only=False)) == 3
    ignored = folders.read(tmp_path, uncertain="ignore", empty="mask")
    assert np.isnan(ignored.labels).tolist() == [[False, True], [True, True]]


def test_mimic_without_its_metadata(tmp_path):
    (lookalikes.mimic(tmp_path) / "mimic-cxr-2.0.0-metadata.csv.gz").unlink()
    with pytest.raises(ValueError, match=r"has no mimic-cxr-\*-metadata\.csv"):
        folders.read(tmp_path)


def test_nih_has_pipes(tmp_path):
    images = folders.read(lookalikes.nih(tmp_path), attributes=("pleural_effusion", "hernia"))
    assert images.labels.tolist() == [[0, 0], [1, 0], [0, 0], [0, 1]]
    assert images.groups.tolist() == ["patient00000001", "patient00000001", "patient00000002", "patient00000003"]
    assert images.captions().tolist()[1:] == [
        "Chest X-ray of a subject with Cardiomegaly, Pleural Effusion",
        captions.CHEXPERT_NEUTRAL,
        "Chest X-ray of a subject with Pleural Thickening, Hernia",
    ]
    assert images.counts() == {"Effusion": 1, "Hernia": 1}


def test_nih_has_an_official_split(tmp_path):
    with pytest.raises(ValueError, match="holds no official split of nih"):
        splits.official(folders.read(lookalikes.nih(tmp_path)))
    (tmp_path / "train_val_list.txt").write_text("00000001_000.png\n00000001_001.png\n00000003_000.png\n")
    (tmp_path / "test_list.txt").write_text("00000002_000.png\n")
    split = splits.official(folders.read(tmp_path))
    assert (split.train.tolist(), split.validation.tolist(), split.test.tolist()) == ([0, 1, 3], [], [2])


def test_nih_with_a_label_that_is_none(tmp_path):
    path = lookalikes.nih(tmp_path) / "Data_Entry_2017.csv"
    path.write_text(path.read_text().replace("Cardiomegaly|Effusion", "Cardiomegaly|Efusion"))
    with pytest.raises(ValueError, match="line 3: Finding Labels: got 'Efusion'; did you mean 'Effusion'"):
        folders.read(tmp_path)


def test_padchest_has_lists(tmp_path):
    images = folders.read(lookalikes.padchest(tmp_path))
    assert images.keys.tolist() == ["2168_0.png", "2168_2.png", "2168_3.png"]
    assert images.attributes == ("pleural_effusion", "cardiomegaly")
    assert images.labels.tolist() == [[1, 1], [0, 1], [0, 0]]
    assert images.captions()[0] == "Chest X-ray of a subject with cardiomegaly, pleural effusion"
    assert images.captions()[2] == captions.CHEXPERT_NEUTRAL
    assert images.notes[0].startswith("3 of 6 images are excluded")
    assert folders.read(tmp_path, attributes=["pacemaker"]).labels.tolist() == [[0], [1], [0]]
    assert len(folders.read(tmp_path, frontal_only=False)) == 4


def test_vindr_counts_votes(tmp_path):
    images = folders.read(lookalikes.vindr(tmp_path), attributes=("pleural_effusion", "aortic_enlargement"))
    assert images.labels.tolist() == [[1, 0], [0, 0]]
    assert images.captions().tolist() == ["Chest X-ray of a subject with Pleural Effusion", captions.CHEXPERT_NEUTRAL]
    assert images.group_kind == ""
    assert "more than half of 3.0 radiologists" in images.notes[0]


def test_vindr_as_kaggle_has_it(tmp_path):
    columns = ("image_id", "class_name", "class_id", "rad_id", "x_min", "y_min", "x_max", "y_max")
    boxes = [("bb", "No finding", "R1"), ("bb", "No finding", "R2"), ("aa", "Cardiomegaly", "R1")]
    boxes += [("aa", "Cardiomegaly", "R2"), ("aa", "Pleural effusion", "R1"), ("aa", "ILD", "R3")]
    rows = [{"image_id": image, "class_name": name, "rad_id": rad} for image, name, rad in boxes]
    lookalikes.write_csv(tmp_path / "train.csv", columns, rows)
    images = folders.read(tmp_path)
    assert images.keys.tolist() == ["bb", "aa"]
    assert images.captions()[1] == "Chest X-ray of a subject with Cardiomegaly"


# ---------------------------------------------------------------- extensions


@pytest.mark.parametrize("extension", [".jpeg", ".JPG", ".png", ".tif", ".webp"])
def test_images_are_found_under_the_extension_that_they_have(tmp_path, extension):
    path = "train/patient00001/study1/view1_frontal"
    lookalikes.picture(tmp_path / f"{path}{extension}")
    lookalikes.chexpert(tmp_path, [lookalikes.radiograph(f"CheXpert-v1.0-small/{path}.jpg")])
    images = folders.read(tmp_path)
    assert images.files.tolist() == [str(tmp_path / f"{path}{extension}")]
    assert images.keys.tolist() == [f"{path}.jpg"]
    diagnoses = {"ISIC_0000000": "NV"}
    lookalikes.picture(
        lookalikes.isic(tmp_path / "skin", diagnoses) / f"ISIC_2019_Training_Input/ISIC_0000000{extension}"
    )
    assert folders.read(tmp_path / "skin").files[0].endswith(f"ISIC_0000000{extension}")


def test_a_copy_whose_table_names_png_files_has_the_same_keys(tmp_path):
    path = "train/patient00001/study1/view1_frontal"
    lookalikes.picture(tmp_path / f"{path}.png")
    images = folders.read(lookalikes.chexpert(tmp_path, [lookalikes.radiograph(f"{path}.png")]))
    assert images.files.tolist() == [str(tmp_path / f"{path}.png")]
    assert images.keys.tolist() == [f"{path}.jpg"]


# ---------------------------------------------------------------- a table of one's own


def test_a_table_as_excel_writes_it(tmp_path):
    folder = lookalikes.hospital(tmp_path)
    images = folders.read(folder, labels="table.csv")
    assert images.attributes == ("ergu",)  # the one column that holds yes and no alone
    assert images.labels[:, 0].tolist() == [1, 0, 1, 0]
    assert images.groups.tolist() == ["7", "7", "8", "9"]
    assert images.files[3] == str(folder / "a/4.png")
    assert images.captions()[1] == "a medical image"
    for word in (
        "Windows-1252",
        "'Bild' is taken for the column of files",
        "'patient_id' is taken",
        "labels are Erguß",
    ):
        assert any(word in note for note in images.notes)
    assert np.isnan(folders.read(folder, labels="table.csv", empty="mask").labels[3, 0])


def test_columns_of_words_become_labels(tmp_path):
    images = folders.read(
        lookalikes.hospital(tmp_path),
        labels=tmp_path / "table.csv",
        columns=Columns("Bild", ["device", "Erguß"], "patient_id"),
        caption="a chest film[ with {labels}], supine",
        empty="mask",
    )
    assert images.attributes == ("none", "pacemaker", "tube", "ergu")
    assert images.labels[:, 2].tolist()[0] == 1
    assert np.isnan(images.labels[1, :3]).all()  # an empty cell is unknown under this policy
    assert images.captions()[0] == "a chest film with pacemaker, tube, Erguß, supine"
    assert images.captions()[1] == "a chest film, supine"
    assert images.prompts()[0] == "a chest film, supine"
    assert not images.notes or all("taken for" not in note for note in images.notes)
    assert splits.grouped(images).test.size


def test_files_without_extensions_are_told_by_being_there(tmp_path):
    rows = [{"id": f"scans/IM{i}", "effusion": i % 2} for i in range(4)]
    lookalikes.write_csv(tmp_path / "t.csv", ("id", "effusion"), rows)
    for row in rows:
        lookalikes.picture(tmp_path / "scans/x.png").rename(tmp_path / str(row["id"]))
    images = folders.read(tmp_path, labels="t.csv")
    assert images.files.tolist() == [str(tmp_path / str(row["id"])) for row in rows]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"columns": Columns(file="Bidl")}, "file_column: got 'Bidl'; did you mean 'Bild'"),
        ({"columns": Columns(group="patient")}, "group_column: got 'patient'; did you mean 'patient_id'"),
        ({"columns": Columns(labels=["patient_id"])}, "label_columns: patient_id of .* holds 3 values"),
        ({"caption": "a film"}, "caption: got 'a film', expected {labels} once"),
        ({"caption": "a [film with {labels}"}, "caption: got"),
        ({"artifacts": "x.csv"}, "artifacts: annotations are of ISIC 2019"),
        ({"layout": "tree"}, "layout: a table of your own has no such option"),
        ({"labels": "tabel.csv"}, "tabel.csv is not there"),
        ({"labels": "table.xlsx"}, "is a spreadsheet"),
    ],
)
def test_tables_that_do_not_fit(tmp_path, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        folders.read(lookalikes.hospital(tmp_path), **{"labels": "table.csv", **options})


def test_options_of_a_table_without_one(tmp_path):
    with pytest.raises(ValueError, match="belong to --labels, which is missing"):
        folders.read(lookalikes.nih(tmp_path), caption="a film[ with {labels}]")
    with pytest.raises(ValueError, match="uncertain: NIH ChestX-ray14 has no such option; it has csv"):
        folders.read(tmp_path, uncertain="ones")


def test_a_table_that_is_not_understood_is_described(tmp_path):
    columns = ("Image Index", "Findings", "Patient ID")
    lookalikes.write_csv(tmp_path / "labels.csv", columns, [{"Image Index": "a.png"}])
    expected = (
        r"holds labels\.csv \(columns Image Index, Findings, Patient ID; most like NIH ChestX-ray14, which also has "
        r"Finding Labels\); expected CheXpert"
    )
    with pytest.raises(ValueError, match=expected):
        folders.read(tmp_path)


def test_a_renamed_table_is_known_by_its_columns(tmp_path):
    folder = lookalikes.nih(tmp_path)
    (folder / "Data_Entry_2017.csv").rename(folder / "mine.csv")
    assert len(folders.read(folder)) == 4


def test_two_sets_in_a_folder(tmp_path):
    lookalikes.nih(lookalikes.ham10000(tmp_path))
    with pytest.raises(ValueError, match=r"holds both HAM10000 and NIH ChestX-ray14; .*--set"):
        folders.read(tmp_path)
    assert folders.read(tmp_path, data_set="nih").name == "nih"


def test_the_page_names_every_set():
    page = (Path(folders.__file__).parent / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(\w+)` \| ", page, re.MULTILINE)) == set(folders.SETS)


def test_pixels_are_read_as_the_folder_was_told(tmp_path):
    folder = lookalikes.nih(tmp_path)
    images = folders.read(folder, reading=Reading(invert=True))
    assert load_image(images.files[0], 4, reading=images.reading)[0, 0, 0] == 255 - 90
    assert Image.open(images.files[0]).getextrema() == (90, 90)
