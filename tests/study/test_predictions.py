"""Tables of predictions: the authors' two layouts, the report on them, and every way in which a table can be wrong."""

import json
import math

import numpy as np
import pytest

from ldm.study.metrics import predictions
from ldm.study.metrics.cfrt import READINGS, cfrt

SWAPS = """\
seed,path,neutral_support_devices,5_support_devices,10_support_devices,15_support_devices,45_support_devices,neutral_effusion,5_effusion,10_effusion,15_effusion,45_effusion
3091,out/seed3091/s05.png,0.1,0.9,0.8,0.85,0.1,0.3,0.6,0.5,0.4,0.3
12,out/seed12/s05.png,0.2,0.3,0.3,0.3,0.2,0.1,0.4,0.5,0.6,0.1
7,"a path, with a comma",0.25,0.5,0.5,0.5,0.25,0.5,0.75,0.75,0.75,0.5
8,out/seed8/s05.png,0.2,0.9,,0.9,0.2,0.1,0.1,0.1,0.1,0.1
9,out/seed9/s05.png,0.2,0.9,0.9,0.9,nan,0.1,0.1,0.1,0.1,0.1
"""


@pytest.fixture
def table(tmp_path):
    def write(text, name="predictions.csv"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


def replaced(line, text):
    """SWAPS with one of its lines replaced, counted from 1 as an editor does."""
    lines = SWAPS.splitlines()
    lines[line - 1] = text
    return "\n".join(lines) + "\n"


# ---- reading ---------------------------------------------------------------------------------------


def test_a_table_of_swaps(table):
    found = predictions.read(table(SWAPS))
    assert found.seeds == (3091, 12, 7, 8, 9)
    assert found.attributes == ("support_devices", "effusion")
    assert found.steps == (5, 10, 15, 45)
    assert not found.interpolated
    assert found.neutral.tolist() == [[0.1, 0.3], [0.2, 0.1], [0.25, 0.5], [0.2, 0.1], [0.2, 0.1]]
    assert found.swapped[0].tolist() == [[0.9, 0.6], [0.8, 0.5], [0.85, 0.4], [0.1, 0.3]]
    assert math.isnan(found.swapped[3, 1, 0])  # an empty cell
    assert math.isnan(found.swapped[4, 3, 0])  # "nan"
    assert np.isnan(found.swapped).sum() == 2


def test_seeds_that_became_floats_are_the_integers_they_were(table):
    text = "seed,neutral_ink,5_ink\n7.0,.1,.9\n12.,.1,.9\n9007199254740993.0,.1,.9\n-1,.1,.9\n"
    assert predictions.read(table(text)).seeds == (7, 12, 9007199254740993, -1)  # the third: odd, above 2**53
    with pytest.raises(ValueError, match="line 6: seed 7 again, first in line 2"):
        predictions.read(table(text + "7,.1,.9\n"))


@pytest.mark.parametrize("missing", ["", " ", "NA", "N/A", "n/a", "null", "NULL", "None", "NaN", "nan", "-nan", "<NA>"])
def test_a_missing_value_as_pandas_writes_and_reads_it(table, missing):
    found = predictions.read(table(f"seed,neutral_ink,5_ink\n1,{missing},.9\n2,.1,{missing}\n"))
    np.testing.assert_array_equal(found.neutral, [[math.nan], [0.1]])
    np.testing.assert_array_equal(found.swapped, [[[0.9]], [[math.nan]]])


def test_a_table_of_interpolations_has_its_neutral_image_in_frame_0(table):
    frames = range(50)
    header = ",".join(
        ["seed", "disease", *(f"{frame}_{name}" for frame in frames for name in ("hairs", "gel_bubbles"))]
    )
    row = ",".join(["4129", "melanoma", *(f"{(frame + k) / 100}" for frame in frames for k in (0, 1))])
    found = predictions.read(table(f"{header}\n{row}\n"))
    assert found.interpolated
    assert found.attributes == ("hairs", "gel_bubbles")
    assert found.steps == tuple(frames)
    assert found.neutral.tolist() == [[0.0, 0.01]]
    assert found.swapped[0, 30].tolist() == [0.3, 0.31]
    assert predictions.report(found, "hairs")["swap_steps"] == list(range(30, 50))


def test_columns_may_come_in_any_order_and_lines_end_in_any_way(table):
    lines = [line.split(",") for line in SWAPS.splitlines() if '"' not in line]
    turned = "\ufeff" + "\r\n".join(",".join(reversed(line)) for line in lines) + "\r\n\r\n"
    found = predictions.read(table(turned))
    assert found.attributes == ("effusion", "support_devices")
    assert found.steps == (5, 10, 15, 45)
    assert found.swapped[0, :, 1].tolist() == [0.9, 0.8, 0.85, 0.1]


def test_classifiers_in_files_of_their_own_are_joined_by_seed(table):
    whole = predictions.read(table(SWAPS))
    lines = [line.split(",") for line in SWAPS.replace('"a path, with a comma"', "path").splitlines()]
    devices = table("\n".join(",".join(line[:7]) for line in lines), "devices.csv")
    effusion = table("\n".join(",".join(line[:2] + line[7:]) for line in [lines[0], *lines[:0:-1]]), "effusion.csv")
    joined = predictions.read(devices, effusion)
    assert (joined.seeds, joined.attributes, joined.steps) == (whole.seeds, whole.attributes, whole.steps)
    np.testing.assert_array_equal(joined.neutral, whole.neutral)
    np.testing.assert_array_equal(joined.swapped, whole.swapped)


# ---- the report ------------------------------------------------------------------------------------


def test_the_report_by_hand(table):
    found = predictions.report(predictions.read(table(SWAPS)), "support_devices", (5, 10, 15))
    # Changes on the mean of 5, 10, 15, devices against effusion: .75/.2, .1/.4, .25/.25 (a tie), dropped, .7/0.
    readings = found["cfrt"]
    assert tuple(readings) == READINGS
    for reading in ("own_head_signed", "own_head_abs"):
        assert [readings[reading][key] for key in ("value", "n", "ties", "dropped")] == [2 / 4, 4, 1, 1]
        assert readings[reading]["chance"] == 1 / 2
    # 3091's effusion crosses 1/2 at 5.
    assert readings["strict"]["value"] == 1 / 4
    assert [readings["single_f"][key] for key in ("value", "n", "interval")] == [None, 0, [None, None]]
    assert found["flip_rate"]["value"] == 3 / 4  # 3091, 7 and 9; a missing value drops 8
    assert found["decision"] is None
    assert found["swap_steps"] == [5, 10, 15]
    assert found["per_swap_step"]["swap_steps"] == [5, 10, 15, 45]
    json.dumps(found, allow_nan=False)


def test_the_steps_are_the_authors_unless_others_are_asked_for(table):
    found = predictions.read(table(SWAPS))
    assert predictions.report(found, "effusion") == predictions.report(found, "effusion", (5, 10, 15))
    late = predictions.report(found, "support_devices", [45])
    assert late["cfrt"]["own_head_signed"]["dropped"] == 1  # seed 9; 8 is complete at 45
    assert late["cfrt"]["own_head_signed"]["ties"] == 4


def test_the_report_is_that_of_the_arrays(table):
    found = predictions.read(table(SWAPS))
    direct = cfrt(found.neutral, found.swapped[:, None, :3], found.attributes, ["effusion"])["effusion"]
    assert predictions.report(found, "effusion")["cfrt"] == direct["cfrt"]


@pytest.mark.parametrize(
    ("attribute", "steps", "message"),
    [
        ("efusion", (5,), r"attribute: no 'efusion' among .*; did you mean 'effusion'\?"),
        ("ink", (5,), r"attribute: no 'ink' among \['support_devices', 'effusion'\]$"),
        ("effusion", (5, 20), r"swap steps: the table has \[5, 10, 15, 45\], not \[20\]"),
        ("effusion", (), "averaged: expected some of the swap steps"),
    ],
)
def test_what_the_table_has_not_is_named(table, attribute, steps, message):
    with pytest.raises(ValueError, match=message):
        predictions.report(predictions.read(table(SWAPS)), attribute, steps)


def test_one_attribute_has_nothing_to_exceed(table):
    found = predictions.read(table("seed,neutral_ink,5_ink\n1,.1,.9\n"))
    with pytest.raises(ValueError, match="CFRT compares classifiers, expected two or more, got only"):
        predictions.report(found, "ink", (5,))


# ---- tables that do not fit ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "text", "message"),
    [
        (3, "12,p,0.2,0.3,0.3,0.3,0.2,0.1,0.4,0.5,0.6", "line 3: 11 fields, the header has 12"),
        (3, "12,p,0.2,0.3,0.3,0.3,0.2,0.1,0.4,0.5,0.6,0.1,", "line 3: 13 fields, the header has 12"),
        (3, "12,p,0.2,high,0.3,0.3,0.2,0.1,0.4,0.5,0.6,0.1", "line 3: 5_support_devices is 'high', expected a number"),
        (
            3,
            "12,p,0.2,0.3,1.3,0.3,0.2,0.1,0.4,0.5,0.6,0.1",
            r"line 3: 10_support_devices is 1.3, expected a prob.* 0\.\.1",
        ),
        (3, "12,p,0.2,0.3,0.3,0.3,0.2,0.1,-0.4,0.5,0.6,0.1", "line 3: 5_effusion is -0.4"),
        (3, "12,p,0.2,0.3,0.3,0.3,0.2,0.1,inf,0.5,0.6,0.1", "line 3: 5_effusion is inf"),
        (3, "12,p,0.2,nada,0.3,0.3,0.2,0.1,0.4,0.5,0.6,0.1", "line 3: 5_support_devices is 'nada', expected a number"),
        (3, "x,p,0.2,0.3,0.3,0.3,0.2,0.1,0.4,0.5,0.6,0.1", "line 3: seed is 'x', expected an integer"),
        (3, "7.5,p,0.2,0.3,0.3,0.3,0.2,0.1,0.4,0.5,0.6,0.1", "line 3: seed is '7.5', expected an integer"),
        (3, "NA,p,0.2,0.3,0.3,0.3,0.2,0.1,0.4,0.5,0.6,0.1", "line 3: seed is 'NA', expected an integer"),
        (5, "12,p,0.2,0.3,0.3,0.3,0.2,0.1,0.4,0.5,0.6,0.1", "line 5: seed 12 again, first in line 3"),
    ],
)
def test_a_row_that_does_not_fit_is_named_by_line(table, line, text, message):
    with pytest.raises(ValueError, match=rf"predictions\.csv: 1 of 5 rows do not fit: {message}"):
        predictions.read(table(replaced(line, text)))


