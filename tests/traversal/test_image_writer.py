"""Image files written by threads: the same files, no error lost, nothing half-written, bounded, and cleanly left."""

import threading

import numpy as np
import pytest

from ldm.images import load_pixels, save_image
from ldm.traversal import image_writer
from ldm.traversal.image_writer import ImageWriter

PIXELS = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), dtype=np.uint8)


def test_files_are_those_that_one_thread_writes(tmp_path):
    counted = []
    with ImageWriter(counted.append) as writer:
        for i, pixels in enumerate(PIXELS):
            writer.write(tmp_path / "pool" / f"{i}.png", pixels)
    for i, pixels in enumerate(PIXELS):
        save_image(tmp_path / "alone" / f"{i}.png", pixels)
        assert (tmp_path / "pool" / f"{i}.png").read_bytes() == (tmp_path / "alone" / f"{i}.png").read_bytes()
        assert (load_pixels(tmp_path / "pool" / f"{i}.png") == pixels).all()
    assert counted == [1] * len(PIXELS)
    assert {path.suffix for path in (tmp_path / "pool").iterdir()} == {".png"}


def test_what_is_written_is_told_by_the_next_write(tmp_path):
    counted = []
    with ImageWriter(counted.append) as writer:
        writer.write(tmp_path / "0.png", PIXELS[0])
        writer._waiting[0].result()  # a decoder takes longer than a file
        writer.write(tmp_path / "1.png", PIXELS[1])
        assert counted == [1]  # not when the queue is full: a bar would stand still for eight images


def test_an_error_is_raised_and_the_others_are_whole(tmp_path):
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(OSError), ImageWriter() as writer:  # noqa: PT011, PT012
        for i, pixels in enumerate(PIXELS[:4]):
            writer.write(tmp_path / ("file" if i == 1 else "folder") / f"{i}.png", pixels)
    for path in (tmp_path / "folder").iterdir():
        assert (load_pixels(path) == PIXELS[int(path.stem)]).all()


def test_an_early_error_stops_a_long_run(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    written = 0
    with pytest.raises(OSError), ImageWriter() as writer:  # noqa: PT011, PT012
        for written in range(10_000):  # noqa: B007
            writer.write(tmp_path / "file" / "0.png", PIXELS[0])
    assert written < 200


@pytest.fixture
def held(monkeypatch):
    """Writing waits until it is let go; how many images were begun."""
    go, begun = threading.Event(), []

    def slow(path, pixels):
        begun.append(path)
        go.wait(30)
        save_image(path, pixels)

    monkeypatch.setattr(image_writer, "save_image", slow)
    monkeypatch.setattr(image_writer.os, "cpu_count", lambda: 2)
    return go, begun


def test_interrupted_it_finishes_what_it_has_begun_and_drops_the_rest(tmp_path, held):
    go, begun = held
    with pytest.raises(KeyboardInterrupt), ImageWriter() as writer:  # noqa: PT012
        for i in range(7):
            writer.write(tmp_path / f"{i}.png", PIXELS[i])
        while len(begun) < 2:
            pass
        threading.Timer(0.05, go.set).start()
        raise KeyboardInterrupt
    assert sorted(tmp_path.iterdir()) == sorted(begun)
    assert len(begun) == 2
    for path in begun:
        assert (load_pixels(path) == PIXELS[int(path.stem)]).all()


def test_only_so_many_images_wait(tmp_path, held):
    go, _ = held
    reached = []

    def fill():
        with ImageWriter() as writer:
            for i in range(20):
                writer.write(tmp_path / f"{i}.png", PIXELS[i])
                reached.append(i)

    thread = threading.Thread(target=fill)
    thread.start()
    thread.join(0.3)
    assert len(reached) <= 2 * image_writer.AHEAD
    go.set()
    thread.join(30)
    assert len(reached) == len(list(tmp_path.iterdir())) == 20
