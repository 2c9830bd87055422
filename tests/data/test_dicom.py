"""DICOM: every transform that stands between stored values and what a radiologist sees, and nothing of the patient."""

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless

from ldm.data import dicom
from ldm.data.decode import decode
from ldm.data.images import load_image, scan
from ldm.data.reading import Reading

RAMP = np.arange(4096, dtype=np.uint16).reshape(64, 64)


def write(path: Path, values: np.ndarray = RAMP, **tags: object) -> Path:
    """A digital radiograph of 12 bits, of a patient with a name."""
    data = Dataset()
    data.file_meta = FileMetaDataset()
    data.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data.SOPClassUID = data.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1.1"
    data.SOPInstanceUID = data.file_meta.MediaStorageSOPInstanceUID = "1.2.3"
    data.PatientName, data.PatientID, data.Modality = "Nobody^Special", "4711", "DX"
    data.Rows, data.Columns = values.shape[-2:] if values.ndim == 3 and "NumberOfFrames" in tags else values.shape[:2]
    data.SamplesPerPixel, data.PhotometricInterpretation = 1, "MONOCHROME2"
    data.BitsAllocated, data.BitsStored, data.HighBit, data.PixelRepresentation = 16, 12, 11, 0
    for name, value in tags.items():
        setattr(data, name, value)
    data.PixelData = values.tobytes()
    data.save_as(path, enforce_file_format=True)
    return path


def grey(path: Path, reading: Reading = Reading()) -> np.ndarray:  # noqa: B008, frozen
    return np.asarray(decode(path, reading).image).reshape(-1).astype(int)


def table(values: list[int], first: int, bits: int) -> Sequence:
    item = Dataset()
    item.LUTDescriptor, item.LUTData = [len(values), first, bits], np.array(values, np.uint16).tobytes()
    return Sequence([item])


def test_a_window_becomes_0_to_255(tmp_path):
    """PS3.3 C.11.2.1.2.1: c = 2048, w = 1024: black up to 1535.5, white from 2559.5 on."""
    seen = grey(write(tmp_path / "a.dcm", WindowCenter=2048, WindowWidth=1024))
    assert seen[:1536].max() == 0
    assert seen[2560:].min() == 255
    assert seen[2048] == round(((2048 - 2047.5) / 1023 + 0.5) * 255)


def test_each_window_has_its_own_function(tmp_path):
    centre, width = 2000.0, 400.0
    x = np.arange(4096.0)
    expected = {
        "LINEAR": np.clip((x - 1999.5) / 399 + 0.5, 0, 1),
        "LINEAR_EXACT": np.clip((x - 2000) / 400 + 0.5, 0, 1),
        "SIGMOID": 1 / (1 + np.exp(-4 * (x - 2000) / 400)),
    }
    for function, unit in expected.items():
        file = write(tmp_path / "a.dcm", WindowCenter=centre, WindowWidth=width, VOILUTFunction=function)
        np.testing.assert_array_equal(grey(file), np.rint(unit * 255))
    with pytest.raises(ValueError, match="function 'CUBIC', expected LINEAR"):
        decode(write(tmp_path / "a.dcm", WindowCenter=centre, WindowWidth=width, VOILUTFunction="CUBIC"))


def test_the_modality_comes_before_the_window(tmp_path):
    file = write(tmp_path / "a.dcm", RescaleSlope=2, RescaleIntercept=-1000, WindowCenter=1000, WindowWidth=2001)
    seen = grey(file)
    assert seen[0] == seen[499] == 0  # 2 * 499 - 1000 < 0
    assert seen[1000] == round((1000.5 - 0) / 2000 * 255)
    assert seen[1501] == 255


def test_the_first_of_several_windows(tmp_path):
    one = grey(write(tmp_path / "a.dcm", WindowCenter=1000, WindowWidth=500))
    several = grey(write(tmp_path / "b.dcm", WindowCenter=[1000, 3000], WindowWidth=[500, 50]))
    np.testing.assert_array_equal(one, several)


def test_a_table_of_interest_goes_before_a_window(tmp_path):
    values = [round(1023 * (i / 4095) ** 2) for i in range(4096)]
    file = write(tmp_path / "a.dcm", VOILUTSequence=table(values, 0, 10), WindowCenter=1, WindowWidth=1)
    np.testing.assert_array_equal(grey(file), np.rint(np.array(values) / 1023 * 255))


