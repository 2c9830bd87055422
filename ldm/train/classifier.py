"""Training an attribute classifier. [paper, Table 1; the authors' code]

Binary cross-entropy over all attributes, unknown labels left out, each attribute's positives weighted by how rare they
are; AdamW; half a cosine down to 1e-6; the weights of the lowest validation loss are kept. Batches, augmentation and
dropout of a step are drawn from (seed, step) alone, so that a run that was killed and started again equals one that
was not.

Letters: N images, B of a batch, K attributes, S the side of an image in pixels.
"""

import json
import logging
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import timm
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm import tqdm

from ldm.checkpoint.dialects import unwrapped
from ldm.data.labelled import LabelledImages
from ldm.images import from_uint8
from ldm.study import classifier
from ldm.study.classifier import Classifier
from ldm.train import loop
from ldm.train.augmentation import CHEXPERT, ISIC, Augmentation, augment
from ldm.train.classifier_images import Decoded, fingerprint, labelled_pixels, redecoded
from ldm.train.learner import Learner, NotFinite, Recipe, Taken
from ldm.train.phantom_set import draw
from ldm.train.state import put_back, read_metadata, write_state
from ldm.vae import AutoencoderKL

log = logging.getLogger(__name__)

FINAL_LR = 1e-6  # [authors' code]
SAVE_EVERY = 250  # steps between checkpoints
HUB_TIMEOUT_S = 5.0


@dataclass(frozen=True)
class Training:
    """All that decides a run besides its images. The defaults are the authors'. [authors' code]"""

    lr: float
    weight_decay: float
    epochs: int
    augmentation: Augmentation
    model: str = "efficientnet_b0"
    size: int = 512  # S
    batch: int = 128
    seed: int = 0
    pretrained: bool = True  # start from ImageNet weights, where they can be had
    start: str = ""  # sha256 of the file that it starts from instead, where there is one
    seen_size: int = 0  # the side that images are enlarged to for the network; 0: it sees them as they are
    through: str = ""  # sha256 of the model whose autoencoder every image is seen through as well, where there is one


TRAININGS = {  # of CheXpert and ISIC 2019
    "chest": Training(lr=2e-4, weight_decay=1e-2, epochs=10, augmentation=CHEXPERT),
    "skin": Training(lr=1e-4, weight_decay=1e-4, epochs=20, augmentation=ISIC),
}


def require_both_classes(labels: NDArray[np.float32], attributes: Sequence[str], where: str) -> None:
    """Raises ValueError for an attribute that is not both present and absent among known labels (N, K)."""
    for name, column in zip(attributes, labels.T, strict=True):
        positive, negative = int((column == 1).sum()), int((column == 0).sum())
        if not positive or not negative:
            raise ValueError(
                f"attribute {name!r}: the {len(column)} {where} hold {positive} positive and {negative} negative "
                "labels, expected some of both; leave it out with --attributes, or use more images"
            )


def positive_weights(labels: NDArray[np.float32]) -> Tensor:
    """Negatives for each positive among labels (N, K): (K,), the weight that makes both classes count alike."""
    return torch.from_numpy(((labels == 0).sum(axis=0) / (labels == 1).sum(axis=0)).astype(np.float32))


def masked_loss(logits: Tensor, labels: Tensor, pos_weight: Tensor) -> Tensor:
    """Binary cross-entropy (nats), mean over the known labels; (B, K) each, NaN = unknown. 0 where none is known."""
    known = labels.isfinite()
    each = F.binary_cross_entropy_with_logits(
        logits.float(), labels.nan_to_num(0.0), pos_weight=pos_weight, reduction="none"
    )
    return (each * known).sum() / known.sum().clamp(min=1)


