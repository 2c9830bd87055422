"""Captions: the wording of both templates, which labels count, and what is refused."""

import math

import numpy as np
import pandas as pd
import pytest

from ldm.data import captions
from ldm.data.wording import Dermoscopies, Radiographs


def test_chexpert_templates_differ_only_in_the_stem():
    labels = {"Support Devices": 1.0, "Pleural Effusion": 1.0}
    assert captions.chexpert(labels) == "Chest X-ray of a subject with Pleural Effusion, Support Devices"
    assert captions.chexpert(labels, "code") == "Chest X-ray showing Pleural Effusion, Support Devices"


@pytest.mark.parametrize("value", [0.0, -1.0, None, math.nan])
def test_chexpert_counts_only_ones(value):
    assert captions.chexpert({"Edema": value}) == "Normal chest X-ray with no significant findings"


def test_chexpert_labels_outside_the_list_read_as_normal():
    assert captions.chexpert({"Fracture": 1.0}, "code") == captions.CHEXPERT_NEUTRAL


def test_chexpert_no_finding_is_a_label_like_any_other():
    assert captions.chexpert({"No Finding": 1.0}, "code") == "Chest X-ray showing No Finding"


def test_isic_lists_artifacts_in_column_order():
    assert captions.isic("MEL", ["ruler", "hair"]) == "a dermoscopic image with melanoma (MEL) showing hair, ruler"
    assert captions.isic("NV", {"gel_bubble"}) == "a dermoscopic image with melanocytic nevus (NV) showing gel bubble"
    assert captions.isic("NV", []) == "a dermoscopic image with melanocytic nevus (NV) with no visible artifacts"


def test_isic_styles_extend_the_neutral_prompt():
    assert captions.isic_style("MEL", "ruler") == "a dermoscopic image with melanoma (MEL) with a ruler visible"
    for artifact in captions.ISIC_CAPTION_ARTIFACTS:
        assert captions.isic_style("NV", artifact).startswith(captions.ISIC_NEUTRAL["NV"] + " ")


@pytest.mark.parametrize("template", captions.TEMPLATES)
def test_a_table_of_radiographs_is_captioned_row_by_row(template):
    values = np.random.default_rng(0).choice([1.0, 0.0, np.nan], size=(200, 8))
    table = pd.DataFrame(values, columns=captions.CHEXPERT_CAPTION_LABELS).assign(Fracture=1.0)
    expected = [captions.chexpert(row, template) for row in table.to_dict("records")]
    assert captions.chexpert_table(table, template).tolist() == expected


def test_a_table_of_dermoscopies_is_captioned_row_by_row():
    names = captions.ISIC_CAPTION_ARTIFACTS
    values = np.random.default_rng(0).integers(0, 2, size=(200, 5)).astype(float)
    table = pd.DataFrame(values, columns=["MEL", *names]).assign(NV=1 - values[:, 0])
    expected = [
        captions.isic("MEL" if row["MEL"] else "NV", [name for name in names if row[name]])
        for row in table.to_dict("records")
    ]
    assert captions.isic_table(table).tolist() == expected
    assert captions.isic_table(table[["MEL", "NV"]])[0] in captions.ISIC_NEUTRAL.values()  # artifacts not known


def test_captions_can_name_some_labels_alone():
    table = pd.DataFrame([[1.0, 0.0, 1.0]], columns=["Edema", "Pneumonia", "Fracture"])
    both = Radiographs({"Edema": "Edema", "Pneumonia": "Pneumonia"})
    assert both.only(["Fracture"]).captions(table, "code").tolist() == ["Chest X-ray showing Fracture"]
    assert both.only(["Pneumonia"]).prompts(table, "code") == [captions.CHEXPERT_NEUTRAL]

    artifacts = dict.fromkeys(captions.ISIC_CAPTION_ARTIFACTS, 0.0)
    skin = pd.DataFrame([artifacts | {"hair": 1.0, "ink": 1.0}, artifacts | {"hair": 1.0}, artifacts]).assign(
        MEL=1, NV=0
    )
    stem = captions.ISIC_NEUTRAL["MEL"]
    expected = [f"{stem} showing ink", stem, f"{stem} with no visible artifacts"]  # hair unsaid is not denied
    assert Dermoscopies().only(["MEL", "ink"]).captions(skin, "paper").tolist() == expected


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: captions.chexpert({}, "thesis"), "template.*thesis"),
        (lambda: captions.chexpert_table(pd.DataFrame(), "thesis"), "template.*thesis"),
        (lambda: captions.isic_table(pd.DataFrame(), "thesis"), "template.*thesis"),
        (lambda: captions.isic_table(pd.DataFrame({"MEL": [0.0], "NV": [0.0]})), "1 images are neither MEL nor NV"),
        (lambda: captions.isic("UNK", []), "diagnosis.*UNK"),
        (lambda: captions.isic("MEL", ["tattoo"]), "artifacts.*tattoo"),
        (lambda: captions.isic("MEL", "hair"), "artifacts.*hair"),
        (lambda: captions.isic_style("MEL", "tattoo"), "artifact.*tattoo"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call()
