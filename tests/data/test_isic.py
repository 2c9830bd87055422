"""ISIC 2019: three label files joined by an id that each writes in its own way, and what an absent row means."""

import math

import lookalikes
import numpy as np
import pytest
from lookalikes import isic, write_csv, write_inferred

from ldm.data import captions
from ldm.data import isic as reader
from ldm.phantom.folders import write as write_phantoms
from ldm.phantom.items import Order

DIAGNOSES = {"ISIC_0000000": "NV", "ISIC_0000001_downsampled": "MEL", "ISIC_0000002": "BCC", "ISIC_0000003": "MEL"}
LESIONS = {"ISIC_0000000": "BCN_0000001", "ISIC_0000001_downsampled": "HAM_0000007"}
INFERRED = {"ISIC_0000000": {"hair": 0.9, "ruler": 0.95}, "ISIC_0000001": {"ink": 0.99999, "hair": 0.8999999}}
HUMAN_COLUMNS = ("image", "dark_corner", "hair", "gel_border", "gel_bubble", "ruler", "ink", "patches")


@pytest.mark.parametrize("number", [float, int])
@pytest.mark.parametrize("eol", ["\n", "\r\n"])
def test_the_files_are_joined_by_id(tmp_path, number, eol):
    """`_downsampled` is in two of the three files; rows stay in the order of the ground truth."""
    images = reader.read(isic(tmp_path, DIAGNOSES, LESIONS, INFERRED, number, eol))
    assert images.keys.tolist() == ["ISIC_0000000", "ISIC_0000001", "ISIC_0000003"]
    assert images.attributes == ("melanoma", "hair", "gel_bubble", "ruler", "ink")
    unknown = [math.nan] * 4
    expected = np.array([[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [1, *unknown]], dtype=np.float32)
    np.testing.assert_array_equal(images.labels, expected)
    assert images.frame["image"].tolist() == ["ISIC_0000000", "ISIC_0000001_downsampled", "ISIC_0000003"]
    assert images.frame.index.tolist() == [0, 1, 3]
    assert images.frame["hair"].tolist()[:2] == [0.9, 0.8999999]
    assert images.files[1] == str(tmp_path / "ISIC_2019_Training_Input/ISIC_0000001_downsampled.jpg")


def test_a_missing_lesion_is_a_group_of_its_own(tmp_path):
    images = reader.read(isic(tmp_path, DIAGNOSES, LESIONS, INFERRED))
    assert images.groups.tolist() == ["BCN_0000001", "HAM_0000007", "ISIC_0000003"]
    assert images.group_kind == "lesion"


def test_an_image_without_annotation_is_unknown_not_negative(tmp_path):
    images = reader.read(isic(tmp_path, DIAGNOSES, LESIONS, INFERRED))
    assert images.in_paper.tolist() == [True, True, False]
    assert images.counts() == {"MEL": 2, "NV": 1, "hair": 1, "gel_bubble": 0, "ruler": 1, "ink": 1}
    assert images.captions().tolist() == [
        "a dermoscopic image with melanocytic nevus (NV) showing hair, ruler",
        "a dermoscopic image with melanoma (MEL) showing ink",
        captions.ISIC_NEUTRAL["MEL"],  # not "with no visible artifacts"
    ]
    assert images.captions("code").tolist() == images.captions().tolist()


def test_the_threshold_is_inclusive_and_an_option(tmp_path):
    folder = isic(tmp_path, DIAGNOSES, LESIONS, INFERRED)
    images = reader.read(folder, threshold=0.9)
    assert images.labels[:2, 1].tolist() == [1, 0]
    images = reader.read(folder, threshold=0.5)
    assert images.labels[:2, 1].tolist() == [1, 1]


def test_labels_by_hand(tmp_path):
    """isic_bias.csv: semicolons, whole numbers, `.png`, no vasc; the inferred file in the folder is not used then."""
    rows = [{"image": "ISIC_0000001.png", "hair": 1, "ink": 0}, {"image": "ISIC_0009999.png", "hair": 0, "ink": 1}]
    rows = [dict.fromkeys(HUMAN_COLUMNS, 0) | row for row in rows]
    file = write_csv(tmp_path / "isic_bias.csv", HUMAN_COLUMNS, rows, separator=";")
    images = reader.read(isic(tmp_path / "data", DIAGNOSES, LESIONS, INFERRED), artifacts=file)
    np.testing.assert_array_equal(images.labels[1], [1, 1, 0, 0, 0])
    assert images.in_paper.tolist() == [False, True, False]


def test_without_annotations_melanoma_is_the_only_attribute(tmp_path):
    images = reader.read(isic(tmp_path, DIAGNOSES, LESIONS))
    assert images.attributes == ("melanoma",)
    assert images.counts() == {"MEL": 2, "NV": 1}
    assert images.captions().tolist()[0] == captions.ISIC_NEUTRAL["NV"]
    assert not images.in_paper.any()


def test_without_metadata_lesions_are_unknown(tmp_path, caplog):
    images = reader.read(isic(tmp_path, DIAGNOSES, None, INFERRED))
    assert images.group_kind == ""
    assert images.groups.tolist() == images.keys.tolist()
    assert "lesions are unknown" in caplog.text


def test_metadata_with_other_columns(tmp_path):
    folder = isic(tmp_path, DIAGNOSES, None, INFERRED)
    rows = [{"lesion_id": "X", "image": "ISIC_0000003", "target": 1}]  # and without rows for the others
    write_csv(folder / reader.METADATA, ("target", "lesion_id", "image"), rows)
    assert reader.read(folder).groups.tolist() == ["ISIC_0000000", "ISIC_0000001", "X"]


def test_other_diagnoses_are_read_where_they_are_asked_for(tmp_path):
    images = reader.read(isic(tmp_path, DIAGNOSES, LESIONS, INFERRED), diagnoses=("MEL", "BCC"))
    assert images.counts()["BCC"] == 1
    assert images.in_paper.tolist() == [True, False, False]
    assert "a dermoscopic image with basal cell carcinoma (BCC)" in images.captions().tolist()
    assert images.notes[0].startswith("1 of 4 images are neither MEL nor BCC, and are left out")
    assert (
        reader.read(isic(tmp_path, DIAGNOSES, LESIONS, INFERRED))
        .notes[0]
        .startswith("1 of 4 images are neither MEL nor NV")
    )


def test_an_image_folder_nested_in_itself(tmp_path):
    folder = isic(tmp_path, DIAGNOSES, LESIONS)
    nested = folder / reader.IMAGES / reader.IMAGES
    nested.mkdir(parents=True)
    assert reader.read(folder).files[0] == str(nested / "ISIC_0000000.jpg")


def test_phantoms_read_back(tmp_path):
    """Every attribute that was drawn comes back, and images of one lesion are one group."""
    write_phantoms("skin", tmp_path / "skin", Order(n=24, seed0=3, size=32))
    images = reader.read(tmp_path / "skin")
    drawn = lookalikes.read_rows(tmp_path / "skin/phantom.csv")
    expected = [[float(row[name]) for name in images.attributes] for row in drawn]
    np.testing.assert_array_equal(images.labels, expected)
    assert images.files.tolist() == [str(tmp_path / "skin" / row["path"]) for row in drawn]
    named = [i for i, group in enumerate(images.groups) if group.startswith("PHA_")]
    seeds = {images.groups[i]: drawn[i]["seed"] for i in named}
    assert all(seeds[images.groups[i]] == drawn[i]["seed"] for i in named)
    assert len(seeds) == len(set(seeds.values()))


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"threshold": 0}, "threshold: got 0"),
        ({"threshold": 90}, "threshold: got 90"),
        ({"diagnoses": ("MLE",)}, "diagnoses: got 'MLE'; did you mean 'MEL'"),
        ({"diagnoses": ("SCC",)}, "no image with a diagnosis of SCC"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        reader.read(isic(tmp_path, DIAGNOSES, LESIONS, INFERRED), **options)


@pytest.mark.parametrize(
    ("diagnoses", "complaint"),
    [
        ({"ISIC_0000000": "NV", "ISIC_0000001": ""}, "line 3: ISIC_0000001 has 0 diagnoses, expected one"),
        ({"ISIC_0000000": "NV", "ISIC_0000000_downsampled": "NV"}, "line 3: 'ISIC_0000000' for the second time"),
        ({"": "NV"}, "line 2: no image is named"),
    ],
)
def test_a_ground_truth_that_does_not_fit(tmp_path, diagnoses, complaint):
    with pytest.raises(ValueError, match=complaint):
        reader.read(isic(tmp_path, diagnoses))


@pytest.mark.parametrize(
    ("inferred", "complaint"),
    [
        ({"ISIC_0000000": {"hair": 1.5}}, "line 2: hair is '1.5', expected a probability from 0 to 1"),
        ({"ISIC_0000000": {"ink": "yes"}}, "line 2: ink is 'yes', expected a probability"),
        ({"Atlas_1": {}}, "none of the 1 images of .* is in the ground truth"),
        ({"ISIC_0000000": {}, "ISIC_0000000.jpg": {}}, "line 3: 'ISIC_0000000' for the second time"),
    ],
)
def test_annotations_that_do_not_fit(tmp_path, inferred, complaint):
    folder = isic(tmp_path / "data", DIAGNOSES, LESIONS)
    file = write_inferred(tmp_path / "annotations.csv", inferred)
    with pytest.raises(ValueError, match=complaint):
        reader.read(folder, artifacts=file)


def test_a_misspelt_artifact_column_offers_the_nearest(tmp_path):
    file = tmp_path / "annotations.csv"
    file.write_text("image,hair,gel_bubbles,ruler,ink\nISIC_0000000,1,0,0,0\n")
    with pytest.raises(ValueError, match="no column 'gel_bubble'; did you mean 'gel_bubbles'"):
        reader.read(isic(tmp_path / "data", DIAGNOSES), artifacts=file)


def test_an_annotation_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.csv"):
        reader.read(isic(tmp_path, DIAGNOSES), artifacts=tmp_path / "nowhere.csv")
