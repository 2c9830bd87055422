"""A run's folder: what is there is whole, whenever the process dies."""

import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import TINY, part
from torch import nn

import ldm
from ldm import files
from ldm.checkpoint.loading import build
from ldm.clip import CLIPTextEncoder
from ldm.config import CLIPConfig
from ldm.train import run_folder as module
from ldm.train.objective import FineTuning
from ldm.train.run_folder import LAST, RunFolder, stop_on_signals
from ldm.train.unet_learner import UNetLearner

SETTINGS = {"lr": 1e-5, "betas": (0.9, 0.999), "data": "abc"}


def network(name: str, seed: int = 0) -> nn.Module:
    """A tiny network whose weights may be written into."""
    built = build({"vae": TINY.vae, "unet": TINY.unet}[name])
    built.load_state_dict({key: tensor.clone() for key, tensor in part(name, seed).items()}, assign=True)
    return built


# A model that can be loaded has a row for every word of CLIP's.
FROZEN = {"clip": CLIPTextEncoder(replace(TINY.clip, vocabulary=CLIPConfig().vocabulary)), "vae": network("vae")}


def run_folder(path: Path, keep: int = 2, **changed: object) -> RunFolder:
    return RunFolder(path, FROZEN, {**SETTINGS, **changed}, keep)


def trained(seed: int = 0, ema_decay: float = 0.9) -> UNetLearner:
    """A network after one step of AdamW, with made-up gradients, and its moving average."""
    learner = UNetLearner(network("unet", seed), FineTuning(steps=1, lr=0.1, ema_decay=ema_decay))
    generator = torch.Generator().manual_seed(seed)
    for p in learner.unet.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    learner.optimiser.step()
    if learner.ema is not None:
        learner.ema.update(learner.unet, 0)
    return learner


def contents(learner: UNetLearner) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in learner.tensors()}


def test_what_is_saved_comes_back_bit_for_bit(tmp_path):
    saved = trained()
    run_folder(tmp_path).save(1, saved)
    other = trained(seed=1)
    assert run_folder(tmp_path).resume(other) == 1
    before, after = contents(saved), contents(other)
    assert before.keys() == after.keys()
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    assert other.counters() == saved.counters() == {"updates": 1, "scaler": {}}


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_the_newest_checkpoint_is_a_model(tmp_path, ema_decay):
    learner = trained(ema_decay=ema_decay)
    path = run_folder(tmp_path).save(1, learner)
    assert path == tmp_path / LAST
    loaded = ldm.load(path)
    wanted = learner.ema.values if learner.ema else learner.unet.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in loaded.unet.state_dict().items())
    assert all(torch.equal(t, FROZEN["vae"].state_dict()[name]) for name, t in loaded.vae.state_dict().items())


def test_the_newest_few_are_kept(tmp_path):
    folder, run = run_folder(tmp_path, keep=2), trained()
    for step in (5, 10, 15):
        folder.save(step, run)
    assert folder.steps() == [10, 15]
    names = {path.name for path in tmp_path.glob("*.safetensors")}
    kept = {f"step-000000{step}{kind}.safetensors" for step in (10, 15) for kind in ("", ".state")}
    assert names == {*kept, LAST}


@pytest.mark.parametrize("fatal", range(6))
def test_whenever_saving_dies_the_run_goes_on(tmp_path, monkeypatch, fatal):
    """Saving forces six times onto the disk: three files, and after each the folder. It dies at one of these."""
    folder = run_folder(tmp_path)
    first = trained()
    folder.save(1, first)
    calls = iter(range(100))
    sync = files._sync

    def dies(path: Path) -> None:
        if next(calls) == fatal:
            raise KeyboardInterrupt
        sync(path)

    monkeypatch.setattr(files, "_sync", dies)
    monkeypatch.setattr(Path, "unlink", lambda path, missing_ok=False: None)  # a killed process cleans nothing up
    second = trained(seed=1)
    with pytest.raises(KeyboardInterrupt):
        folder.save(2, second)
    monkeypatch.undo()

    again = run_folder(tmp_path)
    again.check(resume=True)
    assert list(tmp_path.glob("*.partial")) == []
    found = trained(seed=2)
    step = again.resume(found)
    assert step == (1 if fatal < 3 else 2)
    wanted = contents(first if step == 1 else second)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in contents(found).items())
    last = ldm.load(tmp_path / LAST).unet.state_dict()
    average = (first if step == 1 else second).ema.values
    assert all(torch.equal(tensor, average[name]) for name, tensor in last.items())