def test_a_modality_table(tmp_path):
    values = [255 - i // 16 for i in range(4096)]
    file = write(tmp_path / "a.dcm", ModalityLUTSequence=table(values, 0, 8))
    np.testing.assert_array_equal(grey(file), values)


def test_monochrome1_is_inverted(tmp_path):
    window = {"WindowCenter": 2048, "WindowWidth": 4096}
    one = grey(write(tmp_path / "a.dcm", PhotometricInterpretation="MONOCHROME1", **window))
    other = grey(write(tmp_path / "b.dcm", **window))
    assert np.abs(one - (255 - other)).max() <= 1
    np.testing.assert_array_equal(grey(tmp_path / "b.dcm", Reading(invert=True)), 255 - other)


def test_padding_is_black_whatever_the_window(tmp_path):
    for photometric in ("MONOCHROME1", "MONOCHROME2"):
        file = write(
            tmp_path / "a.dcm",
            PhotometricInterpretation=photometric,
            PixelPaddingValue=4090,
            PixelPaddingRangeLimit=4095,
            WindowCenter=2048,
            WindowWidth=4096,
        )
        assert (grey(file)[4090:] == 0).all()


def test_without_a_window_the_bits_that_are_used(tmp_path):
    file = write(tmp_path / "a.dcm", RAMP // 4, BitsStored=16, HighBit=15)  # 0..1023: ten bits
    assert grey(file).max() == 255
    assert "without a window in use: 0 to 1023" in decode(file).remarks[0]
    assert grey(file, Reading(grey_range="type")).max() == 4
    signed = write(tmp_path / "b.dcm", RAMP.astype(np.int16) - 2048, PixelRepresentation=1)
    assert (grey(signed)[[0, -1]] == [0, 255]).all()


def test_percentiles_leave_the_window_and_the_padding_alone(tmp_path):
    values = np.clip(RAMP, 0, 2000)
    values[0] = 4095
    file = write(tmp_path / "a.dcm", values, PixelPaddingValue=4095, WindowCenter=10, WindowWidth=5)
    seen = grey(file, Reading(grey_range="percentiles"))
    assert (seen[:64] == 0).all()
    assert seen[3000] == 255
    assert 120 < seen[1000] < 135


def test_colour(tmp_path):
    photo = np.zeros((4, 5, 3), dtype=np.uint8)
    photo[..., 0] = 200
    bits = {"BitsAllocated": 8, "BitsStored": 8, "HighBit": 7, "PlanarConfiguration": 0}
    file = write(tmp_path / "a.dcm", photo, SamplesPerPixel=3, PhotometricInterpretation="RGB", Modality="XC", **bits)
    np.testing.assert_array_equal(np.asarray(decode(file).image), photo)
    assert decode(file).kind == "DICOM XC RGB"


def test_a_file_without_extension_is_known_by_its_bytes(tmp_path):
    write(tmp_path / "IM000001", WindowCenter=2048, WindowWidth=4096)
    assert load_image(tmp_path / "IM000001", 64).shape == (64, 64, 3)


def test_nothing_of_the_patient_is_read(tmp_path, monkeypatch):
    file = write(tmp_path / "a.dcm", WindowCenter=2048, WindowWidth=4096)
    read, held = pydicom.dcmread, []
    monkeypatch.setattr(pydicom, "dcmread", lambda *args, **kwargs: held.append(read(*args, **kwargs)) or held[-1])
    decode(file)
    assert {element.keyword for element in held[0]} <= set(dicom.TAGS)
    assert "PatientName" not in held[0]


@pytest.mark.parametrize(
    ("tags", "values", "complaint"),
    [
        ({"NumberOfFrames": 2}, np.stack([RAMP, RAMP]), "2 frames in one DICOM file"),
        ({"WindowCenter": 5, "WindowWidth": 0}, RAMP, "a window of width 0"),
    ],
)
def test_what_is_refused(tmp_path, tags, values, complaint):
    file = write(tmp_path / "a.dcm", values, **tags)
    with pytest.raises(ValueError, match=complaint):
        load_image(file, 8)
    assert complaint in scan([str(file)])[0].reason


def test_a_compression_that_nothing_decodes_is_named(tmp_path):
    file = write(tmp_path / "a.dcm")
    data = pydicom.dcmread(file)
    data.PixelData = pydicom.encaps.encapsulate([b"\0" * 64])
    data["PixelData"].is_undefined_length = True
    data.file_meta.TransferSyntaxUID = JPEGLSLossless
    data.save_as(file)
    with pytest.raises(ValueError, match=r"JPEG-LS Lossless.* cannot be decoded .*pylibjpeg"):
        load_image(file, 8)


@pytest.mark.parametrize("content", [b"", b"\0" * 128 + b"DICM", b"no image"])
def test_files_that_only_look_like_it(tmp_path, content):
    (tmp_path / "a.dcm").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.dcm: .*DICOM"):
        load_image(tmp_path / "a.dcm", 8)