def channel_statistics(network: nn.Module) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of the channels that timm's weights of this network expect: ImageNet's, mostly."""
    config: dict[str, tuple[float, ...]] = network.pretrained_cfg  # type: ignore[assignment]
    return tuple(config["mean"]), tuple(config["std"])


def imagenet_weights(model: str) -> dict[str, Tensor] | None:
    """timm's ImageNet weights of a network, from the hub's cache on disk or from the hub; None where neither has them.

    Which of the two it was is in the log.
    """
    config = timm.get_pretrained_cfg(model) if timm.is_model(model) else None
    if config is None or not config.hf_hub_id:
        log.warning("%s: timm knows no ImageNet weights; training from scratch", model)
        return None
    name = "model.safetensors"
    try:
        file = huggingface_hub.try_to_load_from_cache(config.hf_hub_id, name)
        if not isinstance(file, str):
            # Asked for first because a download of a hub that does not answer is tried again and again
            huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(config.hf_hub_id, name), timeout=HUB_TIMEOUT_S
            )
            file = huggingface_hub.hf_hub_download(config.hf_hub_id, name)
        weights = load_file(file)
    except Exception as error:  # of half a dozen libraries; whatever it is, training goes on without
        reason = " ".join(str(error).split())[:120]
        log.warning("%s: no ImageNet weights (%s: %s); training from scratch", model, type(error).__name__, reason)
        return None
    log.info("%s: starting from the ImageNet weights of %s", model, config.hf_hub_id)
    return weights


def take_over(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Start from the weights of a network of the same kind; the last layer is left as it is where its size differs.

    Raises:  ValueError: a tensor of the network is missing, or has another shape.
    """
    own = network.state_dict()
    last = tuple(name for name in own if name.startswith(f"{network.pretrained_cfg['classifier']}."))  # type: ignore[index]
    taken = {name: weights[key] for key, name in unwrapped(weights).items() if name in own}
    if any(name not in taken or taken[name].shape != own[name].shape for name in last):
        taken |= {name: own[name] for name in last}
    for name, value in own.items():
        came = tuple(taken[name].shape) if name in taken else "nothing"
        if came != tuple(value.shape):
            raise ValueError(f"start: {came} for {name}, expected {tuple(value.shape)}: weights of another network")
    network.load_state_dict(taken)


class ClassifierLearner(Learner):
    """A network in training, and its weights where the validation loss was the lowest so far."""

    def __init__(self, network: nn.Module, recipe: Recipe) -> None:
        super().__init__(network, recipe)
        self.best: dict[str, Tensor] = {}
        self.best_loss, self.best_step = math.inf, 0

    def keep_if_best(self, loss: float, step: int) -> None:
        """Remember the weights if the validation loss is the lowest so far."""
        if loss < self.best_loss:
            self.best = {name: value.detach().clone() for name, value in self.trained.state_dict().items()}
            self.best_loss, self.best_step = loss, step

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """The best weights too."""
        yield from super().tensors()
        yield from ((f"best.{name}", value) for name, value in self.best.items())

    def counters(self) -> dict[str, Any]:
        """How good the best weights are, too."""
        return super().counters() | {"best_loss": self.best_loss, "best_step": self.best_step}

    def restore(self, read: Callable[[str], Tensor], counters: Mapping[str, Any]) -> None:
        """Put back what `tensors` and `counters` gave."""
        super().restore(read, counters)
        self.best_loss, self.best_step = counters["best_loss"], counters["best_step"]
        if self.best_step:
            self.best = {name: read(f"best.{name}").to(v.device) for name, v in self.trained.state_dict().items()}


def _resume(state: Path, learner: Learner, settings: Mapping[str, object]) -> int:
    """Put the state back, where there is one. Returns the step to go on from.

    Raises:  ValueError: when it is of a run with other settings or images, or damaged.
    """
    if not state.exists():
        return 0
    if read_metadata(state)["settings"] != json.loads(json.dumps(settings)):
        raise ValueError(
            f"{state}: the checkpoint of a run with other options or images; remove it to start anew, or choose "
            "another --out"
        )
    return put_back(state, learner)


def checkpoint_path(out: Path) -> Path:
    """Where a run that will save OUT keeps what it needs to go on after it was stopped."""
    return out.with_name(f"{out.stem}.training.safetensors")


@torch.no_grad()
def validate(
    network: nn.Module, loader: DataLoader[tuple[Tensor, Tensor]], pos_weight: Tensor, seen_size: int = 0
) -> float:
    """The masked loss over a whole set, in evaluation mode. The network is left in training mode."""
    network.eval()
    device, statistics = pos_weight.device, channel_statistics(network)
    logits, labels = [], []
    for pixels, known in loader:
        logits.append(network(classifier.normalise(from_uint8(pixels.to(device)), *statistics, seen_size)))
        labels.append(known)
    network.train()
    loss = float(masked_loss(torch.cat(logits), torch.cat(labels).to(device), pos_weight))
    if not math.isfinite(loss):
        raise ValueError(f"the validation loss is {loss}; try a lower --lr")
    return loss


