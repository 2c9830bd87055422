"""`ldm bench unet --growth`: points, fit, row file, figure. No time itself is asserted."""

import csv
import json

import numpy as np
import pytest
import torch
from ldm_tools import cli
from ldm_tools.bench import growth as command
from ldm_tools.bench import networks as subjects
from PIL import Image
from tiny_model import UNET

from ldm.bench import growth, networks
from ldm.bench.growth import Point
from ldm.bench.rows import RowFile
from ldm.config import CLIPConfig, Config, VAEConfig
from ldm.unet import UNet

TINY = Config(CLIPConfig(), VAEConfig(widths=(8, 8)), UNET)  # 16 px, latents of 8 x 8
SIZES = np.array([1, 2, 4, 8])


@pytest.fixture
def bench(tiny, tmp_path):
    common = ["--weights", str(tiny), "--rounds", "3", "--out", str(tmp_path / "out")]
    return lambda *options: cli.main(["bench", "unet", *common, *options])


# ---- the exponent ----------------------------------------------------------------------------------


def test_a_power_law_is_found_again():
    found = growth.fit(SIZES, np.tile(3 * SIZES**1.5, (5, 1)))
    assert found["exponent"] == pytest.approx(1.5)
    assert found["interval"] == pytest.approx([1.5, 1.5])
    assert found["ms_at_one"] == pytest.approx(3)
    assert found["worst"] == pytest.approx(0, abs=1e-9)
    assert found["slopes"] == pytest.approx([1.5] * 3)


def test_fixed_costs_bend_the_small_end_and_are_told():
    found = growth.fit(SIZES, np.tile(4 + SIZES, (3, 1)))
    assert found["exponent"] < 0.7
    assert found["worst"] > 0.05
    assert found["slopes"] == sorted(found["slopes"])


def test_one_slow_round_moves_the_interval_and_not_the_exponent():
    taken = np.tile(2.0 * SIZES, (5, 1))
    taken[3] *= [1, 1, 4, 4]
    found = growth.fit(SIZES, taken)
    assert found["exponent"] == pytest.approx(1)
    assert found["interval"][0] == pytest.approx(1)
    assert found["interval"][1] > 1.01


def test_two_rounds_have_no_interval_and_one_size_no_exponent():
    assert growth.fit(SIZES, np.ones((2, 4)))["interval"] is None
    with pytest.raises(ValueError, match="1 sizes, expected 2 or more"):
        growth.fit([4, 4], np.ones((3, 2)))


# ---- points and rounds -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "multiple", "sides"),
    [
        (64, 8, [32, 48, 64, 96, 128]),
        (16, 4, [16, 24, 32, 48, 64]),
        (8, 2, [8, 12, 16, 24, 32]),
        (4, 4, [4, 8, 12, 16]),
    ],
)
def test_sides_stand_around_a_models_own(side, multiple, sides):
    assert growth.usual_sides(side, multiple) == sides


def test_in_two_rounds_each_point_comes_as_often_before_as_behind_another():
    points = [Point(rows, 8) for rows in range(6)]
    first, second, third = (growth.order(points, turn) for turn in range(3))
    assert second == first[::-1]
    assert sorted(third) == points != third
    assert third != first


def test_each_round_visits_each_point_and_a_stopped_run_goes_on(tmp_path):
    points, called, now = [Point(1, 8), Point(4, 8)], [], iter(range(100))

    def stop():
        raise KeyboardInterrupt

    def run(progress):
        file = RowFile(tmp_path / "growth.jsonl", {}, growth.NAMES)
        growth.measure(called.append, points, 3, lambda: next(now), file, progress)
        return growth.times(file, points, 3)

    with pytest.raises(KeyboardInterrupt):
        run(stop)
    assert len(called) == 2  # warmed up, and timed
    assert run(lambda: None).tolist() == [[1000, 1000]] * 3  # a tick of that clock each
    assert len(called) == 2 + 2 + 5
    assert run(called.append).shape == (3, 2)
    assert len(called) == 2 + 2 + 5  # all was there


def test_operations_of_many_rows_are_as_many_times_those_of_one():
    network = UNet(UNET).eval()
    x_t, context = command.random_inputs(TINY, torch.zeros(1), Point(3, 12))
    with torch.inference_mode():
        counted = networks.count_gflop(lambda: network(x_t, 500, context))
    one = command.gflop_of(network, TINY, torch.zeros(1), 12)
    assert counted == pytest.approx(3 * one, rel=1e-2)