def test_an_empty_folder_is_a_run_at_its_start(tmp_path):
    folder = run_folder(tmp_path / "new")
    folder.check(resume=True)
    assert folder.resume(trained()) == 0


def test_a_run_is_not_overwritten(tmp_path):
    run_folder(tmp_path).save(7, trained())
    with pytest.raises(ValueError, match=r"holds a run at step 7; --resume auto"):
        run_folder(tmp_path).check(resume=False)
    run_folder(tmp_path).check(resume=True)


def test_a_run_with_other_settings_is_not_continued(tmp_path):
    run_folder(tmp_path).save(7, trained())
    with pytest.raises(ValueError, match=r"data \(was abc, is xyz\), lr \(was 1e-05, is 0\.1\)"):
        run_folder(tmp_path, lr=0.1, data="xyz").check(resume=True)


def test_a_damaged_state_is_named(tmp_path):
    folder = run_folder(tmp_path)
    folder.save(7, trained())
    os.truncate(folder.state(7), 1000)
    with pytest.raises(ValueError, match=r"step-00000007\.state\.safetensors: damaged"):
        folder.check(resume=True)


def test_a_disk_too_small_is_found_out_first(tmp_path, monkeypatch):
    folder, unet = run_folder(tmp_path, keep=2), network("unet")
    one = sum(t.nbytes for n in (*FROZEN.values(), unet, unet, unet, unet) for t in n.state_dict().values())

    class Usage:
        free = 3 * one

    monkeypatch.setattr(module.shutil, "disk_usage", lambda path: Usage)
    folder.require_space([unet], averaged=False)
    with pytest.raises(ValueError, match=r"checkpoints need .* GB, .* GB are free; make room, lower --keep"):
        folder.require_space([unet], averaged=True)


def test_only_the_first_of_several_processes_writes(tmp_path):
    other = RunFolder(tmp_path / "out", FROZEN, SETTINGS, writes=False)
    assert other.save(1, trained()) == tmp_path / "out" / LAST
    assert not (tmp_path / "out").exists()
    first = RunFolder(tmp_path / "out", FROZEN, SETTINGS)
    first.save(1, trained())
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    other.check(resume=True)
    assert other.resume(trained(seed=1)) == 1
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()} == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_once(number):
    former = signal.getsignal(number)
    with stop_on_signals() as stop:
        assert not stop()
        os.kill(os.getpid(), number)
        assert stop()
        assert signal.getsignal(number) == former  # the second one acts at once
    assert signal.getsignal(number) == former


def test_weights_laid_for_a_gpu_are_saved_as_ever_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm.train.unet_learner.on_gpu", lambda device: True)
    saved = trained()
    run_folder(tmp_path).save(1, saved)
    there = trained(seed=1)
    monkeypatch.undo()
    for other in (there, trained(seed=1)):
        assert run_folder(tmp_path).resume(other) == 1
        before, after = contents(saved), contents(other)
        assert [name for name in before if not torch.equal(before[name], after[name])] == []
    sd = ldm.load(RunFolder(tmp_path, FROZEN, SETTINGS, 2).checkpoint(1))
    assert all(torch.equal(p, saved.ema.values[name]) for name, p in sd.unet.named_parameters())
    assert all(p.is_contiguous() for p in sd.unet.parameters())
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in there.unet.parameters() if p.ndim == 4)
