"""Image files: every kind comes out as upright 8-bit RGB squares; broken ones are named, counted, and found early."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from ldm.data import images
from ldm.data.images import Broken, iterate, load_image, scan, usable


def ramp(height: int = 24, width: int = 40) -> np.ndarray:
    """Grey from 0 at the left to 255 at the right."""
    return np.broadcast_to(np.linspace(0, 255, width).astype(np.uint8), (height, width)).copy()


# ---------------------------------------------------------------- kinds of files


def test_squash_is_lanczos_of_the_whole_image(tmp_path):
    Image.fromarray(ramp()).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 16)
    assert loaded.shape == (16, 16, 3)
    assert loaded.dtype == np.uint8
    expected = Image.fromarray(ramp()).convert("RGB").resize((16, 16), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(loaded, np.asarray(expected))


def test_crop_takes_the_centre_and_pad_keeps_all(tmp_path):
    pixels = np.full((20, 60), 200, dtype=np.uint8)
    pixels[:, :20] = 50  # the left third, outside the centre
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (load_image(tmp_path / "a.png", 20, "crop") == 200).all()
    padded = load_image(tmp_path / "a.png", 60, "pad")
    assert (padded[:20] == 0).all()
    assert (padded[40:] == 0).all()
    np.testing.assert_array_equal(padded[20:40, :, 0], pixels)


def test_sixteen_bit_png_keeps_the_whole_range(tmp_path):
    """65535 is white, 32896 = 128 * 257 is 128: the high byte, rounded."""
    values = np.array([[0, 65535], [32896, 257]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 2)[..., 0].tolist() == [[0, 255], [128, 1]]


def test_cmyk_jpeg(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    red = load_image(tmp_path / "a.jpg", 8)[4, 4].astype(int)
    assert np.abs(red - [255, 0, 0]).max() <= 3  # JPEG's own rounding


def test_exif_orientation_is_applied(tmp_path):
    """Orientation 6: the camera was turned; what is stored at the left is up."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(ramp(32, 32)).save(tmp_path / "a.jpg", exif=exif, quality=100)
    loaded = load_image(tmp_path / "a.jpg", 32)[..., 0].astype(int)
    assert loaded[0].max() < 10
    assert loaded[-1].min() > 245


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    grey = Image.fromarray(np.full((8, 8), 65535, np.uint16)) if mode == "I;16" else Image.new("L", (8, 8), 255)
    (grey if mode == "I;16" else grey.convert(mode)).save(tmp_path / "a.png")
    assert (load_image(tmp_path / "a.png", 4) == 255).all()


def test_pixels_without_a_known_range_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match=r"a\.tif: floating-point pixels"):
        load_image(tmp_path / "a.tif", 4)


def test_an_unknown_fit(tmp_path):
    with pytest.raises(ValueError, match="fit: got 'stretch'"):
        load_image(tmp_path / "a.png", 4, "stretch")


# ---------------------------------------------------------------- broken files


@pytest.fixture
def folder(tmp_path) -> list[str]:
    """Forty files in order, 3, 20 and 33 of which are broken: cut off, no image, not there."""
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    for i in range(40):
        if i % 2:
            (tmp_path / f"{i:02d}.jpg").write_bytes(buffer.getvalue())
        else:
            Image.new("L", (9, 9), i).save(tmp_path / f"{i:02d}.jpg", "PNG")  # a PNG by another name
    (tmp_path / "03.jpg").write_bytes(buffer.getvalue()[:-500])
    (tmp_path / "20.jpg").write_bytes(b"no image")
    (tmp_path / "33.jpg").unlink()
    return [str(tmp_path / f"{i:02d}.jpg") for i in range(40)]


def test_a_scan_names_what_is_broken_and_why(folder):
    for workers in (1, 2):
        found = scan(folder, workers)
        assert [fault.file for fault in found] == [folder[3], folder[20], folder[33]]
        assert "truncated" in found[0].reason
        assert "cannot identify image file" in found[1].reason
        assert found[2].reason == "no such file"