@torch.no_grad()
def predict(
    trained: Classifier, images: LabelledImages, workers: int = 0, vae: AutoencoderKL | None = None
) -> NDArray[np.float32]:
    """The probabilities of every image, (N, K). Args: vae: of each as this autoencoder returns it."""
    loader = DataLoader(Decoded(images, trained.input_size), batch_size=trained.at_once, num_workers=workers)
    bar = tqdm(loader, desc="scoring", mininterval=5)
    seen = (pixels if vae is None else torch.from_numpy(redecoded(vae, pixels)) for pixels, _ in bar)
    return torch.cat([trained.probabilities(from_uint8(pixels)) for pixels in seen]).numpy()


def train(
    training_images: LabelledImages,
    validation_images: LabelledImages,
    training: Training,
    out: Path,
    device: torch.device,
    workers: int = 0,
    cached: bool = True,
    initial: Mapping[str, Tensor] | None = None,
    vae: AutoencoderKL | None = None,
) -> Classifier:
    """Train, or go on with the run whose checkpoint (NAME.training.safetensors) lies beside `out`.

    Args:    out: where the classifier will be saved, by the caller.
             workers: processes that read images; they do not change the result.
             cached: decode each image once, into a folder beside `out` that is deleted at the end.
             initial: of `take_over`, instead of ImageNet's weights; `training.start` is their file's sha256.
             vae: of `labelled_pixels`: an epoch has every image twice; `training.through` is its file's sha256.
    Returns: the classifier of the lowest validation loss; its report says how it was trained.
    Raises:  ValueError: when a class is missing, the loss is not finite, or the checkpoint is of another run.
    """
    attributes, count = training_images.attributes, len(training_images) * (1 if vae is None else 2)
    require_both_classes(training_images.labels, attributes, "training images")
    require_both_classes(validation_images.labels, attributes, "validation images")
    pos_weight = positive_weights(training_images.labels).to(device)

    torch.manual_seed(training.seed)
    pretrained = imagenet_weights(training.model) if training.pretrained and initial is None else None
    network = classifier.build(training.model, len(attributes), pretrained).to(device)
    if initial is not None:
        take_over(network, initial)
    statistics = channel_statistics(network)
    settings = asdict(training) | {"imagenet": pretrained is not None, "images": fingerprint(training_images)}
    batch = min(training.batch, count)
    steps = math.ceil(training.epochs * count / batch)
    final_lr = FINAL_LR / training.lr
    recipe = Recipe(steps, training.lr, 0, final_lr, training.weight_decay, betas=(0.9, 0.999), clip=math.inf)
    learner, state = ClassifierLearner(network, recipe), checkpoint_path(out)
    start = _resume(state, learner, settings)
    order = (draw(training.seed, step, count, batch).tolist() for step in range(start, steps))
    folder = out.with_name(f"{out.stem}.decoded")
    seen, held = (
        labelled_pixels(images, training.size, folder if cached else None, max(1, workers), vae)
        for images in (training_images, validation_images)
    )
    loader = DataLoader(seen, batch_sampler=order, num_workers=workers)
    unseen = DataLoader(held, batch_size=batch, num_workers=workers)

    def taking() -> Iterator[Taken]:
        for step, (pixels, labels) in enumerate(loader, start):
            with torch.random.fork_rng():
                torch.manual_seed(training.seed * 1_000_003 + step)  # of the augmentation and the dropout of this step
                images = augment(from_uint8(pixels.to(device)), training.augmentation)
                logits = network(classifier.normalise(images, *statistics, training.seen_size))
            yield learner.learn(step, masked_loss(logits, labels.to(device), pos_weight))

    def epoch_over(done: int) -> bool:
        return done * batch // count > (done - 1) * batch // count or done == steps

    def after(done: int, taken: Taken, saving: bool) -> str:
        if epoch_over(done):
            learner.keep_if_best(validate(network, unseen, pos_weight, training.seen_size), done)
        return f"loss {taken.loss:.4f}, best validation {learner.best_loss:.4f}"

    def due(done: int) -> bool:
        return epoch_over(done) or done % SAVE_EVERY == 0

    def save(done: int) -> None:
        write_state(state, learner, done, settings)

    try:
        loop.train(out.stem, taking(), start, steps, after=after, due=due, save=save)
    except NotFinite as error:
        raise ValueError(f"{error}; try a lower --lr") from None

    shutil.rmtree(folder, ignore_errors=True)
    network.load_state_dict(learner.best)
    network.eval().requires_grad_(False)
    report = {
        "training": asdict(training),
        "imagenet_weights": pretrained is not None,
        "steps": steps,
        "best_step": learner.best_step,
        "validation_loss": learner.best_loss,
    }
    return Classifier(training.model, attributes, training.size, *statistics, network, report, training.seen_size)
