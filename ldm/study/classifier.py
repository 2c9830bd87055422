"""Attribute classifiers: with what probability does an image show each attribute? [paper, Table 1]

On disk a classifier is NAME.safetensors, the weights of one of timm's networks, and NAME.json: which network, which
attributes, which images it takes, and its scores on held-out images. `ldm.train.classifier` makes such files.

Letters: B images, K attributes, S the side of an image in pixels.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.checkpoint.dialects import unwrapped
from ldm.files import complete, write_text
from ldm.names import nearest
from ldm.pipeline import WEIGHTS

PHANTOM_CLASSIFIERS = {domain: WEIGHTS / f"{domain}_classifier.safetensors" for domain in ("chest", "skin")}

DROPOUT = 0.3  # [authors' code]
CHUNK = 1 << 20  # pixels in one call of the network, whatever the caller's batch: of 128 x 128, 64 images. It bounds
# memory, and keeps what a layer gives in a processor's cache: more than 20 images of 224 x 224 take 1.8 x as long


@dataclass(frozen=True, eq=False)
class Classifier:
    """A trained network in evaluation mode and what is needed to use it."""

    model: str  # timm's name of the network
    attributes: tuple[str, ...]
    input_size: int  # S
    mean: tuple[float, ...]  # of each channel of the training images in [0, 1]; subtracted, ...
    std: tuple[float, ...]  # ... and divided by
    network: nn.Module = field(repr=False)
    report: Mapping[str, object] = field(default_factory=dict, repr=False)  # data, split, figures on held-out images
    seen_size: int = 0  # the side that images are enlarged to for the network; 0: it sees them as they are

    @property
    def at_once(self) -> int:
        """How many images go through the network in one call."""
        return max(1, CHUNK // (self.seen_size or self.input_size) ** 2)

    @torch.no_grad()
    def probabilities(self, images: Tensor) -> Tensor:
        """How likely each image shows each attribute.

        Args:    images: (B, 3, S, S) in [-1, 1], on any device; S must be `input_size`.
        Returns: (B, K) float32 in [0, 1], columns in the order of `attributes`, on the device of `images`.
        Raises:  ValueError: for images of another size: resizing would hide that the network does not know it.
        """
        size = self.input_size
        if images.ndim != 4 or images.shape[1:] != (3, size, size):
            raise ValueError(
                f"images: got {tuple(images.shape)}, expected (B, 3, {size}, {size}): this classifier was trained on "
                f"{size} x {size} pixels; use images of that size or train one for yours with `ldm classify train`"
            )
        device = next(self.network.parameters()).device
        chunks = images.split(self.at_once)
        logits = [self.network(normalise(chunk.to(device), self.mean, self.std, self.seen_size)) for chunk in chunks]
        return torch.cat(logits).float().sigmoid().to(images.device)


def normalise(images: Tensor, mean: Sequence[float], std: Sequence[float], seen_size: int = 0) -> Tensor:
    """Images (B, 3, S, S) in [-1, 1] -> channels of about mean 0 and variance 1, float32.

    Args:    seen_size: the side to enlarge them to, bilinearly, which makes what is a pixel wide fit a network that
             was trained on larger images; 0: they stay as they are.
    """
    channels = images.new_tensor([mean, std], dtype=torch.float32)[:, :, None, None]
    images = images.float()
    if seen_size:
        images = F.interpolate(images, size=(seen_size, seen_size), mode="bilinear", align_corners=False)
    return (images * 0.5 + 0.5 - channels[0]) / channels[1]


def build(model: str, outputs: int, pretrained: Mapping[str, Tensor] | None = None) -> nn.Module:
    """A timm network with dropout and `outputs` logits.

    Args:    pretrained: weights to start from; the last layer is dropped where its size differs.
    Raises:  ValueError: when timm knows no network of that name, offering the nearest.
    """
    if not timm.is_model(model):  # which also keeps names such as "hf-hub:..." from reaching for the network
        raise ValueError(f"model: timm has no {model!r}{nearest(model, timm.list_models())}")
    if pretrained is None:
        network = timm.create_model(model, num_classes=outputs, drop_rate=DROPOUT)
    else:
        overlay = {"state_dict": dict(pretrained)}
        network = timm.create_model(
            model, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=outputs, drop_rate=DROPOUT
        )
    return network.to(memory_format=torch.channels_last)  # a third less time on CPUs, as measured


def save(path: Path, classifier: Classifier, dtype: torch.dtype = torch.float32) -> None:
    """Write path (.safetensors) and the .json beside it. Args: dtype: of the weights in the file."""
    description = {
        "model": classifier.model,
        "attributes": list(classifier.attributes),
        "input_size": classifier.input_size,
        "mean": list(classifier.mean),
        "std": list(classifier.std),
        "report": dict(classifier.report),
    }
    if classifier.seen_size:
        description["seen_size"] = classifier.seen_size
    path = checked_name(path)
    weights = {
        name: (value.to(dtype) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in classifier.network.state_dict().items()
    }
    with complete(path) as partial:
        save_file(weights, partial)
        write_text(path.with_suffix(".json"), json.dumps(description, indent=1, allow_nan=False) + "\n")


def load(path: Path | str, device: str | torch.device = "cpu") -> Classifier:
    """Read what `save` wrote.

    Raises:  ValueError: the .json describes no classifier, or the weights are not those of the network that it names.
             FileNotFoundError: one of the two files is missing.
    """
    path = checked_name(Path(path))
    for file in (path, path.with_suffix(".json")):
        if not file.is_file():
            raise FileNotFoundError(f"{file}: no such file; a classifier is {path.name} and {path.stem}.json together")
    try:
        about = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        attributes = tuple(str(name) for name in about["attributes"])
        mean, std = tuple(map(float, about["mean"])), tuple(map(float, about["std"]))
        model, input_size, report = str(about["model"]), int(about["input_size"]), dict(about["report"])
        seen_size = int(about.get("seen_size", 0))
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path.with_suffix('.json')}: does not describe a classifier ({type(error).__name__}: {error}); "
            "expected what `ldm classify train` writes"
        ) from error
    network = build(model, len(attributes))
    try:
        weights = load_file(path)
        network.load_state_dict({plain: weights[name] for name, plain in unwrapped(weights).items()})
    except (SafetensorError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: not the weights of {model} with {len(attributes)} outputs: {reason}") from error
    network.eval().requires_grad_(False).to(device)
    return Classifier(model, attributes, input_size, mean, std, network, report, seen_size)


def columns(known: Sequence[str], wanted: Sequence[str], where: str) -> list[int]:
    """The positions of some attributes among those of a data set or a classifier.

    Args:    where: what knows the attributes, for the message: "the classifier chest.safetensors".
    Raises:  ValueError: naming the first that is not there, and the nearest that is.
    """
    for name in wanted:
        if name not in known:
            raise ValueError(
                f"attributes: {where} has no {name!r}{nearest(name, known)}; it has {', '.join(known) or 'none'}"
            )
    return [list(known).index(name) for name in wanted]


def checked_name(path: Path) -> Path:
    """The path of a classifier's weights. Raises ValueError when it does not end in .safetensors."""
    if path.suffix != ".safetensors":
        raise ValueError(f"{path}: a classifier's weights are named NAME.safetensors, with NAME.json beside them")
    return path
