"""Phantoms: what makes a counterfactual pair exact, and folders that look like the real data sets' own."""

import argparse
import csv
import hashlib
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from ldm_tools import phantom as command
from PIL import Image

from ldm.phantom import ATTRIBUTES, FREQUENCY, render, sample_attributes
from ldm.phantom.chest_anatomy import CTR_RANGE, SEVERITY_RANGE, draw_anatomy
from ldm.phantom.folders import write as write_phantoms
from ldm.phantom.items import Order
from ldm.phantom.label_files import CHEXPERT_COLUMNS, ISIC_PROBABILITIES

DOMAINS = sorted(ATTRIBUTES)
SIZE = 64  # nothing tested here depends on it


def fingerprint(domain: str) -> str:
    digest = hashlib.sha256()
    for seed in range(3):
        phantom = render(domain, seed, dict.fromkeys(ATTRIBUTES[domain], True), SIZE)
        digest.update(phantom.image.tobytes())
        for name in sorted(phantom.masks):
            digest.update(phantom.masks[name].tobytes())
    return digest.hexdigest()


def read(path):
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


# ---------------------------------------------------------------- one phantom


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_phantom_is_what_its_type_says(domain):
    on = ATTRIBUTES[domain][0]
    phantom = render(domain, 5, {on: True})
    assert phantom.image.shape == (128, 128, 3)
    assert phantom.image.dtype == np.float32
    assert 0.0 <= phantom.image.min() < 0.2 + 0.5 * (domain == "skin")
    assert 0.6 < phantom.image.max() <= 1.0
    assert phantom.to_uint8().dtype == np.uint8
    assert np.abs(phantom.to_uint8() / 255.0 - phantom.image).max() <= 0.5 / 255 + 1e-6
    assert phantom.attributes == {name: name == on for name in ATTRIBUTES[domain]}
    assert set(phantom.masks) == {on}
    assert phantom.masks[on].dtype == bool
    assert all(isinstance(value, float) for value in phantom.anatomy.values())


def test_chest_is_grey():
    image = render("chest", 1, {"support_devices": True}).image
    assert (image[..., :1] == image).all()


@pytest.mark.parametrize("domain", DOMAINS)
def test_another_process_draws_the_same(domain):
    code = f"import test_phantom as t; print(t.fingerprint({domain!r}))"
    other = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
    )
    assert other.stdout.strip() == fingerprint(domain)


@pytest.mark.parametrize("domain", DOMAINS)
def test_seeds_differ(domain):
    images = [render(domain, seed, {}, SIZE).to_uint8().tobytes() for seed in range(10)]
    assert len(set(images)) == 10


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("domain", DOMAINS)
def test_toggling_changes_no_pixel_outside_the_mask(domain, tied):
    """The property that everything rests on: bit for bit, in float and in uint8, whatever else is present."""
    for seed in range(40 if domain == "chest" else 12):
        present = sample_attributes(domain, seed)
        base = render(domain, seed, present, SIZE, tied)
        for name in ATTRIBUTES[domain]:
            twin = render(domain, seed, {**present, name: not present[name]}, SIZE, tied)
            mask = (base if present[name] else twin).masks[name]
            assert np.array_equal(base.image[~mask], twin.image[~mask]), (seed, name)
            assert np.array_equal(base.to_uint8()[~mask], twin.to_uint8()[~mask]), (seed, name)
            assert 0.002 < mask.mean() < 0.5, (seed, name)
            assert np.abs(base.image - twin.image)[mask].mean() > 0.02, (seed, name)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("domain", DOMAINS)
def test_an_attribute_neither_moves_another_nor_the_anatomy(domain, tied):
    everything = dict.fromkeys(ATTRIBUTES[domain], True)
    for seed in range(6):
        full = render(domain, seed, everything, SIZE, tied)
        assert full.anatomy == render(domain, seed, {}, SIZE, tied).anatomy
        for name in ATTRIBUTES[domain]:
            alone = render(domain, seed, {name: True}, SIZE, tied)
            assert np.array_equal(full.masks[name], alone.masks[name]), (seed, name)


