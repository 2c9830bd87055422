"""A run's log and samples: nothing twice after a restart, the same pictures from the same weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_checkpoints import TINY
from tiny_model import write_tiny_model

import ldm
from ldm.train.objective import FineTuning
from ldm.train.unet_learner import UNetLearner
from ldm.train.watch import LOG, SAMPLE_SEEDS, Log, draw_samples, forget_after
from ldm.unet import UNet


def test_the_log_forgets_what_will_be_done_again(tmp_path):
    path = tmp_path / LOG
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')  # the process died while it wrote
    forget_after(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_tensorboard_shows_what_the_log_says(tmp_path):
    for start, loss in ((0, 5.0), (2, 7.0)):  # killed after step 4, continued from 2
        log = Log(tmp_path, start)
        for step in (start + 1, start + 2):
            log.note(step, {"loss": loss, "validation": {"0-249": 0.5, "mean": 1.0}})
        log.close()
    log = Log(tmp_path, 4)
    log.picture(4, Image.new("RGB", (8, 8)))
    log.close()
    assert [json.loads(line)["loss"] for line in (tmp_path / LOG).read_text().splitlines()] == [5, 5, 7, 7]
    assert Image.open(tmp_path / "samples" / "step-00000004.png").size == (8, 8)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 5), (2, 5), (3, 7), (4, 7)]
    assert {"validation/0-249", "validation/mean"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Images("samples")] == [4]


def test_a_run_that_was_killed_before_its_first_checkpoint_repeats_no_step(tmp_path):
    for loss in (5.0, 7.0):  # begun twice at step 0
        log = Log(tmp_path, 0)
        for step in (0, 1, 2):
            log.note(step, {"loss": loss})
        log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 7), (1, 7), (2, 7)]


def test_a_log_of_another_process_writes_nothing(tmp_path):
    log = Log(tmp_path, 0, writes=False)
    log.note(1, {"loss": 1.0})
    log.picture(1, Image.new("RGB", (8, 8)))
    log.close()
    assert list(tmp_path.iterdir()) == []


def test_samples_are_a_row_a_prompt_and_the_same_each_time(tmp_path):
    torch.manual_seed(0)
    sd = ldm.load(write_tiny_model(tmp_path / "model.safetensors"))
    sheets = [draw_samples(sd, ["neutral", "effusion"]) for _ in range(2)]
    assert np.array_equal(np.asarray(sheets[0]), np.asarray(sheets[1]))
    assert sheets[0].height > 2 * 8
    assert sheets[0].width > len(SAMPLE_SEEDS) * 8


@pytest.mark.parametrize("ema_decay", [0.0, 0.9])
def test_what_is_watched_are_the_weights_that_are_saved(ema_decay):
    torch.manual_seed(0)
    learner = UNetLearner(UNet(TINY.unet), FineTuning(steps=1, ema_decay=ema_decay))
    with torch.no_grad():
        learner.unet.conv_in.weight += 1
    trained = learner.unet.conv_in.weight.clone()
    with learner.as_saved() as unet:
        wanted = learner.ema.values["conv_in.weight"] if learner.ema else trained
        assert torch.equal(unet.conv_in.weight, wanted)
    assert torch.equal(learner.unet.conv_in.weight, trained)
