"""Tables: every number of the results arrives in all three formats, and what is missing is a dash."""

import copy
import csv as csv_files
import io
import json
import re

import pytest
from made_up_results import SWAP_STEPS, made_up_results

from ldm.study.report.results import Estimate, attributes, estimate, find, number, plain, series
from ldm.study.report.table_formats import escape
from ldm.study.report.tables import (
    Table,
    csv,
    latex,
    markdown,
    table_1,
    table_2,
    table_3,
    table_methods,
    table_path,
    table_readings,
    table_truth,
    table_truth_steps,
    write_tables,
)

ALL = (table_1, table_2, table_3, table_readings, table_methods, table_path, table_truth, table_truth_steps)


@pytest.fixture
def results():
    return made_up_results()


def from_csv(table):
    return list(csv_files.DictReader(io.StringIO(csv(table))))


def from_markdown(table):
    lines = [line for line in markdown(table).splitlines() if line.startswith("|")]
    split = [[cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return split[0], split[2:]


# ---- reading ---------------------------------------------------------------------------------------


def test_what_is_missing_is_none():
    assert find({"a": {"b": 0}}, "a", "b") == 0
    assert find({"a": None}, "a", "b") is None
    assert find({"a": 3}, "a", "b") is None
    assert [number(x) for x in (None, float("nan"), float("inf"), "0.5", True)] == [None] * 5
    assert (number(3), number(0.5)) == (3, 0.5)
    assert isinstance(number(3), int)
    assert estimate({"value": None, "interval": [0, 1]}) is None
    assert estimate({"value": 0.5, "interval": [None, 1]}) == Estimate(0.5)
    assert estimate({"value": 0.5, "interval": [0.4, 0.6]}) == Estimate(0.5, 0.4, 0.6)
    assert estimate(0.5) == Estimate(0.5)
    assert series([1, None, 0.5], 3).tolist()[::2] == [1.0, 0.5]
    assert all(x != x for x in series([1, 2], 3))  # a list of another length says nothing about which step is which


def test_names_read_as_words():
    assert [plain(name) for name in ("gel_bubble", "MEL", "Pleural Effusion")] == [
        *("Gel bubble", "MEL", "Pleural Effusion")
    ]


# ---- formats ---------------------------------------------------------------------------------------


SMALL = Table(
    "Title & more",
    ("Name", "Share", "Count", "two\nlines"),
    (("a_b", Estimate(0.98765, 0.5, 1.0), 12004, 0.25), ("c|d", None, None, -0.1234567890123)),
    "Below 50 % & a_b <x>",
)


def test_markdown_by_hand():
    assert markdown(SMALL).splitlines() == [
        "**Title & more**",
        "",
        "| Name | Share | Count | two lines |",
        "| --- | ---: | ---: | ---: |",
        "| a_b | 0.988 [0.500, 1.000] | 12,004 | 0.250 |",
        r"| c\|d | - | - | -0.123 |",
        "",
        "Below 50 % & a_b &lt;x>",
    ]


def test_csv_by_hand():
    assert csv(SMALL).splitlines() == [
        "Name,Share,Share: low,Share: high,Count,two lines",
        "a_b,0.98765,0.5,1.0,12004,0.25",
        "c|d,,,,,-0.1234567890123",
    ]


def test_latex_by_hand():
    text = latex(SMALL)
    assert r"\begin{tabular}{@{}lrrr@{}}" in text
    assert r"Name & Share & Count & \shortstack[r]{two\\lines} \\" in text
    assert r"a\_b & 0.988 {\tiny [0.500, 1.000]} & 12,004 & 0.250 \\" in text
    assert r"c|d & - & - & $-$0.123 \\" in text
    assert r"\caption{Title \& more}" in text
    assert r"Below 50 \% \& a\_b \textless{}x\textgreater{}" in text


def test_every_special_sign_is_escaped():
    signs = "\\&%$#_{}~^<>"
    assert escape(signs) == (
        r"\textbackslash{}\&\%\$\#\_\{\}\textasciitilde{}\textasciicircum{}\textless{}\textgreater{}"
    )
    assert escape("plain 0.5 [a]") == "plain 0.5 [a]"


def test_minus_zero_is_zero():
    assert "-0.000" not in markdown(Table("t", ("a",), ((-0.00001,),)))


def test_a_long_table_breaks_across_pages_and_repeats_its_head():
    long = Table("t", ("a", "b"), tuple(("same", 0.1 * i) for i in range(46)))
    assert r"\begin{longtable}" in latex(long)
    assert r"\endhead" in latex(long)
    assert r"\begin{longtable}" not in latex(Table("t", ("a", "b"), long.rows[:45]))


def test_latex_leaves_out_words_that_repeat_the_row_above():
    rows = (("A", "x", 1), ("A", "x", 1), ("A", "y", 2), ("B", "x", 3))
    lines = latex(Table("t", ("a", "b", "n"), rows)).splitlines()
    start = lines.index(r"\midrule")
    expected = [r"A & x & 1 \\", r" &  & 1 \\", r" & y & 2 \\", r"\addlinespace", r"B & x & 3 \\"]
    assert lines[start + 1 : start + 6] == expected


@pytest.mark.parametrize("build", ALL)
def test_latex_braces_and_environments_close(build, results):
    text = latex(build(results))
    bare = re.sub(r"\\[{}]", "", text.replace(r"\\", ""))
    assert bare.count("{") == bare.count("}")
    assert sorted(re.findall(r"\\begin{(.*?)}", text)) == sorted(re.findall(r"\\end{(.*?)}", text))
    columns = len(re.search(r"{@{}([lr]+)@{}}", text)[1])
    for line in text.splitlines():
        if line.endswith((r" \\", r" \\[2pt]")) and not line.startswith(r"\caption"):
            assert len(re.findall(r"(?<!\\)&", line)) == columns - 1


# ---- the tables ------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", ALL)
def test_every_number_survives_csv_exactly_and_markdown_rounded(build, results):
    table = build(results)
    header, shown = from_markdown(table)
    rows = from_csv(table)
    assert header == [column.replace("\n", " ") for column in table.columns]
    assert len(rows) == len(shown) == len(table.rows) > 0
    for cells, exact, rounded in zip(table.rows, rows, shown, strict=True):
        for name, cell, text in zip(header, cells, rounded, strict=True):
            if isinstance(cell, Estimate):
                assert float(exact[name]) == cell.value
                assert text.startswith(f"{cell.value:.3f}")
                if cell.low is not None:
                    assert (float(exact[f"{name}: low"]), float(exact[f"{name}: high"])) == (cell.low, cell.high)
                    assert text.endswith(f"[{cell.low:.3f}, {cell.high:.3f}]")
            elif isinstance(cell, float):
                assert (float(exact[name]), text) == (cell, f"{cell:z.3f}")
            else:
                assert exact[name] == ("" if cell is None else str(cell))
                assert text.replace(",", "") == (exact[name].replace(",", "") or "-")


def test_table_1_has_a_row_per_head(results):
    table = table_1(results)
    assert [row[:2] for row in table.rows] == [
        ("CheXpert phantoms (drawn)", "Pleural effusion"),
        ("CheXpert phantoms (drawn)", "Support devices"),
        ("ISIC 2019 phantoms (drawn)", "Melanoma"),
        ("ISIC 2019 phantoms (drawn)", "Hair"),
        ("ISIC 2019 phantoms (drawn)", "Gel bubbles"),  # titled as in the other tables
        ("ISIC 2019 phantoms (drawn)", "Ruler"),
        ("ISIC 2019 phantoms (drawn)", "Ink"),
    ]
    f1 = results["classifiers"]["chexpert_classifier"]["attributes"]["pleural_effusion"]["f1"]
    assert table.rows[0][table.columns.index("F1")] == Estimate(f1["value"], *f1["interval"])
    assert "Networks: CheXpert phantoms (drawn): tinynet_e; ISIC 2019 phantoms (drawn): tinynet_e." in table.note


def test_table_1_names_the_data_whatever_the_file_is_called(results):
    first, second = results["classifiers"].values()
    first["phantoms"] = False
    del second["data"]
    del second["phantoms"]
    assert {row[0] for row in table_1(results).rows} == {"CheXpert", "Isic classifier"}


def test_table_2_puts_the_paper_beside_ours_and_says_what_that_means(results):
    table = table_2(results)
    printed = {row[1:3]: row[-2:] for row in table.rows}
    assert printed == {
        (None, "Pleural effusion"): ("0.78", "0.73"),
        (None, "Support devices"): ("0.89", "0.86"),
        ("Melanoma", "Hair"): ("0.907", None),
        ("Melanoma", "Gel bubbles"): ("0.985", None),
        ("Melanoma", "Ruler"): ("0.721", None),
        ("Melanoma", "Ink"): ("0.59", None),
        ("Nevus", "Hair"): ("0.855", None),
        ("Nevus", "Gel bubbles"): ("0.973", None),
        ("Nevus", "Ruler"): ("0.956", None),
        ("Nevus", "Ink"): ("0.71", None),
    }
    assert "not comparable" in table.note
    assert "phantoms" in table.note
    ours = results["cells"]["mel"]["attributes"]["ink"]["swaps"]["cfrt"]["own_head_signed"]
    row = next(row for row in table.rows if row[1:3] == ("Melanoma", "Ink"))
    assert row[3] == Estimate(ours["value"], *ours["interval"])


def test_the_papers_values_stand_only_beside_the_papers_cells(results):
    results["cells"]["chest"]["title"] = "Hand X-ray"
    assert table_2(results).rows[0][0] == "Hand X-ray"
    assert table_2(results).rows[0][-2:] == (None, None)


def test_table_2_says_what_its_means_are_over(results):
    note = table_2(results).note
    assert "CFRT as own_head_signed, mean of swap steps 5, 10, 15 and of frames 30-49 of the curve." in note
    assert "LPIPS and SSIM to the neutral image, mean of all swap steps and of the same frames." in note


def test_a_distance_that_is_not_available_says_why_once(results):
    table = table_2(results)
    assert table.note.endswith("scores. LPIPS was not measured: no weights; `ldm evaluate --fetch` gets them.")
    lpips = table.columns.index("LPIPS\nswaps")
    assert {row[lpips] for row in table.rows} == {None}
    assert r"no weights; \texttt{ldm evaluate --fetch} gets them." in latex(table)


def test_table_3_without_data_is_of_what_the_classifiers_saw(results):
    del results["datasets"]
    for classifier in results["classifiers"].values():
        classifier |= {"data": "chexpert", "phantoms": True, "images": {"train": 80, "validation": 9, "test": 11}}
        classifier["attributes"] = {"pleural_effusion": {"n": 11, "positives": 4}}
    table = table_3(results)
    data = "CheXpert phantoms (drawn)"
    assert table.rows == ((data, "Images", 80, 9, 11), (data, "Pleural effusion", None, None, 4))
    assert "trained and tested on" in table.note
    results["classifiers"] = {"of old": {"attributes": {}}}
    assert table_3(results).rows == ()


def test_table_3_counts(results):
    data = "CheXpert"
    assert table_3(results).rows[0] == (data, "Images", 12004, 2119, 2493)
    assert table_3(results).rows[1] == (data, "Pleural effusion", 12004 // 3, 2119 // 3, 2493 // 3)
    results["datasets"]["chexpert"]["phantoms"] = True
    assert table_3(results).rows[0] == ("CheXpert phantoms (drawn)", "Images", 12004, 2119, 2493)


def test_table_readings_has_every_reading_of_both_kinds(results):
    table = table_readings(results)
    assert len(table.rows) == 10 * 2 * 4
    single = results["cells"]["nv"]["attributes"]["ink"]["interpolations"]["cfrt"]["single_f"]
    row = next(r for r in table.rows if r[:4] == ("Nevus", "Ink", "interpolations", "single_f"))
    assert row[5:] == (single["n"], single["ties"], single["dropped"], single["chance"])


def test_table_methods_takes_each_baseline_from_its_own_reference(results):
    scores = results["cells"]["chest"]["attributes"]["pleural_effusion"]

    def value(report):
        return report["cfrt"]["own_head_signed"]["value"]

    scores["baselines"]["ramp_blend"]["difference"] = {
        "own_head_signed": {"value": -0.2, "interval": [-0.3, -0.1]},
    }
    differences = {row[2]: row[5] for row in table_methods(results).rows[:7]}
    assert differences["prompt swaps"] is None
    assert differences["straight chord"].value == value(scores["baselines"]["chord"]) - value(scores["interpolations"])
    linear = value(scores["baselines"]["linear_direction"]) - value(scores["swaps"])
    assert differences["linear direction"] == Estimate(linear)
    assert differences["ramped blend"] == Estimate(-0.2, -0.3, -0.1)


def test_table_methods_says_how_many_seeds_each_method_has(results):
    table = table_methods(results)
    seeds = {row[2]: row[table.columns.index("n")] for row in table.rows[:7]}
    assert seeds == {"prompt swaps": 200, "Bezier curve": 200, **dict.fromkeys(list(seeds)[2:], 8)}


def test_table_path_puts_trajectories_between_a_line_and_a_walk(results):
    table = table_path(results)
    path = results["cells"]["nv"]["attributes"]["ink"]["path"]
    assert len(table.rows) == 10 + 2
    *row, no_line, strength = table.rows[9]
    assert row[:3] == ["Nevus", "Ink", 200]
    measures = ("arc_over_chord", "total_turning", "line_residual", "first_direction")
    assert row[3:] == [Estimate(path[measure]["value"], *path[measure]["interval"]) for measure in measures]
    departs = path["first_direction"]["departs"]
    assert no_line == Estimate(departs["value"], *departs["interval"])
    assert strength == Estimate(0.61, 0.55, 0.67)
    assert table.rows[10] == ("Straight line", None, None, 1.0, 0.0, 0.0, 1.0, None, None)
    assert table.rows[11] == ("Random walk", None, None, *(path[measure]["walk"] for measure in measures), None, None)
    assert "No line: share of seeds whose first direction holds less than 95 %." in table.note


def test_table_path_without_paths_has_no_rows(results):
    for a in attributes(results):
        del a.scores["path"]
    assert table_path(results).rows == ()


def test_table_truth_is_the_worst_where_the_edit_is_made(results):
    truth = results["cells"]["chest"]["attributes"]["pleural_effusion"]["truth"]
    truth["per_swap_step"] = {
        "swap_steps": [5, 10, 15, 20],
        "flip_rate": [1.0, 0.9, None, 0.89],
        "skill": [0.7, 0.6, 0.1, 0.0],
        "leakage": [0.1, None, 0.9, 0.9],
        "retrieval": [0.97, 0.99, 0.0, 0.0],
    }
    assert table_truth(results).rows[0][3:7] == ("5, 10", 0.6, 0.1, 0.97)
    truth["per_swap_step"]["flip_rate"] = [0.1] * 4
    assert table_truth(results).rows[0][3:7] == (None, None, None, None)


def test_table_truth_has_the_floor_of_each_part_of_the_chain(results):
    floors = {
        **{"Floor: skill": "0.85", "Floor: leakage": "0.04", "Floor: retrieval": "0.99", "Floor: oracle": "0.97"},
        **{"Latent error": "0.012", "PSNR (dB)": "31.4"},
    }
    row = from_csv(table_truth(results))[0]
    assert {name: row[name] for name in floors} == floors
    for a in attributes(results):  # files of before
        del a.scores["truth"]["floor"]["retrieval"]
    assert from_csv(table_truth(results))[0]["Floor: retrieval"] == ""


@pytest.mark.parametrize("build", [table_truth, table_truth_steps])
def test_the_notes_say_whose_floor_is_whose(build, results):
    assert "The floors of skill and leakage are the autoencoder's alone" in build(results).note
    assert "Those of retrieval and oracle are the inversion's" in build(results).note


def test_truth_per_swap_step_goes_from_the_late_swap_to_the_early_one_and_ends_at_the_floor(results):
    table = table_truth_steps(results)
    assert [row[2] for row in table.rows[:10]] == [*SWAP_STEPS[::-1], "floor"]
    assert table.rows[9] == ("Chest X-ray", "Pleural effusion", "floor", 0.85, 0.04, 0.99, None, 0.97)
    for a in attributes(results):
        a.scores["truth"]["floor"] = {"psnr": 31.4}
    assert "floor" not in {row[2] for row in table_truth_steps(results).rows}


# ---- what is missing -------------------------------------------------------------------------------


def paths(node, path=()):
    if path:
        yield path
    for key in node if isinstance(node, dict) else ():
        yield from paths(node[key], (*path, key))


def test_any_value_may_be_null_or_left_out(results):
    # One cell and one data set stand for all, and one baseline for five.
    results["cells"] = {"chest": results["cells"]["chest"]}
    results["cells"]["chest"]["attributes"].pop("support_devices")
    scores = results["cells"]["chest"]["attributes"]["pleural_effusion"]
    scores["baselines"] = {"chord": scores["baselines"]["chord"]}
    for path in paths(results):
        for leave_out in (False, True):
            damaged = copy.deepcopy(results)
            parent = find(damaged, *path[:-1]) if path[:-1] else damaged
            if leave_out:
                del parent[path[-1]]
            else:
                parent[path[-1]] = None
            for build in ALL:
                text = markdown(build(damaged)) + csv(build(damaged))
                assert not re.search(r"\b(None|nan)\b", text), path


def test_what_was_not_measured_is_no_row_of_dashes(results):
    """And where a part was, the others are dashes, empty in CSV, so that a column of numbers is one."""
    first, *others = (a.scores for a in attributes(results))
    for scores in others:
        scores.clear()
    for name in ("swaps", "interpolations", "lpips", "baselines", "truth"):
        first[name] = None
    (row,) = from_csv(table_2(results))
    assert [row["CFRT swaps"], row["LPIPS swaps"]] == ["", ""]
    assert float(row["SSIM swaps"])
    assert "| - |" in markdown(table_2(results))
    for build in (table_readings, table_methods, table_truth, table_truth_steps):
        assert build(results).rows == ()


# ---- files -----------------------------------------------------------------------------------------


def test_the_same_results_give_the_same_bytes(results, tmp_path):
    first = write_tables(results, tmp_path / "a")
    second = write_tables(json.loads(json.dumps(results)), tmp_path / "b")
    assert [path.name for path in first] == [
        f"{name}.{ending}" for name in [build.__name__ for build in ALL] for ending in ("md", "csv", "tex")
    ]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]
    assert sorted((tmp_path / "a" / "tables").iterdir()) == sorted(first)  # no partial file is left


def test_tables_without_rows_are_not_written(tmp_path):
    assert write_tables({}, tmp_path) == []
    assert list(tmp_path.iterdir()) == []
