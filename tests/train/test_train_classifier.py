"""Training classifiers: the loss by hand, restarts bit for bit, where weights come from."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from classifier_training import SIZE, TINY
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from ldm.data import folders
from ldm.data.labelled import LabelledImages
from ldm.phantom.folders import write as write_phantoms
from ldm.phantom.items import Order
from ldm.study import classifier
from ldm.train import classifier as training
from ldm.train import scores
from ldm.train.augmentation import ISIC, Augmentation
from ldm.train.classifier import TRAININGS, ClassifierLearner, checkpoint_path, masked_loss, positive_weights, train
from ldm.train.learner import Learner, Recipe, Taken

CPU = torch.device("cpu")
NAN = float("nan")


# ---- the loss --------------------------------------------------------------------------------------


def test_unknown_labels_leave_no_trace() -> None:
    logits = torch.tensor([[0.3, -1.0], [2.0, 0.5]], requires_grad=True)
    loss = masked_loss(logits, torch.tensor([[1.0, NAN], [0.0, NAN]]), torch.ones(2))
    (expected := F.binary_cross_entropy_with_logits(logits[:, 0], torch.tensor([1.0, 0.0]))).backward()
    torch.testing.assert_close(loss, expected)
    gradient = logits.grad
    logits.grad = None
    loss.backward()
    torch.testing.assert_close(logits.grad, gradient)
    assert gradient is not None
    assert (gradient[:, 1] == 0).all()


def test_a_batch_without_any_label_has_no_loss() -> None:
    assert masked_loss(torch.ones(2, 1), torch.full((2, 1), NAN), torch.ones(1)) == 0


def test_both_classes_weigh_alike() -> None:
    """Three negatives, one positive, one unknown: the positive counts three times."""
    labels = np.array([[1], [0], [0], [0], [NAN]], np.float32)
    weights = positive_weights(labels)
    assert weights.tolist() == [3.0]
    # At logit 0 every image costs log 2: together 3 of it from the positive, 3 from the negatives, over 4 labels
    loss = masked_loss(torch.zeros(5, 1), torch.from_numpy(labels), weights)
    assert loss.item() == pytest.approx(6 / 4 * math.log(2))


def test_a_set_with_one_class_is_refused() -> None:
    labels = np.array([[1, 0], [0, 0], [NAN, NAN]], np.float32)
    with pytest.raises(ValueError, match=r"attribute 'ink': the 3 training images hold 0 positive and 2 negative"):
        training.require_both_classes(labels, ("hair", "ink"), "training images")


def test_the_authors_numbers() -> None:
    chexpert, isic = TRAININGS["chest"], TRAININGS["skin"]
    assert (chexpert.lr, chexpert.weight_decay, chexpert.epochs) == (2e-4, 1e-2, 10)
    assert (isic.lr, isic.weight_decay, isic.epochs) == (1e-4, 1e-4, 20)
    assert {(t.model, t.size, t.batch) for t in (chexpert, isic)} == {("efficientnet_b0", 512, 128)}
    assert chexpert.augmentation == Augmentation(flip_horizontal=True, degrees=10, shift=0.1, jitter=0.2)
    assert isic.augmentation == Augmentation(flip_horizontal=True, flip_vertical=True)


# ---- the run ---------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def test_a_run_that_was_killed_equals_one_that_was_not(
    parts: tuple[LabelledImages, LabelledImages], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(*parts, TINY, tmp_path / "whole.safetensors", CPU)
    learn = Learner.learn

    def stopping(self: Learner, step: int, loss: torch.Tensor) -> Taken:
        if step == 5:
            raise Stopped
        return learn(self, step, loss)

    monkeypatch.setattr(training, "SAVE_EVERY", 1)
    monkeypatch.setattr(Learner, "learn", stopping)
    with pytest.raises(Stopped):
        train(*parts, TINY, tmp_path / "killed.safetensors", CPU)
    monkeypatch.setattr(Learner, "learn", learn)
    continued = train(*parts, TINY, tmp_path / "killed.safetensors", CPU)
    for name, value in whole.network.state_dict().items():
        assert torch.equal(value, continued.network.state_dict()[name]), name
    assert whole.report == continued.report
    for file in (tmp_path / "whole.training.safetensors", tmp_path / "killed.training.safetensors"):
        assert file.exists()  # the caller removes it once the classifier is saved
    ends = [load_file(checkpoint_path(tmp_path / f"{name}.safetensors")) for name in ("whole", "killed")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_checkpoint_of_another_run_is_refused(parts: tuple[LabelledImages, LabelledImages], tmp_path: Path) -> None:
    out = tmp_path / "x.safetensors"
    short = replace(TINY, epochs=1)
    train(*parts, short, out, CPU)
    for others, recipe in ((parts, replace(short, seed=1)), ((parts[0].select(range(40)), parts[1]), short)):
        with pytest.raises(ValueError, match="a run with other options or images"):
            train(*others, recipe, out, CPU)
    checkpoint_path(out).write_bytes(b"cut off")
    with pytest.raises(ValueError, match="damaged"):
        train(*parts, short, out, CPU)


def test_the_best_weights_are_kept_not_the_last() -> None:
    network = torch.nn.Linear(1, 1)
    learner = ClassifierLearner(network, Recipe(steps=3, lr=1.0))
    for step, loss in enumerate((0.5, 0.3, 0.4), 1):
        with torch.no_grad():
            network.weight.fill_(step)
        learner.keep_if_best(loss, step)
    assert (learner.best["weight"].item(), learner.best_loss, learner.best_step) == (2.0, 0.3, 2)


def test_a_loss_that_is_no_number_stops_the_run(parts: tuple[LabelledImages, LabelledImages], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"the loss at step \d+ is nan; try a lower --lr"):
        train(*parts, replace(TINY, lr=1e30), tmp_path / "x.safetensors", CPU)


def test_training_learns(tmp_path: Path) -> None:
    """Brightness is an attribute that a few steps must find; the probabilities of unseen images tell the two apart."""
    rng = np.random.default_rng(0)
    data = folders.read(write_phantoms("chest", tmp_path / "data", Order(n=70, size=SIZE)))
    labels = np.arange(len(data), dtype=np.float32)[:, None] % 2
    for file, (bright,) in zip(data.files, labels, strict=True):
        Image.fromarray(rng.integers(0, 120, (SIZE, SIZE), dtype=np.uint8) + np.uint8(120 * bright)).save(file)
    data = replace(data, attributes=("bright",), labels=labels)
    recipe = replace(TINY, epochs=8, lr=3e-3, augmentation=ISIC)
    trained = train(data.select(range(48)), data.select(range(48, 56)), recipe, tmp_path / "x.safetensors", CPU)
    test = data.select(range(56, len(data)))
    (row,) = scores.scores(training.predict(trained, test), test.labels, test.groups, ("bright",))
    assert row.auroc.value == 1.0


def test_without_a_hub_training_starts_from_scratch_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(training.huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(training.huggingface_hub, "get_hf_file_metadata", unreachable)
    assert training.imagenet_weights("efficientnet_b0") is None
    assert "no ImageNet weights (OSError: no route to host); training from scratch" in caplog.text


def test_weights_on_disk_are_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stored = {name: value.contiguous() for name, value in classifier.build("efficientnet_b0", 2).state_dict().items()}
    save_file(stored, tmp_path / "model.safetensors")
    monkeypatch.setattr(
        training.huggingface_hub, "try_to_load_from_cache", lambda *_: str(tmp_path / "model.safetensors")
    )
    weights = training.imagenet_weights("efficientnet_b0")
    assert weights is not None
    assert torch.equal(weights["conv_stem.weight"], stored["conv_stem.weight"])


def test_training_starts_from_weights_of_the_same_network() -> None:
    torch.manual_seed(1)
    given = classifier.build("test_efficientnet", 1000).state_dict()
    network = classifier.build("test_efficientnet", 3)
    head = network.state_dict()["classifier.weight"].clone()
    training.take_over(network, {f"module.{name}": value for name, value in given.items()})
    started = network.state_dict()
    assert torch.equal(started["conv_stem.weight"], given["conv_stem.weight"])
    assert torch.equal(started["classifier.weight"], head)  # of 3 attributes, not of 1,000 classes

    again = classifier.build("test_efficientnet", 3)
    training.take_over(again, started)
    assert torch.equal(again.state_dict()["classifier.weight"], head)


def test_weights_of_another_network_are_refused() -> None:
    given = dict(classifier.build("test_efficientnet", 3).state_dict())
    del given["conv_stem.weight"]
    with pytest.raises(ValueError, match=r"start: nothing for conv_stem.weight, expected \(24, 3, 3, 3\)"):
        training.take_over(classifier.build("test_efficientnet", 3), given)