def test_many_bad_rows_are_one_line_with_a_count(table):
    path = table(SWAPS.splitlines()[0] + "\n" + "".join(f"{seed},p\n" for seed in range(20)))
    with pytest.raises(ValueError, match=r"20 of 20 rows do not fit: line 2: .*line 6: .*; and 15 more$") as caught:
        predictions.read(path)
    assert "\n" not in str(caught.value)


HEADER = SWAPS.splitlines()[0]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "expected a header with seed and neutral_<attribute>"),
        ("image,neutral_a,5_a", "expected a header with seed"),
        ("seed,path,label", "expected columns neutral_<attribute>, 5_<attribute>"),
        (HEADER.replace(",10_effusion", ""), "every attribute needs the same steps, missing 10_effusion$"),
        (HEADER.replace("10_effusion", "10_efusion"), "unknown column '10_efusion', did you mean '10_effusion'?$"),
        (
            HEADER.replace("10_effusion", "10_efusion").replace("15_effusion", "15_efusion"),
            "unknown column '10_efusion', did you mean '10_effusion'?; "
            "unknown column '15_efusion', did you mean '15_effusion'?$",
        ),
        (
            HEADER.replace("neutral_effusion", "nuetral_effusion"),
            "unknown column 'nuetral_effusion', did you mean 'neutral_effusion'?$",
        ),
        (
            HEADER.replace("10_effusion", "10_efusion").replace(",15_support_devices", ""),
            "unknown column '10_efusion', .*'10_effusion'?; every attribute needs .* missing 15_support_devices$",
        ),
        (HEADER.replace("10_effusion", "010_efusion"), "unknown column '010_efusion', did you mean '10_effusion'?$"),
        (
            HEADER.replace("neutral_effusion", "neutral_efusion").replace("45_effusion", "45-effusion"),
            "unknown column 'neutral_efusion', .*; unknown column '45-effusion', did you mean '45_effusion'?$",
        ),
        ("seed,neutral_hair,5_hair,neutral_hairs,10_hairs", "missing 10_hair, 5_hairs$"),  # alike, and both meant
        (HEADER.replace("10_effusion", "5_effusion"), "the header has '5_effusion' twice"),
        (HEADER.replace("10_effusion", "05_effusion"), "the header has '05_effusion' twice"),
        ("seed,5_a,10_a,5_b,10_b", "missing neutral_a, neutral_b$"),
        ("seed,neutral_a,neutral_b", "neutral images only"),
    ],
)
def test_a_header_that_does_not_fit_is_named(table, header, message):
    with pytest.raises(ValueError, match=rf"predictions\.csv: .*{message.replace('?', '[?]')}"):
        predictions.read(table(header + "\n"))