@pytest.mark.parametrize("content", [b"", b"\xff", b"\xff\xd8\xff\xd9"])
def test_a_scan_survives_stumps(tmp_path, content):
    (tmp_path / "a.jpg").write_bytes(content)
    assert [fault.file for fault in scan([str(tmp_path / "a.jpg")])] == [str(tmp_path / "a.jpg")]


def test_a_jpeg_with_bytes_after_its_end_is_whole(folder):
    with open(folder[1], "ab") as file:
        file.write(b"\0" * 100)
    assert scan(folder[:3]) == []


def test_the_scan_is_cached_until_a_file_changes(folder, tmp_path, monkeypatch):
    cache = tmp_path / "scan.json"
    found = scan(folder, cache=cache)
    with monkeypatch.context() as patch:
        patch.setattr(images, "_fault", lambda *_, **__: 1 / 0)
        assert scan(folder, cache=cache) == found
    Image.new("L", (9, 9)).save(folder[33])
    assert len(scan(folder, cache=cache)) == 2
    calls = []
    monkeypatch.setattr(images, "_fault", lambda name, **_: calls.append(name) or ())  # nothing is broken
    os.utime(folder[0], ns=(1, 1))
    assert scan(folder, cache=cache) == []
    assert calls == folder


def test_a_damaged_cache_is_no_result(folder, tmp_path):
    cache = tmp_path / "scan.json"
    cache.write_text('{"state": 1')
    assert len(scan(folder, cache=cache)) == 3


def test_usable_counts_up_to_max_bad(folder, caplog):
    mask = usable(folder, max_bad=3)
    assert np.flatnonzero(~mask).tolist() == [3, 20, 33]
    assert caplog.text.count("left out") == 3
    with pytest.raises(ValueError, match=r"3 of 40 images cannot be read \(max_bad is 2\): .*03\.jpg: .*; .*20\.jpg"):
        usable(folder, max_bad=2)


def test_an_error_names_the_first_five(tmp_path):
    with pytest.raises(ValueError, match=r"12 of 12 images .*; and 7 more") as caught:
        images.refuse([Broken(f"{i}.jpg", "no such file") for i in range(12)], 0, 12)
    assert "\n" not in str(caught.value)


# ---------------------------------------------------------------- many


def test_images_come_in_order_whatever_the_workers(folder):
    one = list(iterate(folder, 16, workers=1, max_bad=3))
    two = list(iterate(folder, 16, workers=2, max_bad=3))
    assert [index for index, _ in one] == [i for i in range(40) if i not in (3, 20, 33)]
    assert [index for index, _ in two] == [index for index, _ in one]
    for (index, pixels), (_, same) in zip(one, two, strict=True):
        np.testing.assert_array_equal(pixels, same)
        np.testing.assert_array_equal(pixels, load_image(folder[index], 16))


def test_iterate_stops_at_the_first_that_is_too_many(folder, caplog):
    seen = []
    with pytest.raises(ValueError, match=r"2 of 40 images cannot be read \(max_bad is 1\)"):
        seen += [index for index, _ in iterate(folder, 8, max_bad=1)]
    assert caplog.text.count("left out") == 1


def test_iterate_decodes_only_a_few_ahead(tmp_path):
    """Memory must not grow with the data set: when the first image comes out, the last is not yet opened."""
    files = [tmp_path / f"{i:03d}.png" for i in range(200)]
    for file in files:
        Image.new("L", (4, 4)).save(file)
    decoding = iterate([str(file) for file in files], 8, workers=2)
    assert next(decoding)[0] == 0
    files[-1].unlink()
    with pytest.raises(ValueError, match=r"199\.png: no such file"):
        list(decoding)


def test_workers_below_one(folder):
    with pytest.raises(ValueError, match="workers: got 0"):
        list(iterate(folder, 8, workers=0))