def test_tied_chest_attributes_follow_the_visible_anatomy():
    for seed in range(50):
        a = draw_anatomy(seed, tied=True)
        assert a.effusion_side == math.copysign(1, a.shift) == math.copysign(1, a.tilt)
        share = (a.ctr - CTR_RANGE[0]) / (CTR_RANGE[1] - CTR_RANGE[0])
        assert a.effusion_severity == pytest.approx(SEVERITY_RANGE[0] + share * (SEVERITY_RANGE[1] - SEVERITY_RANGE[0]))
        assert a.device_side == 1.0


def test_free_chest_attributes_do_not():
    draws = [draw_anatomy(seed, tied=False) for seed in range(400)]
    assert abs(np.corrcoef([a.effusion_side for a in draws], [a.shift for a in draws])[0, 1]) < 0.15
    assert abs(np.corrcoef([a.effusion_severity for a in draws], [a.ctr for a in draws])[0, 1]) < 0.15
    assert {a.device_side for a in draws} == {-1.0, 1.0}


def test_effusion_lies_on_its_side_and_whitens():
    for seed in range(12):
        base, twin = (render("chest", seed, {"pleural_effusion": on}) for on in (False, True))
        mask = twin.masks["pleural_effusion"]
        middle = 0.5 + base.anatomy["shift"]
        assert ((np.nonzero(mask)[1].mean() + 0.5) / 128 > middle) == (base.anatomy["effusion_side"] > 0)
        assert (twin.image - base.image)[mask].min() > -1e-6


def test_device_lead_is_at_least_four_pixels_wide():
    """Thinner strokes do not survive an 8x autoencoder."""
    mask = render("chest", 3, {"support_devices": True}).masks["support_devices"]
    rows = mask[60:90].sum(axis=1)  # where only the lead is, going down
    assert rows.min() >= 4


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: render("brain", 0), "domain.*brain"),
        (lambda: render("chest", 0, {"ink": True}), "attributes.*ink"),
        (lambda: render("chest", -1), "seed.*-1"),
        (lambda: render("chest", 0, size=8), "size.*8"),
        (lambda: sample_attributes("brain", 0), "domain.*brain"),
    ],
)
def test_errors_name_the_argument(call, named):
    with pytest.raises(ValueError, match=named):
        call()


# ---------------------------------------------------------------- attributes of a set


@pytest.mark.parametrize("confounded", [False, True])
@pytest.mark.parametrize("domain", DOMAINS)
def test_frequencies(domain, confounded):
    """2,000 draws: a standard error of about 0.011, so 0.04 is 3.6 of them. Confounding keeps every marginal."""
    drawn = [sample_attributes(domain, seed, confounded) for seed in range(2000)]
    for name in ATTRIBUTES[domain]:
        assert abs(np.mean([state[name] for state in drawn]) - FREQUENCY[domain][name]) < 0.04, name


@pytest.mark.parametrize("domain", DOMAINS)
def test_unconfounded_attributes_are_independent(domain):
    table = np.array([list(sample_attributes(domain, seed).values()) for seed in range(2000)], dtype=float)
    assert np.abs(np.corrcoef(table.T) - np.eye(table.shape[1])).max() < 0.08


@pytest.mark.parametrize(("domain", "cause", "companion"), [("skin", "ink", "ruler"), ("chest", *ATTRIBUTES["chest"])])
def test_confounded_attributes_go_together(domain, cause, companion):
    drawn = [sample_attributes(domain, seed, confounded=True) for seed in range(2000)]
    together = np.mean([state[companion] for state in drawn if state[cause]])
    assert abs(together - 0.74) < 0.06
    plain = [sample_attributes(domain, seed) for seed in range(2000)]
    assert all(a[cause] == b[cause] for a, b in zip(drawn, plain, strict=True))


# ---------------------------------------------------------------- folders


