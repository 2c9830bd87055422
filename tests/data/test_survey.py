"""What a folder's image files are, and which of them look odd."""

import numpy as np
import pytest
from PIL import Image

from ldm import phantom
from ldm.data.reading import Reading
from ldm.data.survey import described, looks_negative, survey


def drawn(seed: int, negative: bool = False) -> Image.Image:
    grey = np.rint(255 * phantom.render("chest", seed, {}, size=64).image[..., 0]).astype(np.uint8)
    return Image.fromarray(255 - grey if negative else grey)


@pytest.fixture
def files(tmp_path) -> list[str]:
    """Four chests, of which one is a negative and one a copy; a black one; 12 bits; a damaged one; one not there."""
    for i in range(3):
        drawn(i, negative=i == 2).save(tmp_path / f"{i}.png")
    drawn(0).save(tmp_path / "3.tif")
    Image.new("L", (32, 40)).save(tmp_path / "4.png")
    Image.fromarray(np.asarray(drawn(5)).astype(np.uint16) * 16).save(tmp_path / "5.png")
    (tmp_path / "6.png").write_bytes(b"no image")
    return [str(tmp_path / name) for name in ("0.png", "1.png", "2.png", "3.tif", "4.png", "5.png", "6.png", "7.png")]


def test_a_survey_says_what_it_saw(files):
    facts, broken = survey(files)
    assert [one.file for one in broken] == files[6:]
    text = described(facts)
    assert "decoded 6 files" in text
    assert "2 sizes from 32 x 40 to 64 x 64, most often 64 x 64 (5)" in text
    assert "PNG L 4, TIFF L 1, PNG I;16 1" in text
    assert f"1  of one colour, or nearly: {files[4]}" in text
    assert f"1  the pixels of another file: {files[3]}" in text
    assert f"1  grey: 12 of 16 bits are used, 0 to 4095 became 0 to 255: {files[5]}" in text
    assert f"perhaps negatives, with dark bones (--invert reads a folder of negatives): {files[2]}" in text


def test_skin_has_no_negatives(files, tmp_path):
    facts, _ = survey(files, chests=False)
    assert not any(one.negative for one in facts)
    skin = np.rint(255 * phantom.render("skin", 0, {}, size=64).image).astype(np.uint8)
    Image.fromarray(skin).save(tmp_path / "skin.png")
    drawn(2, negative=True).convert("RGB").save(tmp_path / "chest.jpg")
    facts, _ = survey([str(tmp_path / "skin.png"), str(tmp_path / "chest.jpg")])
    assert [one.negative for one in facts] == [False, True]  # a colour image is no radiograph


def test_workers_and_inversion_change_what_they_should(files):
    assert survey(files, workers=2) == survey(files)
    facts, _ = survey(files[:3], reading=Reading(invert=True))
    assert [one.negative for one in facts] == [True, True, False]


@pytest.mark.parametrize("seed", range(6))
def test_a_negative_is_told_by_its_bones(seed):
    assert not looks_negative(drawn(seed))
    assert looks_negative(drawn(seed, negative=True))


def test_nothing_at_all():
    assert described([]) == "no image file was decoded"
