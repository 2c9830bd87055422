"""Training and scoring classifiers: losses and scores by hand, restarts bit for bit, the command on phantom folders."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm_tools import cli
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score, roc_auc_score
from torch.nn import functional as F

from ldm import checkpoint
from ldm.data import folders, splits
from ldm.data.labelled import LabelledImages
from ldm.phantom.folders import write as write_phantoms
from ldm.phantom.items import Order
from ldm.study import classifier
from ldm.train import augmentation, scores
from ldm.train import classifier as training
from ldm.train.augmentation import CHEXPERT, ISIC, Augmentation, augment
from ldm.train.classifier import (
    TRAININGS,
    ClassifierLearner,
    Training,
    checkpoint_path,
    masked_loss,
    positive_weights,
    train,
)
from ldm.train.learner import Learner, Recipe, Taken

SIZE = 32
CPU = torch.device("cpu")
NAN = float("nan")
TINY = Training(
    lr=1e-3, weight_decay=0.0, epochs=2, augmentation=CHEXPERT, model="test_efficientnet", size=SIZE, batch=16,
    pretrained=False,
)  # fmt: skip


@pytest.fixture(scope="module")
def chest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms("chest", tmp_path_factory.mktemp("chest") / "data", Order(n=80, size=SIZE))


@pytest.fixture(scope="module")
def skin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_phantoms("skin", tmp_path_factory.mktemp("skin") / "data", Order(n=120, size=SIZE))


@pytest.fixture
def parts(chest: Path) -> tuple[LabelledImages, LabelledImages]:
    data = folders.read(chest)
    split = splits.grouped(data)
    return data.select(split.train), data.select(split.validation)


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


# ---- augmentation ----------------------------------------------------------------------------------


def images(count: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_no_augmentation_is_the_identity() -> None:
    assert torch.equal(augment(images(), Augmentation()), images())


def test_flips_give_each_of_the_four_views_and_nothing_else() -> None:
    torch.manual_seed(0)
    one = images(1)
    views = [one, one.flip(2), one.flip(3), one.flip(2, 3)]
    moved = augment(one.expand(64, -1, -1, -1), ISIC)
    seen = [sum(torch.equal(image, view[0]) for image in moved) for view in views]
    assert sum(seen) == 64
    assert min(seen) > 0  # that one of four is missed has probability 4 (3/4)^64 = 4e-8


def test_a_shift_moves_right_and_down_and_leaves_black() -> None:
    one = images(1)
    moved = augmentation.move(one, torch.zeros(1, 1), torch.tensor([[4 / SIZE, 2 / SIZE]]))
    torch.testing.assert_close(moved[..., 2:, 4:], one[..., :-2, :-4], rtol=0, atol=1e-5)  # bilinear, in float32
    assert (moved[..., :2, :] == -1).all()
    assert (moved[..., :4] == -1).all()


def test_a_quarter_turn_is_a_quarter_turn() -> None:
    one = images(1)
    moved = augmentation.move(one, torch.full((1, 1), math.pi / 2), torch.zeros(1, 2))
    turned = min((moved - one.rot90(k, (2, 3))).abs().max() for k in (1, 3))
    assert turned < 1e-4  # bilinear, in float32


def test_rotation_and_shift_compose_on_a_square_image() -> None:
    """Shifting after rotating equals both at once; away from the border, on a smooth image."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    smooth = (0.5 * torch.sin(2 * x + y)).expand(1, 3, -1, -1)
    angle, shift, nothing = torch.full((1, 1), 0.17), torch.tensor([[2 / SIZE, -3 / SIZE]]), torch.zeros(1, 1)
    both = augmentation.move(smooth, angle, shift)
    apart = augmentation.move(augmentation.move(smooth, angle, torch.zeros(1, 2)), nothing, shift)
    inside = slice(9, -9)
    # Whole pixels of shift, so the two differ by float rounding only
    torch.testing.assert_close(both[..., inside, inside], apart[..., inside, inside], rtol=0, atol=1e-5)


def test_jitter_by_hand() -> None:
    one = images(1)
    brighter = augmentation.jitter(one, torch.full((1, 1), 0.8), torch.ones(1, 1))
    torch.testing.assert_close(brighter + 1, 0.8 * (one + 1))
    flat = augmentation.jitter(one, torch.ones(1, 1), torch.zeros(1, 1))
    torch.testing.assert_close(flat, one.mean().expand_as(one))
    assert augmentation.jitter(one, torch.full((1, 1), 1.2), torch.ones(1, 1)).max() <= 1


def test_softening_blurs_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    soft = augmentation.soften(images(32))
    assert soft.diff(dim=3).abs().mean() < 0.9 * images(32).diff(dim=3).abs().mean()
    # Means over 3 x 3 move brightness across the border a little
    torch.testing.assert_close(soft.mean(), images(32).mean(), rtol=0, atol=0.01)
    flat = torch.zeros(4, 3, SIZE, SIZE)
    assert augmentation.soften(flat).abs().max() < 6 * augmentation.NOISE