# ---- the command -----------------------------------------------------------------------------------


def test_the_command_writes_a_figure_and_its_numbers(bench, tmp_path, capsys):
    assert bench("--growth", "--growth-rows", "1,2,4", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    rows, pixels = (result["series"][name] for name in ("rows", "pixels"))
    assert [point["rows"] for point in rows["points"]] == [1, 2, 4]
    assert {point["px"] for point in rows["points"]} == {16}
    assert [point["px"] for point in pixels["points"]] == [16, 24, 32, 48, 64]
    assert [point["size"] for point in pixels["points"]] == [px**2 for px in (16, 24, 32, 48, 64)]
    assert {point["rows"] for point in pixels["points"]} == {2}
    assert rows["operations_exponent"] == pytest.approx(1)
    assert pixels["operations_exponent"] > 1  # self-attention
    for one in (rows, pixels):
        assert one["interval"][0] <= one["interval"][1]
        assert all(point["p20_ms"] <= point["median_ms"] <= point["p80_ms"] for point in one["points"])
    assert result == json.loads((tmp_path / "out" / "growth.json").read_text())
    lines = list(csv.DictReader((tmp_path / "out" / "growth.csv").open()))
    assert [line["series"] for line in lines] == ["rows"] * 3 + ["pixels"] * 5
    assert len((tmp_path / "out" / "growth.jsonl").read_text().splitlines()) == 1 + 3 * 7  # a point is in both series
    with Image.open(tmp_path / "out" / "growth.png") as picture:
        assert picture.width > 1000


def test_a_second_run_reads_what_is_there_and_other_settings_are_refused(bench, capsys, monkeypatch):
    sizes = ["--growth", "--growth-rows", "1,2", "--growth-sizes", "16,32"]
    assert bench(*sizes) == 0
    first = capsys.readouterr().out
    assert "time ~ rows^" in first
    assert "time ~ pixels^" in first
    monkeypatch.setattr(growth, "measure", lambda *args: None)
    assert bench(*sizes) == 0
    again = capsys.readouterr()
    assert again.out == first
    assert "9 of 9 timings are read" in again.err
    assert bench(*sizes, "--clock", "cpu") == 2
    assert "other settings (clock was wall, is cpu)" in capsys.readouterr().err


def test_random_weights_of_sd15s_size_take_the_same_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(subjects, "SD15", TINY)
    sizes = ["--growth", "--growth-rows", "1,2", "--growth-sizes", "16,32", "--out", str(tmp_path / "sd15")]
    assert cli.main(["bench", "unet", "--random-sd15", "--rounds", "3", "--json", *sizes]) == 0
    found = json.loads(capsys.readouterr().out)["series"]
    assert [point["px"] for point in found["pixels"]["points"]] == [16, 32]


def test_what_memory_has_no_room_for_is_left_out_and_named(bench, capsys, monkeypatch):
    room = growth.need_bytes(Point(2, 24), UNET.widths[0], 4)
    monkeypatch.setattr(growth, "room_bytes", lambda device: room)
    assert bench("--growth", "--growth-rows", "1,2") == 0
    out = capsys.readouterr().out
    assert "left out: 2 rows of 64 px" in out
    assert "48 px:" not in out
    monkeypatch.setattr(growth, "room_bytes", lambda device: 1)
    assert bench("--growth", "--out", "elsewhere") == 2
    assert "--growth-rows: 0 points" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--growth", "--growth-rows", "0,2"], "--growth-rows: got 0"),
        (["--growth", "--growth-rows", "two"], "--growth-rows: got 'two'"),
        (["--growth", "--growth-rows", "4"], "--growth-rows: 1 points, expected 2 or more"),
        (["--growth", "--growth-sizes", "16,30"], "--growth-sizes: got 30, expected multiples of 4 px"),
        (["--growth", "--size", "7"], "--size: got 7, expected a multiple of 2"),
        (["--growth", "--compile"], "--compile: it does nothing beside --growth"),
        (["--growth", "--against", "openvino"], "--against: it does nothing beside --growth"),
        ([], "--out: it belongs to --growth"),
        (["--growth", "--random-sd15"], "--weights: it does nothing beside --random-sd15"),
    ],
)
def test_options_that_do_not_fit_are_one_line(bench, capsys, options, complaint):
    assert bench(*options) == 2
    assert complaint in capsys.readouterr().err.strip().splitlines()[-1]