def test_chexpert_folder(tmp_path):
    out = write_phantoms("chest", tmp_path / "chest", Order(n=60, size=32))
    train, valid = read(out / "CheXpert-v1.0-small/train.csv"), read(out / "CheXpert-v1.0-small/valid.csv")
    assert (len(train), len(valid)) == (54, 6)
    for row in train + valid:
        assert tuple(row) == CHEXPERT_COLUMNS
        pattern = r"CheXpert-v1\.0-small/(train|valid)/patient\d{5}/study\d+/view1_frontal\.jpg"
        assert re.fullmatch(pattern, row["Path"])
        assert row["Sex"] in {"Male", "Female"}
        assert 18 <= int(row["Age"]) <= 90
        assert row["Frontal/Lateral"] == "Frontal"
        assert row["AP/PA"] in {"AP", "PA"}
        assert row["No Finding"] != "1.0" or row["Pleural Effusion"] != "1.0"
        with Image.open(out / row["Path"]) as image:
            assert (image.mode, image.size) == ("L", (32, 32))
    assert {row[column] for row in train for column in CHEXPERT_COLUMNS[5:]} == {"1.0", "0.0", ""}
    assert {row[column] for row in valid for column in CHEXPERT_COLUMNS[5:]} == {"1.0", "0.0"}
    assert train[0]["Path"].split("/")[1:3] == ["train", "patient00001"]
    assert valid[0]["Path"].split("/")[1:3] == ["valid", "patient64541"]
    studies = Counter(row["Path"].split("/")[2] for row in train)
    assert 0.05 < np.mean([count > 1 for count in studies.values()]) < 0.5


def test_chexpert_ground_truth_can_be_found_again(tmp_path):
    out = write_phantoms("chest", tmp_path / "chest", Order(n=20, seed0=7, size=32))
    labels = {row["Path"]: row for part in ("train", "valid") for row in read(out / f"CheXpert-v1.0-small/{part}.csv")}
    for row in read(out / "phantom.csv"):
        state = {name: row[name] == "1" for name in ATTRIBUTES["chest"]}
        assert (labels[row["path"]]["Support Devices"] == "1.0") == state["support_devices"]
        phantom = render("chest", int(row["seed"]), state, 32)
        with Image.open(out / row["path"]) as image:
            assert np.abs(np.asarray(image).astype(int) - phantom.to_uint8()[..., 0]).mean() < 3  # JPEG at quality 95
        assert float(row["ctr"]) == pytest.approx(phantom.anatomy["ctr"], rel=1e-5)
        _, _, patient, study, _ = row["path"].split("/")
        for name, mask in phantom.masks.items():
            with Image.open(out / f"masks/{patient}_{study}_{name}.png") as image:
                assert np.array_equal(np.asarray(image) == 255, mask)


def test_isic_folder(tmp_path):
    out = write_phantoms("skin", tmp_path / "skin", Order(n=40, size=32, confounded=True))
    truth, metadata = (read(out / f"ISIC_2019_Training_{name}.csv") for name in ("GroundTruth", "Metadata"))
    artifacts, phantoms = read(out / "isic_inferred_wocarcinoma.csv"), read(out / "phantom.csv")
    assert list(truth[0]) == ["image", "MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK"]
    assert list(metadata[0]) == ["image", "age_approx", "anatom_site_general", "lesion_id", "sex"]
    assert list(artifacts[0]) == ["", "image", *ISIC_PROBABILITIES, "label", "label_string"]
    lesions = {}
    for label, about, artifact, phantom in zip(truth, metadata, artifacts, phantoms, strict=True):
        assert re.fullmatch(r"ISIC_\d{7}(_downsampled)?", label["image"])
        assert label["image"] == about["image"]
        assert artifact["image"] == label["image"].removesuffix("_downsampled")
        assert phantom["path"] == f"ISIC_2019_Training_Input/{label['image']}.jpg"
        assert sum(float(label[name]) for name in list(label)[1:]) == 1.0
        assert label["MEL"] == f"{float(artifact['label'])}" == f"{float(phantom['melanoma'])}"
        for name in ISIC_PROBABILITIES:
            probability = float(artifact[name])
            assert 0.9 <= probability <= 1.0 if phantom.get(name) == "1" else 0.0 <= probability < 0.5
        with Image.open(out / phantom["path"]) as image:
            assert (image.mode, image.size) == ("RGB", (32, 32))
            assert {layer[1:3] for layer in image.layer} == {(1, 1)}  # 4:4:4
        lesions.setdefault(phantom["seed"], []).append((about["lesion_id"], label["MEL"]))
    several = [seen for seen in lesions.values() if len(seen) > 1]
    assert several
    assert all(len(set(seen)) == 1 and seen[0][0] for seen in several)