@pytest.mark.parametrize("recipe", [CHEXPERT, ISIC, replace(ISIC, soften=True)])
def test_each_image_moves_in_its_own_way(recipe: Augmentation) -> None:
    torch.manual_seed(0)
    moved = augment(images(1).expand(8, -1, -1, -1), recipe)
    assert moved.shape == (8, 3, SIZE, SIZE)
    assert len({tuple(image.flatten()[:200].tolist()) for image in moved}) >= 3


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


# ---- scores ----------------------------------------------------------------------------------------


def column(*values: float) -> NDArray[np.float32]:
    return np.array(values, np.float32)[:, None]


def test_scores_by_hand() -> None:
    """Ten images, one unknown. Called positive: .9 .8 .5 .6; true: .9 .8 .4 .5. Pairs in order: 4 * 5 - 2 of 20."""
    p = column(0.9, 0.8, 0.4, 0.5, 0.6, 0.1, 0.1, 0.2, 0.3, 0.99)
    labels = column(1, 1, 1, 1, 0, 0, 0, 0, 0, NAN)
    (row,) = scores.scores(p, labels, np.arange(10).astype(str), ("hair",), draws=200)
    assert (row.attribute, row.n, row.positives) == ("hair", 9, 4)
    assert row.accuracy.value == pytest.approx(7 / 9)
    assert row.f1.value == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert row.auroc.value == pytest.approx(18 / 20)
    # Wilson (1927) for 7 of 9, z = 1.96: (p + z^2/2n -+ z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)
    z, n, share = 1.959964, 9, 7 / 9
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    expected = [(share + z * z / (2 * n) + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    assert row.accuracy[1:] == pytest.approx(expected, abs=1e-6)
    for x in (row.f1, row.auroc):
        assert 0 <= x.low <= x.value <= x.high <= 1
    assert row.f1.low < row.f1.high


def test_calibration_by_hand() -> None:
    """Two bins: four images at .25, one positive; two at 1.0, one positive. ECE = (4 * 0 + 2 * .5) / 6."""
    bins = scores.reliability(np.array([0.25] * 4 + [1.0] * 2), np.array([1, 0, 0, 0, 1, 0], bool))
    assert [row.n for row in bins] == [0, 0, 4, 0, 0, 0, 0, 0, 0, 2]
    assert bins[2] == pytest.approx((0.2, 0.3, 4, 0.25, 0.25))
    assert bins[9] == pytest.approx((0.9, 1.0, 2, 1.0, 0.5))
    assert scores.expected_calibration_error(bins) == pytest.approx(1 / 6)


def test_the_bootstrap_draws_groups() -> None:
    groups = np.array(["a", "a", "b", "c", "c", "c"])
    truth = np.array([1, 0, 1, 0, 1, 0], bool)
    drawn = list(scores.group_weights(groups, truth, seed=0, draws=50))
    assert all(w[0] == w[1] and w[3] == w[4] == w[5] for w in drawn)
    assert all(w[0] + w[2] + w[3] == 3 for w in drawn)
    assert all(w[truth].any() and w[~truth].any() for w in drawn)


def test_weights_count_images_as_often_as_repeating_them_does() -> None:
    """scikit-learn on the repeated images is the reference; probabilities of one decimal tie often."""
    rng = np.random.default_rng(0)
    p, truth, w = rng.random(60).round(1), rng.random(60) < 0.5, rng.integers(0, 4, 60)
    called, times = p >= 0.5, np.repeat(np.arange(60), w)
    assert scores.weighted_f1(truth, called, w) == pytest.approx(f1_score(truth[times], called[times]))
    assert scores.weighted_auroc(truth, p, [w])[0] == pytest.approx(roc_auc_score(truth[times], p[times]))


def test_images_of_one_group_widen_the_interval() -> None:
    rng = np.random.default_rng(0)
    p, labels = column(*rng.random(40)), column(*(rng.random(40) < 0.5))
    alone, eightfold = (
        scores.scores(np.repeat(p, k, 0), np.repeat(labels, k, 0), np.repeat(np.arange(40), k).astype(str), ("x",))[0]
        for k in (1, 8)
    )
    apart = scores.scores(np.repeat(p, 8, 0), np.repeat(labels, 8, 0), np.arange(320).astype(str), ("x",))[0]
    assert eightfold.auroc == pytest.approx(alone.auroc)
    assert apart.auroc.high - apart.auroc.low < 0.6 * (alone.auroc.high - alone.auroc.low)


def test_scores_refuse_what_has_no_score() -> None:
    groups = np.array(["a", "b"])
    with pytest.raises(ValueError, match="1 of 2 are NaN or infinite"):
        scores.scores(column(NAN, 0.5), column(0, 1), groups, ("ink",))
    with pytest.raises(ValueError, match="attribute 'ink': 0 of 2 known labels are positive"):
        scores.scores(column(0.1, 0.5), column(0, 0), groups, ("ink",))


# ---- the command -----------------------------------------------------------------------------------

QUICK = ("--model", "test_efficientnet", "--size", str(SIZE), "--epochs", "1", "--batch", "16", "--from-scratch")


@pytest.fixture(scope="module")
def trained(skin: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("trained") / "skin.safetensors"
    assert cli.main(["classify", "train", str(skin), "--out", str(out), *QUICK]) == 0
    return out


def test_the_command_leaves_a_classifier_and_its_report(trained: Path) -> None:
    assert sorted(path.name for path in trained.parent.iterdir()) == ["skin.json", "skin.safetensors"]
    loaded = classifier.load(trained)
    assert loaded.attributes == ("melanoma", "hair", "gel_bubble", "ruler", "ink")
    assert loaded.input_size == SIZE
    report = loaded.report
    assert (report["data_set"], report["phantoms"], report["split"]) == ("isic", True, "grouped")
    assert report["imagenet_weights"] is False
    assert sum(report["images"].values()) == 120
    assert [row["attribute"] for row in report["test"]] == list(loaded.attributes)


def test_eval_repeats_the_report(trained: Path, skin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "scores.json"
    assert cli.main(["classify", "eval", str(trained), str(skin), "--out", str(out)]) == 0
    written = json.loads(out.read_text())
    assert written["scores"] == classifier.load(trained).report["test"]
    table = capsys.readouterr().out
    assert table.splitlines()[0] == "| attribute | n | positives | accuracy | F1 | AUROC | ECE |"
    assert len(table.splitlines()) == 2 + 5


def test_a_run_from_given_weights_kept_in_half_the_bytes(trained: Path, skin: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.safetensors"
    quick = [option for option in QUICK if option != "--from-scratch"]
    command = ["classify", "train", str(skin), "--out", str(out), *quick, "--start", str(trained), "--float16"]
    assert cli.main(command) == 0
    assert {value.dtype for value in load_file(out).values()} == {torch.float16, torch.int64}
    report = classifier.load(out).report
    assert report["training"]["start"] == checkpoint.sha256(trained)  # type: ignore[index]
    assert cli.main(["classify", "eval", str(out), str(skin), "--out", str(tmp_path / "scores.json")]) == 0
    assert json.loads((tmp_path / "scores.json").read_text())["scores"] == report["test"]  # tested as it is read


def test_eval_of_some_attributes_on_all_images(trained: Path, skin: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["classify", "eval", str(trained), str(skin), "--attributes", "ink", "melanoma", "--part", "all"]
    assert cli.main(command) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[:2] for row in rows] == [["| ink", "120"], ["| melanoma", "120"]]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a command ends with."""
    assert cli.main([str(argument) for argument in arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    return next(line for line in lines if line.startswith("ldm classify"))


def test_bad_input_is_one_line(
    trained: Path, skin: Path, chest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = tmp_path / "new.safetensors"
    assert "exists" in refused(capsys, "classify", "train", skin, "--out", trained)
    assert "did you mean 'hair'?" in refused(
        capsys, "classify", "train", skin, "--out", new, "--attributes", "hiar", *QUICK
    )
    assert "did you mean 'pleural_effusion'?" in refused(
        capsys, "classify", "train", chest, "--out", new, "--attributes", "plural_effusion", *QUICK
    )
    assert "got 'melanoma'; expected one of no_finding" in refused(capsys, "classify", "eval", trained, chest)
    assert "has no 'hiar'; did you mean 'hair'?" in refused(
        capsys, "classify", "eval", trained, skin, "--attributes", "hiar"
    )
    assert "NAME.safetensors" in refused(capsys, "classify", "train", skin, "--out", tmp_path / "new.bin")
    assert "--device: torch cannot use 'gpu'" in refused(capsys, "classify", "eval", trained, skin, "--device", "gpu")
    assert "--lr: got -1.0" in refused(capsys, "classify", "train", skin, "--out", new, "--lr", "-1")
    assert "did you mean 'mobilenetv3_small_050'?" in refused(
        capsys, "classify", "train", skin, "--out", new, *QUICK, "--model", "mobilenetv3_smal_050"
    )
    assert not new.exists()


def test_a_class_that_is_missing_is_one_line_before_any_training(
    skin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(skin, folder)
    file = folder / "isic_inferred_wocarcinoma.csv"
    header, *lines = file.read_text().splitlines()
    ink = header.split(",").index("ink")
    rows = [line.split(",") for line in lines]
    file.write_text("\n".join([header, *(",".join([*row[:ink], "0.1", *row[ink + 1 :]]) for row in rows)]) + "\n")
    line = refused(capsys, "classify", "train", folder, "--out", tmp_path / "x.safetensors", *QUICK)
    assert "attribute 'ink'" in line
    assert "0 positive" in line


def test_a_broken_image_is_named(skin: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "data"
    shutil.copytree(skin, folder)
    broken = min((folder / "ISIC_2019_Training_Input").iterdir())
    broken.write_bytes(broken.read_bytes()[:200])
    out = tmp_path / "x.safetensors"
    assert broken.name in refused(capsys, "classify", "train", folder, "--out", out, *QUICK)
    assert cli.main(["classify", "train", str(folder), "--out", str(out), *QUICK, "--max-bad", "1"]) == 0
    assert sum(classifier.load(out).report["images"].values()) == 119
