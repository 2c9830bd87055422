"""What can go wrong with `ldm finetune` from outside: one line, before any work is lost."""

import errno
import gc
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import lookalikes
import numpy as np
import pytest
import torch
from ldm_tools import cli
from PIL import Image
from tiny_run import UNET, command, write_data, write_weights

import ldm
from ldm.train import finetune as loop
from ldm.train.run_folder import LAST


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "model.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """An empty disk of 64 MB: a checkpoint of the tiny model with its state takes 25."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"this user may not mount a small disk: {mounted.stderr.strip()}")
    yield folder
    gc.collect()  # a network with faster forwards refers to itself, and its weights are the mapped files
    subprocess.run(["umount", str(folder)], check=True)


def refused(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    """The one line with which the command ends."""
    assert cli.main(arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("ldm finetune: ")
    return last


def test_a_disk_too_small_for_the_run_is_refused_at_once(weights, data, disk, capsys):
    said = refused(capsys, command(weights, data, disk / "out", "--steps", "2", "--keep", "5"))
    assert "checkpoints need" in said
    assert "make room, lower --keep, or choose another --out" in said
    assert not list(disk.rglob("*.safetensors"))


def test_a_disk_that_fills_up_costs_no_checkpoint(weights, data, disk, capsys, monkeypatch):
    save, out = loop.RunFolder.save, disk / "out"

    def others_fill_the_disk(folder, step, learner):
        if step == 2:
            with (disk / "others").open("wb") as file:
                file.write(bytes(os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize - 2_000_000))
        return save(folder, step, learner)

    monkeypatch.setattr(loop.RunFolder, "save", others_fill_the_disk)
    run = command(weights, data, out, "--steps", "3", "--save-every", "1", "--keep", "1", "--validate", "0")
    run[run.index("--cache") + 1] = str(disk / "latents")
    assert os.strerror(errno.ENOSPC) in refused(capsys, run)
    monkeypatch.undo()
    assert [path.name for path in out.glob("step-*.state.safetensors")] == ["step-00000001.state.safetensors"]
    assert torch.isfinite(ldm.load(out / LAST).unet.conv_in.weight).all()
    (disk / "others").unlink()
    assert cli.main([*run, "--resume", "auto"]) == 0
    assert [path.name for path in out.glob("step-*.state.safetensors")] == ["step-00000003.state.safetensors"]


def test_a_folder_that_may_not_be_written_is_named(tmp_path, weights, data, capsys):
    locked = tmp_path / "locked"
    locked.write_text("a file where a folder was expected")  # even root cannot write into it
    said = refused(capsys, command(weights, data, locked / "out", "--cache", str(tmp_path / "latents"), "--steps", "1"))
    assert str(locked) in said


def test_a_disk_that_may_only_be_read_is_named(tmp_path, weights, data, disk, capsys):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    said = refused(capsys, command(weights, data, disk / "out", "--cache", str(tmp_path / "latents"), "--steps", "1"))
    assert os.strerror(errno.EROFS) in said


def test_the_folder_of_another_run_is_not_gone_on_with(tmp_path, weights, data, capsys):
    out = tmp_path / "out"
    assert cli.main(command(weights, data, out, "--steps", "1", "--validate", "0")) == 0
    before = {path: path.read_bytes() for path in out.glob("*.safetensors")}
    capsys.readouterr()

    others = write_data(tmp_path / "others", first=101)
    wider = write_weights(tmp_path / "wider.safetensors", replace(UNET, widths=(64, 64)))
    for arguments, changed in (
        (command(weights, others, out), "data (was "),
        (command(wider, data, out), "unet (was "),
        (command(weights, data, out, "--caption-dropout", "0.5"), "caption_dropout (was 0.0, is 0.5)"),
    ):
        said = refused(capsys, [*arguments, "--steps", "2", "--resume", "auto"])
        assert "holds a run with other settings: " in said
        assert changed in said
    assert {path: path.read_bytes() for path in out.glob("*.safetensors")} == before


def test_what_is_no_checkpoint_is_named(tmp_path, data, capsys):
    path = tmp_path / "text.safetensors"
    path.write_text("not one")
    assert str(path) in refused(capsys, command(path, data, tmp_path / "out", "--steps", "1"))
    assert not list((tmp_path / "out").glob("*.safetensors"))


def test_a_damaged_image_is_left_out_of_the_latents_too(tmp_path, weights, data, caplog):
    """Damaged in its middle, where neither header nor end tells; and the labels that captions name can be chosen."""
    folder, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, folder)
    victim, random = min(folder.rglob("*.jpg")), np.random.default_rng(0)
    Image.fromarray(random.integers(0, 256, (64, 64), dtype=np.uint8)).save(victim)
    content = bytearray(victim.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = random.integers(0, 256, 400, dtype=np.uint8).tobytes()
    victim.write_bytes(content)
    with pytest.raises(OSError, match="broken data stream"):
        Image.open(victim).load()
    options = ("--steps", "1", "--validate", "0", "--max-bad", "1", "--uncertain", "zeros")
    assert cli.main(command(weights, folder, out, *options, "--attributes", "edema,support_devices", "fracture")) == 0
    assert caplog.text.count(f"left out: {victim}") == 1


def test_a_table_of_ones_own_is_learnt_from(tmp_path, weights):
    folder = lookalikes.hospital(tmp_path / "data")
    for i in range(5, 13):
        lookalikes.picture(folder / f"a/{i}.png", grey=10 * i)
    rows = [{"file": f"a/{i}.png", "patient": i // 2, "tube": i % 2} for i in range(1, 13)]
    lookalikes.write_csv(folder / "own.csv", tuple(rows[0]), rows)
    own = ("--labels", str(folder / "own.csv"), "--caption", "a film[ with {labels}]", "--invert")
    assert cli.main(command(weights, folder, tmp_path / "out", "--steps", "1", "--validate", "0", *own)) == 0
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["settings"]["preprocessing"]["reading"]["invert"] is True
