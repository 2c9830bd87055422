"""The rendered phantoms that the small model learns: which, in what order, with which captions."""

from pathlib import Path

import numpy as np
import pytest
import torch

from ldm.phantom import render, sample_attributes
from ldm.phantom.prompts import phrasings
from ldm.train.phantom_set import PhantomSet, draw


class Stopped(Exception):
    pass


def test_a_draw_depends_on_seed_and_step_only():
    forward = [draw(3, step, 50, 7) for step in range(20)]
    np.random.seed(1)  # noqa: NPY002 the global stream must not matter
    backward = [draw(3, step, 50, 7) for step in reversed(range(20))][::-1]
    assert np.array_equal(forward, backward)
    assert not np.array_equal(forward, [draw(4, step, 50, 7) for step in range(20)])


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (6, 6), (4, 9), (7, 1)])
def test_draws_visit_every_image_once_an_epoch(count, batch):
    visited = np.concatenate([draw(0, step, count, batch) for step in range(count)])  # `batch` whole epochs
    epochs = visited.reshape(batch, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    if count > 5:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == batch  # each in another order


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> PhantomSet:
    return PhantomSet(tmp_path_factory.mktemp("phantoms"), count=8, seed0=40, size=32, workers=1)


def test_a_set_holds_the_phantoms_of_its_seeds_both_domains_in_turn(phantoms):
    assert len(phantoms) == 8
    assert phantoms.keys == [(domain, seed) for seed in range(40, 44) for domain in ("chest", "skin")]
    assert phantoms.images.dtype == np.uint8
    for i in (0, 5):
        domain, seed = phantoms.keys[i]
        assert phantoms.attributes[i] == sample_attributes(domain, seed)
        expected = render(domain, seed, phantoms.attributes[i], 32).to_uint8()
        assert np.array_equal(phantoms.images[i], expected)


def test_a_batch_is_in_the_range_of_the_autoencoder(phantoms):
    batch = phantoms.batch([5, 0])
    assert batch.shape == (2, 3, 32, 32)
    assert batch.dtype == torch.float32
    back = ((batch + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(back, phantoms.images[[5, 0]])
    assert float(batch.min()) >= -1.0
    assert float(batch.max()) <= 1.0
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_a_rendered_set_is_opened_not_rendered_again(phantoms, tmp_path, monkeypatch):
    folder = Path(phantoms.images.filename).parent

    def not_called(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(PhantomSet, "_render", not_called)
    again = PhantomSet(folder, count=8, seed0=40, size=32)
    assert np.array_equal(again.images, phantoms.images)
    for other in ({"count": 6}, {"seed0": 41}, {"size": 64}):
        with pytest.raises(ValueError, match=r"phantoms\.npy: rendered with .*, asked for .*; use a new folder"):
            PhantomSet(folder, **{"count": 8, "seed0": 40, "size": 32} | other)


def test_rendering_that_was_stopped_begins_anew(tmp_path, monkeypatch):
    def half_way(self: PhantomSet, path: Path, size: int, workers: int) -> None:
        path.with_name(path.name + ".partial").write_bytes(b"some images")
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(PhantomSet, "_render", half_way)
        with pytest.raises(Stopped):
            PhantomSet(tmp_path, count=2, seed0=1, size=32)
    assert np.ptp(PhantomSet(tmp_path, count=2, seed0=1, size=32, workers=1).images) > 0


def test_rendering_that_was_stopped_at_its_very_end_is_opened(tmp_path, monkeypatch):
    whole = PhantomSet._render

    def then_stop(self: PhantomSet, path: Path, size: int, workers: int) -> None:
        whole(self, path, size, workers)
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(PhantomSet, "_render", then_stop)
        with pytest.raises(Stopped):
            PhantomSet(tmp_path, count=2, seed0=1, size=32, workers=1)
    assert np.ptp(PhantomSet(tmp_path, count=2, seed0=1, size=32, workers=1).images) > 0


def test_every_image_has_the_wordings_of_its_attributes(phantoms):
    none = phrasings("chest", {"pleural_effusion": False, "support_devices": False})
    assert none == (
        "Normal chest X-ray with no significant findings",
        "Normal chest X-ray with no significant findings",
        "Chest X-ray of a subject with No Finding",
    )
    both = phrasings("chest", {"pleural_effusion": True, "support_devices": True})
    assert both == (
        "Chest X-ray of a subject with Pleural Effusion, Support Devices",
        "Chest X-ray showing Pleural Effusion, Support Devices",
    )
    absent = dict.fromkeys(("melanoma", "hair", "gel_bubble", "ruler", "ink"), False)
    assert phrasings("skin", absent) == (
        "a dermoscopic image with melanocytic nevus (NV) with no visible artifacts",
        "a dermoscopic image with melanocytic nevus (NV)",
    )
    assert phrasings("skin", absent | {"melanoma": True, "ruler": True}) == (
        "a dermoscopic image with melanoma (MEL) showing ruler",
        "a dermoscopic image with melanoma (MEL) with a ruler visible",
    )
    expected = [phrasings(d, a) for (d, _), a in zip(phantoms.keys, phantoms.attributes, strict=True)]
    assert phantoms.captions == expected
