"""`ldm bench inversion`: what is measured, what the numbers mean, and that a failure shows. No time is asserted."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm_tools.bench import inversion as command
from ldm_tools.bench.inversion import scales
from ldm_tools.cli import main
from PIL import Image

import ldm
from ldm.bench import inversion
from ldm.bench.inversion import Case, Subject, cases, guidance_label, measure, table, target_of
from ldm.pipeline import StableDiffusion


@pytest.fixture(scope="module")
def sd(tiny: Path) -> StableDiffusion:
    return ldm.load(tiny)


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject("noise", "a chest", np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))


def test_the_grid_holds_every_combination_and_what_guidance_does_afterwards():
    todo = cases((10, 50), (1.0, 7.5), ("float32", "bfloat16"))
    assert len(todo) == len(set(todo)) == 2 * 2 * 2 * 3 + 2
    assert [(c.steps, c.guidance, c.guidance_down, c.negative) for c in todo[-2:]] == [
        (50, 1, 7.5, "empty"),
        (50, 1, 7.5, "prompt"),
    ]
    assert len(cases((10,), (1.0,), ("float32",))) == 3  # nothing to contrast


def test_rows_count_what_the_network_was_asked(sd: StableDiffusion, subject: Subject):
    def rows(**options: object) -> tuple[float, float]:
        found = measure(sd, Case(steps=4, dtype="float32", **options), subject)
        return found["rows_up"], found["rows_down"]

    assert rows(method="naive", guidance=1.0, guidance_down=1.0) == (4, 4)
    assert rows(method="edict", guidance=1.0, guidance_down=1.0) == (8, 8)
    assert rows(method="edict", guidance=2.0, guidance_down=2.0) == (16, 16)
    assert rows(method="naive", guidance=1.0, guidance_down=2.0) == (4, 8)
    up, down = rows(method="fixed-point", guidance=1.0, guidance_down=1.0)
    assert up > 4 == down


def test_a_measurement_is_what_the_library_finds(sd: StableDiffusion, subject: Subject):
    def measured(method: str, down: float = 1.0, negative: str = "empty") -> dict[str, float]:
        case = Case(method=method, steps=5, guidance=1.0, guidance_down=down, negative=negative, dtype="float32")
        return measure(sd, case, subject)

    naive, exact = measured("naive"), measured("fixed-point")
    assert exact["round_trip_error"] < naive["round_trip_error"] / 50  # random weights in five steps: 3e-3 against 1
    assert measured("edict")["round_trip_error"] < 1e-4  # rounding
    # Sampling at another guidance leads elsewhere, unless the prompt is its own negative.
    assert measured("fixed-point", 7.5)["round_trip_error"] > 10 * exact["round_trip_error"]
    assert measured("fixed-point", 7.5, "prompt")["round_trip_error"] < 10 * exact["round_trip_error"]
    floor = inversion.psnr_db(sd, subject, inversion.encode(sd, subject))
    assert exact["psnr_db"] == pytest.approx(floor, abs=0.5)


def test_a_latent_that_is_lost_to_infinity_has_no_psnr(sd: StableDiffusion, subject: Subject):
    assert math.isnan(inversion.psnr_db(sd, subject, torch.full((1, 4, 8, 8), math.inf)))


def test_of_several_images_the_worst_error_counts(monkeypatch: pytest.MonkeyPatch, subject: Subject):
    errors = iter([1e-4, 3e-4])
    monkeypatch.setattr(inversion, "measure", lambda *_: {"round_trip_error": next(errors), "psnr_db": 30.0})
    (case, *_) = cases((10,), (1.0,), ("float32",))
    (row,) = inversion.scorecard({"float32": None}, [subject, subject], [case])
    assert row["round_trip_error"] == 3e-4
    assert (row["method"], row["steps"], row["psnr_db"]) == ("naive", 10, 30.0)


def test_a_method_that_errs_is_found_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch):
    inversion.check()
    monkeypatch.setitem(
        inversion.METHODS, "naive", lambda eps_fn, x, schedule, steps: inversion.ddim(eps_fn, x, schedule, steps)
    )
    with pytest.raises(ValueError, match="naive: comes back with an error"):
        inversion.check()


def made_up(method: str, error: float, **other: object) -> dict[str, object]:
    row = {
        "method": method,
        "steps": 50,
        "guidance": 1.0,
        "guidance_down": 1.0,
        "negative": "empty",
        "dtype": "float32",
    }
    measured = {"psnr_db": 30.0, "noise_std": 1.0, "rows_up": 50.0, "rows_down": 50.0, "seconds": 1.0}
    return row | measured | {"round_trip_error": error} | other


def test_the_target_is_met_by_either_of_the_better_methods_and_by_nothing_else():
    others = [made_up("edict", 1e-9, dtype="bfloat16"), made_up("edict", 1e-9, steps=10), made_up("naive", 1e-9)]
    assert not target_of([made_up("fixed-point", 2e-3), made_up("edict", 5e-3), *others])["reached"]
    found = target_of([made_up("fixed-point", math.nan), made_up("edict", 1e-3), *others])
    assert found["reached"]
    assert set(found["errors"]) == {"fixed-point", "edict"}


def test_the_table_and_the_figure_show_what_failed():
    rows = [
        made_up("naive", 0.04),
        made_up("fixed-point", 1e-5, rows_up=200.0),
        made_up("naive", math.inf, guidance=7.5, guidance_down=7.5),
        made_up("fixed-point", math.nan, guidance=7.5, guidance_down=7.5),
        made_up("fixed-point", 2e-5, guidance_down=7.5, negative="prompt"),
    ]
    text = table(rows)
    assert len(text.splitlines()) == 2 + 5
    assert "inf" in text
    assert "nan" in text
    assert guidance_label(rows[-1]) == "1, back at 7.5 *"
    drawn = inversion.figure(rows)
    assert [axes.get_title() for axes in drawn.axes] == ["guidance 1", "guidance 7.5"]
    lost = [line.get_ydata()[0] for line in drawn.axes[1].lines if len(line.get_xdata()) == 1]
    assert lost == [inversion.WORST] * 2  # drawn at the top, not left out


def test_the_command_writes_what_it_promises(tiny: Path, tmp_path: Path, subject: Subject, capsys):
    image = tmp_path / "a.png"
    Image.fromarray(subject.pixels).save(image)
    options = ["--weights", tiny, "--image", image, "--prompt", "a chest", "--steps", "2,3", "--rounds", "1"]
    fast = ["--device", "cpu", "--dtype", "float32", "--out", tmp_path / "out"]
    assert main(["bench", "inversion", *map(str, (*options, *fast))]) == 0
    result = json.loads((tmp_path / "out" / "inversion.json").read_text())
    assert len(result["rows"]) == 2 * 2 * 3 + 2
    assert set(result["timings"]["float32"]) == {"naive", "fixed-point", "edict"}
    assert result["timings"]["float32"]["naive"]["ratio"] == 1
    assert result["target"]["limit"] == 1e-3
    assert {"cpu", "threads", "revision"} <= result["environment"].keys()
    assert Image.open(tmp_path / "out" / "inversion.png").width > 1000
    printed = capsys.readouterr().out
    assert "1, back at 7.5 *" in printed
    assert f"{image} " in printed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--guidance", "strong"], "--guidance: got 'strong', expected numbers"),
        (["--images", "0"], "--images: got 0"),
        (["--steps", "x"], "--steps: got 'x'"),
        (["--rounds", "0"], "--rounds: got 0"),
        (["--images", "3", "--image", "a.png", "--prompt", "a chest"], "--images: it does nothing beside --image"),
        (["--prompt", "a chest"], "--image, --prompt: expected both or neither"),
        (["--image", "nowhere.png", "--prompt", "a chest", "--dtype", "float32"], "nowhere.png: no such file"),
    ],
)
def test_bad_options_end_in_one_line(tiny: Path, tmp_path: Path, capsys, monkeypatch, options: list[str], message: str):
    monkeypatch.setattr(command, "load_model", None)  # it is told before weights are read
    assert main(["bench", "inversion", "--weights", str(tiny), "--out", str(tmp_path / "out"), *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_scales_are_numbers():
    assert scales("1,7.5,1") == (1.0, 7.5)
