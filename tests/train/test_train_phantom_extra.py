"""The attribute that the shipped model has never seen: exact as the others, and off unless asked for."""

import csv
from pathlib import Path

import numpy as np
import pytest
from ldm_tools import cli

from ldm.data import folders
from ldm.phantom import ATTRIBUTES, EXTRAS, render, sample_attributes
from ldm.phantom.folders import write as write_phantoms
from ldm.phantom.items import Order

SIZE = 64  # nothing tested here depends on it

# The sum of the bytes of seeds 0-2: without attributes, with those of a training set, with all. Before there were
# extras the images were the same bit for bit; sums, since another processor rounds one pixel in 100,000 another way.
SUMS = {
    "chest": (1396581, 1480131, 1480131, 1246836, 1331028, 1331028, 1388097, 1388097, 1478199),
    "skin": (1482951, 1575040, 1302559, 1977483, 1778649, 1661460, 1079426, 1062439, 1149251),
}


@pytest.mark.parametrize("domain", sorted(ATTRIBUTES))
def test_what_was_drawn_before_is_drawn_still(domain):
    for seed in range(3):
        states = ({}, sample_attributes(domain, seed), dict.fromkeys(ATTRIBUTES[domain], True))
        for state, wanted in zip(states, SUMS[domain][3 * seed :], strict=False):
            phantom = render(domain, seed, state, SIZE)
            assert abs(int(phantom.to_uint8().sum(dtype=np.int64)) - wanted) <= 3 * 3  # three pixels, three channels
            assert set(phantom.attributes) == set(ATTRIBUTES[domain])
            assert not set(phantom.masks) & set(EXTRAS[domain])


def test_an_extra_changes_no_other_attribute():
    for seed in range(50):
        plain, more = sample_attributes("chest", seed), sample_attributes("chest", seed, extras=("cardiomegaly",))
        assert {name: more[name] for name in plain} == plain
    shown = sum(sample_attributes("chest", seed, extras=("cardiomegaly",))["cardiomegaly"] for seed in range(400))
    assert abs(shown / 400 - 0.4) < 0.123  # five standard deviations of 400 draws


def test_a_larger_heart_changes_no_pixel_outside_its_mask():
    for seed in range(12):
        for others in ({}, {"pleural_effusion": True}, {"support_devices": True}):
            base = render("chest", seed, others, SIZE)
            twin = render("chest", seed, {**others, "cardiomegaly": True}, SIZE)
            mask = twin.masks["cardiomegaly"]
            assert np.array_equal(base.image[~mask], twin.image[~mask]), seed
            assert 0.03 < mask.mean() < 0.12, seed
            assert np.abs(base.image - twin.image)[mask].mean() > 0.02, seed
            assert twin.anatomy == base.anatomy
            for name in others:
                assert np.array_equal(base.masks[name], twin.masks[name]), seed


def test_its_label_is_cheXperts_and_its_caption_follows(tmp_path):
    write_phantoms("chest", tmp_path / "plain", Order(n=40, size=32))
    write_phantoms("chest", tmp_path / "more", Order(n=40, size=32, extras=("cardiomegaly",)))
    data = folders.read(tmp_path / "more")
    with (tmp_path / "more" / "phantom.csv").open(newline="") as file:
        truth = {Path(row["path"]).as_posix(): int(row["cardiomegaly"]) for row in csv.DictReader(file)}
    stated = dict(zip(data.frame["Path"], (data.observations["Cardiomegaly"] == 1).astype(int), strict=True))
    assert stated == {path: truth[path] for path in stated}
    assert 0 < sum(stated.values()) < len(stated)
    for caption, large in zip(data.captions(), stated.values(), strict=True):
        assert ("Cardiomegaly" in caption) == bool(large)
        assert not (large and "No Finding" in caption)
    plain = folders.read(tmp_path / "plain")
    assert not (plain.observations["Cardiomegaly"] == 1).any()
    assert "cardiomegaly" not in (tmp_path / "plain" / "phantom.csv").read_text()


def test_the_command_draws_it(tmp_path, capsys):
    out = tmp_path / "data"
    assert (
        cli.main(
            ["phantom", "--domain", "chest", "--n", "10", "--size", "32", "--extra", "cardiomegaly", "--out", str(out)]
        )
        == 0
    )
    assert list((out / "masks").glob("*_cardiomegaly.png"))
    skin = [
        "phantom",
        "--domain",
        "skin",
        "--n",
        "10",
        "--size",
        "32",
        "--extra",
        "cardiomegaly",
        "--out",
        str(tmp_path / "skin"),
    ]
    assert cli.main(skin) == 2
    assert "['cardiomegaly'] unknown for domain 'skin'" in capsys.readouterr().err
