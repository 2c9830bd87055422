"""Image files: every kind comes out as upright 8-bit RGB squares; broken ones are named, counted, and found early."""

import io
import os

import numpy as np
import pytest
import tifffile
from PIL import Image

from ldm.data import images
from ldm.data.decode import decode
from ldm.data.images import Broken, iterate, load_image, scan, usable
from ldm.data.reading import Reading


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


@pytest.mark.parametrize(("highest", "white"), [(255, 255), (900, 1023), (3000, 4095), (9000, 16383), (40000, 65535)])
def test_grey_of_fewer_than_16_bits_is_scaled_by_those_that_are_used(tmp_path, highest, white):
    """12 bits in a 16-bit PNG or TIFF would come out nearly black."""
    values = np.linspace(0, highest, 64).astype(np.uint16).reshape(8, 8)
    for extension in ("png", "tif"):
        Image.fromarray(values).save(tmp_path / f"a.{extension}")
        loaded = load_image(tmp_path / f"a.{extension}", 8)[..., 0]
        np.testing.assert_array_equal(loaded, np.rint(values / white * 255))
        remarks = decode(tmp_path / f"a.{extension}").remarks
        assert remarks == () if white == 65535 else f"0 to {white} became 0 to 255" in remarks[0]
    whole = load_image(tmp_path / "a.png", 8, reading=Reading(grey_range="type"))[..., 0]
    np.testing.assert_array_equal(whole, np.rint(values / 257))


def test_percentiles_by_option(tmp_path):
    values = np.arange(10_000, dtype=np.uint16).reshape(100, 100)
    values[0, :10] = 65535
    Image.fromarray(values).save(tmp_path / "a.png")
    loaded = load_image(tmp_path / "a.png", 100, reading=Reading(grey_range="percentiles"))[..., 0]
    assert (loaded[0, 10:50] == 0).all()
    assert (loaded[99, 50:] == 255).all()
    assert abs(int(loaded[50, 0]) - 128) < 3


@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_least_value_is_white(tmp_path, bits):
    """As film scanners write them; Pillow inverts 8 bits itself, and leaves 16 as they are."""
    values = np.linspace(0, 2**bits - 1, 64).astype(f"uint{bits}").reshape(8, 8)
    tifffile.imwrite(tmp_path / "a.tif", values, photometric="miniswhite")
    tifffile.imwrite(tmp_path / "b.tif", values, photometric="minisblack")
    white, black = (load_image(tmp_path / name, 8)[..., 0].astype(int) for name in ("a.tif", "b.tif"))
    np.testing.assert_array_equal(white, 255 - black)
    assert white[0, 0] == 255


def test_a_file_of_several_pages_says_so(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.stack([ramp(8, 8)] * 2), photometric="minisblack")
    assert decode(tmp_path / "a.tif").remarks == ("only the first of several pages or frames is read",)


def test_a_narrow_range_is_remarked_on(tmp_path):
    Image.fromarray(np.linspace(20, 60, 64).astype(np.uint8).reshape(8, 8)).save(tmp_path / "a.png")
    assert "less than a quarter of the range" in decode(tmp_path / "a.png").remarks[0]


def test_transparent_pixels_are_laid_on_a_background(tmp_path):
    pixels = np.full((4, 4, 4), 200, dtype=np.uint8)
    pixels[:2, :, 3] = 0
    pixels[2:, :, 3] = 255
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 4)[:, 0, 0].tolist() == [0, 0, 200, 200]
    assert load_image(tmp_path / "a.png", 4, reading=Reading(background=255))[:, 0, 0].tolist() == [255, 255, 200, 200]
    assert decode(tmp_path / "a.png").remarks == ("transparent pixels were laid on grey 0",)
    grey = Image.fromarray(pixels[..., [0, 3]], "LA")
    grey.save(tmp_path / "b.png")
    assert decode(tmp_path / "b.png").image.mode == "L"


def test_negatives_are_inverted(tmp_path):
    Image.fromarray(ramp(8, 8)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(
        load_image(tmp_path / "a.png", 8, reading=Reading(invert=True))[..., 0], 255 - ramp(8, 8)
    )


@pytest.mark.parametrize("options", [{"grey_range": "auto"}, {"background": 256}])
def test_readings_that_are_none(options):
    with pytest.raises(ValueError, match=r"got (?:'auto'|256), expected"):
        Reading(**options)


def test_the_limit_of_pixels_is_said(tmp_path, monkeypatch):
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(ValueError, match=r"0\.0 megapixels, at most 0\.0 are read; make it smaller"):
        load_image(tmp_path / "a.png", 4)


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


def _noise_as_jpeg() -> bytes:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path) -> list[str]:
    """Forty files in order, 3, 20 and 33 of which are broken: cut off, no image, not there."""
    whole = _noise_as_jpeg()
    for i in range(40):
        if i % 2:
            (tmp_path / f"{i:02d}.jpg").write_bytes(whole)
        else:
            Image.new("L", (9, 9), i).save(tmp_path / f"{i:02d}.jpg", "PNG")  # a PNG by another name
    (tmp_path / "03.jpg").write_bytes(whole[:-500])
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


def test_damage_in_the_middle_is_found_where_all_is_decoded(tmp_path):
    content = bytearray(_noise_as_jpeg())
    middle = len(content) // 2
    content[middle : middle + 400] = np.random.default_rng(0).integers(0, 256, 400, dtype=np.uint8).tobytes()
    (tmp_path / "a.jpg").write_bytes(content)
    name = str(tmp_path / "a.jpg")
    assert scan([name]) == []  # its header and its end are whole
    assert "broken data stream" in scan([name], whole=True)[0].reason
    assert usable([name], max_bad=1).tolist() == [False]  # what is trained on is always decoded whole


def test_what_was_decided_is_said_once_for_all_images(tmp_path, caplog):
    for i in range(3):
        Image.fromarray(np.array([[0, 3000 + i]], dtype=np.uint16)).save(tmp_path / f"{i}.png")
    names = [str(tmp_path / f"{i}.png") for i in range(3)]
    assert usable(names, cache=tmp_path / "scan.json").all()
    assert usable(names, cache=tmp_path / "scan.json").all()  # from the cache
    assert caplog.messages == ["3 of 3 images: grey: 12 of 16 bits are used, 0 to 4095 became 0 to 255"] * 2


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