def test_a_table_without_rows(table):
    with pytest.raises(ValueError, match="a header without rows"):
        predictions.read(table(HEADER + "\n"))


def test_a_file_that_is_no_text(tmp_path):
    path = tmp_path / "latents.npy"
    path.write_bytes(b"\x93NUMPY\xff\xfe")
    with pytest.raises(ValueError, match=r"latents\.npy: expected a table with commas in UTF-8") as caught:
        predictions.read(path)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        predictions.read(tmp_path / "none.csv")


A, B = "seed,neutral_a,5_a\n1,.1,.2\n2,.1,.2\n", "seed,neutral_b,5_b\n1,.1,.2\n2,.1,.2\n"


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (A + "3,.1,.2\n", B, r"b\.csv: 1 seeds of .*a\.csv are missing: 3"),
        (A, B + "4,.1,.2\n5,.1,.2\n", r"a\.csv: 2 seeds of .*b\.csv are missing: 4, 5"),
        (A, A, r"b\.csv: \['a'\] also in"),
        (A, B.replace("5_b", "10_b"), r"b\.csv: steps \[10\], but .*a\.csv has \[5\]"),
    ],
)
def test_files_that_do_not_fit_together(table, first, second, message):
    with pytest.raises(ValueError, match=message):
        predictions.read(table(first, "a.csv"), table(second, "b.csv"))