def test_counterfactuals_are_lossless(tmp_path):
    out = write_phantoms("chest", tmp_path / "chest", Order(n=3, size=32, counterfactuals=True))
    for row in read(out / "phantom.csv"):
        key = "_".join(row["path"].split("/")[2:4])
        base = np.asarray(Image.open(out / f"counterfactuals/{key}_base.png"))
        state = {name: row[name] == "1" for name in ATTRIBUTES["chest"]}
        assert np.array_equal(base, render("chest", int(row["seed"]), state, 32).to_uint8()[..., 0])
        for name in ATTRIBUTES["chest"]:
            twin = np.asarray(Image.open(out / f"counterfactuals/{key}_{name}.png"))
            mask = np.asarray(Image.open(out / f"masks/{key}_{name}.png")) == 255
            assert (twin != base).any()
            assert np.array_equal(twin[~mask], base[~mask])


@pytest.mark.parametrize("domain", DOMAINS)
def test_workers_do_not_change_the_result(domain, tmp_path):
    order = Order(n=10, size=32)
    one, two = (write_phantoms(domain, tmp_path / str(workers), order, workers) for workers in (1, 2))
    files = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    assert all((one / path).read_bytes() == (two / path).read_bytes() for path in files)


@pytest.mark.parametrize("domain", DOMAINS)
def test_existing_files_are_refused_and_kept(domain, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="not an empty folder"):
        write_phantoms(domain, tmp_path, Order(n=1, size=32))
    with pytest.raises(ValueError, match="not an empty folder"):
        write_phantoms(domain, tmp_path / "notes.txt", Order(n=1, size=32))
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_an_empty_folder_is_used_and_a_failure_leaves_nothing(tmp_path, monkeypatch):
    out = tmp_path / "chest"
    out.mkdir()
    monkeypatch.setattr("ldm.phantom.folders._write_images", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        write_phantoms("chest", out, Order(n=1, size=32))
    assert [*tmp_path.iterdir()] == [out]
    assert not any(out.iterdir())
    monkeypatch.undo()
    assert (write_phantoms("chest", out, Order(n=1, size=32)) / "phantom.csv").is_file()


@pytest.mark.parametrize(
    ("given", "named"),
    [({"n": 0}, "n: got 0"), ({"size": 8}, "size"), ({"seed0": -1}, "seed"), ({"extras": ["x"]}, "extras")],
)
def test_numbers_out_of_range_are_refused(given, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        write_phantoms("skin", tmp_path / "skin", Order(**{"n": 1, **given}))
    with pytest.raises(ValueError, match="workers"):
        write_phantoms("skin", tmp_path / "skin", Order(n=1), workers=0)
    assert not any(tmp_path.iterdir())


# ---------------------------------------------------------------- the command


def call(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    command.run(parser.parse_args(arguments))


def test_command_writes_data_and_contact_sheet(tmp_path):
    call("--domain", "chest", "--n", "3", "--size", "32", "--free", "--out", str(tmp_path / "chest"))
    assert len(list((tmp_path / "chest").rglob("*.jpg"))) == 3
    with Image.open(tmp_path / "chest/contact_sheet.png") as sheet:
        assert sheet.size == (4 * 32, 3 * 32)  # nothing, effusion, devices, both


def test_command_can_write_the_contact_sheet_only(tmp_path):
    call("--domain", "skin", "--n", "2", "--size", "32", "--sheet", "--out", str(tmp_path / "skin"))
    assert [path.name for path in (tmp_path / "skin").iterdir()] == ["contact_sheet.png"]
