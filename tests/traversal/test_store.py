"""Many seeds in one file: written whole, grown, continued, and never mixed."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ldm.samplers import initial_noise
from ldm.traversal.store import iterate_latents, load_latents, run_seeds

SHAPE = (4, 8, 8)
SETTINGS = {"guidance_scale": 7.5, "steps": 10, "swap_steps": (2, 6)}


class Counting:
    """A traversal that remembers which seeds it was asked for, and can be cut off."""

    def __init__(self, fail_at: int | None = None) -> None:
        self.groups: list[list[int]] = []
        self.fail_at = fail_at

    def __call__(self, seeds: list[int]) -> dict[str, Tensor]:
        if self.fail_at in seeds:
            raise KeyboardInterrupt
        self.groups.append(seeds)
        x = initial_noise(seeds, SHAPE)
        return {"neutral": x, "effusion/s02": x + 1, "effusion/s06": x + 2}


def test_what_is_written_is_what_was_computed(tmp_path: Path):
    path = run_seeds(Counting(), [0, 3, 12], tmp_path, SETTINGS, at_once=2)
    assert path == tmp_path / "latents.safetensors"
    assert sorted(path.parent.iterdir()) == [path]  # nothing unfinished is left behind
    stored = load_file(path)
    assert len(stored) == 9
    assert stored["seed0003/effusion/s02"].shape == SHAPE
    saved = load_latents(path)
    assert saved.seeds == [0, 3, 12]
    assert saved.settings == {"guidance_scale": 7.5, "steps": 10, "swap_steps": [2, 6]}
    for name, latents in Counting()([0, 3, 12]).items():
        assert torch.equal(saved.latents[name], latents)


def test_an_interrupted_run_resumes_and_ends_in_the_same_file(tmp_path: Path):
    whole = run_seeds(Counting(), range(5), tmp_path / "whole", SETTINGS)
    with pytest.raises(KeyboardInterrupt):
        run_seeds(Counting(fail_at=3), range(5), tmp_path / "cut", SETTINGS, at_once=2)
    assert not (tmp_path / "cut" / "latents.safetensors").exists()
    rest = Counting()
    resumed = run_seeds(rest, range(5), tmp_path / "cut", SETTINGS, at_once=2)
    assert rest.groups == [[2, 3], [4]]
    assert resumed.read_bytes() == whole.read_bytes()


def test_a_finished_run_can_grow(tmp_path: Path):
    run_seeds(Counting(), [0, 1], tmp_path, SETTINGS)
    more = Counting()
    path = run_seeds(more, [1, 2, 2], tmp_path, SETTINGS)
    assert more.groups == [[2]]
    assert load_latents(path).seeds == [0, 1, 2]
    nothing = Counting()
    assert run_seeds(nothing, [0, 2], tmp_path, SETTINGS).read_bytes() == path.read_bytes()
    assert nothing.groups == []


@pytest.mark.parametrize("finished", [True, False])
def test_latents_of_other_settings_are_never_mixed_in(tmp_path: Path, finished: bool):
    if finished:
        run_seeds(Counting(), [0], tmp_path, SETTINGS)
    else:
        with pytest.raises(KeyboardInterrupt):
            run_seeds(Counting(fail_at=1), [0, 1], tmp_path, SETTINGS)
    other = SETTINGS | {"guidance_scale": 5.0, "eta": 0}
    with pytest.raises(ValueError, match=r"eta was \(absent\), is 0, guidance_scale was 7.5, is 5.0"):
        run_seeds(Counting(), [0, 1], tmp_path, other)


def test_latents_come_one_by_one_in_the_order_of_the_seeds(tmp_path: Path):
    seeds = [10_000, 2, 9_999]  # the keys' order is another: "seed10000" < "seed9999"
    path = run_seeds(Counting(), seeds, tmp_path, SETTINGS)
    saved, found = load_latents(path), list(iterate_latents(path))
    names = ["effusion/s02", "effusion/s06", "neutral"]
    assert [(seed, name) for seed, name, _ in found] == [(seed, name) for seed in sorted(seeds) for name in names]
    for seed, name, tensor in found:
        assert torch.equal(tensor, saved.latents[name][saved.seeds.index(seed)])


def cut_off(folder: Path) -> Path:
    """A run of seeds 0..3 that ended at seed 3. Returns the file of seed 1."""
    with pytest.raises(KeyboardInterrupt):
        run_seeds(Counting(fail_at=3), range(4), folder, SETTINGS)
    return folder / "partial" / "seed0001.safetensors"


def test_what_a_write_that_was_cut_off_leaves_is_removed(tmp_path: Path):
    cut_off(tmp_path).with_name("seed0003.safetensors.partial").write_bytes(b"half of a fi")
    path = run_seeds(Counting(), range(4), tmp_path, SETTINGS)
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_others_are_left_alone(tmp_path: Path):
    other = cut_off(tmp_path).with_name("notes.txt")
    other.write_text("mine")
    path = run_seeds(Counting(), range(4), tmp_path, SETTINGS)
    assert load_latents(path).seeds == [0, 1, 2, 3]
    assert list((tmp_path / "partial").iterdir()) == [other]


DAMAGES = {
    "emptied": lambda content: b"",
    "cut short": lambda content: content[:-5],
    "a page of zeros": lambda content: bytes(4096) + content[4096:],
    "other settings": lambda content: content.replace(b"swap_steps", b'""ap_steps'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_computed_again(tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture):
    whole = run_seeds(Counting(), range(4), tmp_path / "whole", SETTINGS)
    part = cut_off(tmp_path / "cut")
    part.write_bytes(DAMAGES[damage](part.read_bytes()))
    rest = Counting()
    assert run_seeds(rest, range(4), tmp_path / "cut", SETTINGS).read_bytes() == whole.read_bytes()
    assert rest.groups == [[1], [3]]
    assert str(part) in caplog.text


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_latents_are_named_and_never_deleted(tmp_path: Path, damage: str):
    path = run_seeds(Counting(), range(2), tmp_path, SETTINGS)
    damaged = DAMAGES[damage](path.read_bytes())
    path.write_bytes(damaged)
    for read in (
        lambda: load_latents(path),
        lambda: next(iterate_latents(path)),
        lambda: run_seeds(Counting(), range(2), tmp_path, SETTINGS),
    ):
        with pytest.raises(ValueError, match=r"latents\.safetensors: damaged \(.*\); delete it") as error:
            read()
        assert str(path) in str(error.value)
    assert path.read_bytes() == damaged


def test_files_of_others_are_refused(tmp_path: Path):
    save_file({"seed0000/neutral": torch.zeros(1)}, tmp_path / "latents.safetensors")
    with pytest.raises(ValueError, match="found no settings in the header"):
        load_latents(tmp_path / "latents.safetensors")


def test_compute_must_return_a_row_for_every_seed(tmp_path: Path):
    with pytest.raises(ValueError, match="compute: expected 2 rows of 'neutral', one a seed, got 1"):
        run_seeds(lambda seeds: {"neutral": torch.zeros(1, 4, 8, 8)}, [0, 1], tmp_path, SETTINGS, at_once=2)
