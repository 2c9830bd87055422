"""Files that are whole or not there, and images as bytes and as the networks take them."""

import numpy as np
import pytest
import torch

from ldm.files import complete, read_json, write_bytes, write_json, write_text
from ldm.images import from_uint8, load_pixels, save_image, to_uint8


def test_what_is_written_is_read(tmp_path):
    write_json(tmp_path / "a.json", {"b": [1, 2]})
    write_text(tmp_path / "a.txt", "µ")
    write_bytes(tmp_path / "a.bin", b"\0\1")
    assert read_json(tmp_path / "a.json") == {"b": [1, 2]}
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "µ"
    assert (tmp_path / "a.bin").read_bytes() == b"\0\1"
    assert len(list(tmp_path.iterdir())) == 3


def half_a_write(partial):
    partial.write_text("half")
    raise FileNotFoundError


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
    write_text(tmp_path / "a", "before")
    with pytest.raises(FileNotFoundError), complete(tmp_path / "a") as partial:
        half_a_write(partial)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "before"


def test_nothing_stays_where_both_names_are_of_one_file(tmp_path):
    write_text(tmp_path / "a", "whole")
    with complete(tmp_path / "a", on_disk=True) as partial:
        partial.hardlink_to(tmp_path / "a")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_json_that_is_none(tmp_path):
    assert read_json(tmp_path / "absent.json") == {}
    for text, complaint in (("[1]", "expected a JSON object, found list"), ("{", "expected JSON")):
        write_text(tmp_path / "a.json", text)
        with pytest.raises(ValueError, match=complaint):
            read_json(tmp_path / "a.json")


def test_bytes_survive_the_way_to_the_networks_and_back(tmp_path):
    pixels = np.arange(2 * 8 * 16 * 3, dtype=np.uint8).reshape(2, 8, 16, 3)
    images = from_uint8(pixels)
    assert images.shape == (2, 3, 8, 16)
    assert (images.min(), images.max()) == (-1, 1)
    assert np.array_equal(to_uint8(images), pixels)
    assert torch.equal(from_uint8(torch.from_numpy(pixels[1])), images[1])
    save_image(tmp_path / "folder" / "a.png", pixels[0])
    assert np.array_equal(load_pixels(tmp_path / "folder" / "a.png"), pixels[0])
