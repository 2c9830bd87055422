"""Where each attribute lives: every part of the U-Net taken out in turn, and the style given to one layer at one time.

Three figures of a removed part, each against the same prompts and seeds:

    effect    p(attribute | style prompt) - p(attribute | neutral prompt), both without the part
    identity  root mean square difference between those two images outside the region that the intact network edits
    neutral   root mean square difference of the neutral image from the intact one

The intact network's effect minus this one is what the part carries. Differences are in grey levels of 255.

Letters: A attributes, B seeds, K = 1 + A images, the neutral one first, h w of an image, N layers, W windows.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ldm import probe
from ldm.phantom.prompts import Cell
from ldm.pipeline import StableDiffusion
from ldm.probe import Edit, put
from ldm.probe.parts import Part, cross_attentions
from ldm.schedule import leading
from ldm.study.classifier import Classifier, columns
from ldm.study.metrics.ground_truth import dilated
from ldm.study.structure.domains import Prompts, Settings, decoded, denoise

CHANGED = 0.1  # of the range of 2: a pixel that the intact edit moves by 13 grey levels belongs to its region
DILATE_PX = 4  # half of a latent pixel: the autoencoder cannot place an edge more finely
GREY = 127.5  # grey levels per unit of [-1, 1]


@dataclass(frozen=True, eq=False)
class Intact:
    """What the whole network draws, against which everything is held."""

    images: Tensor  # (K, B, 3, h, w)
    regions: Tensor  # (A, B, h, w) bool, what each edit changes
    effect: Tensor  # (A, B)
    identity: Tensor  # (A, B)


@dataclass(frozen=True, eq=False)
class Removed:
    """The three figures of one part; see the top of this file. images: of the first seed, (K, 3, h, w)."""

    part: Part
    effect: Tensor  # (A, B)
    identity: Tensor  # (A, B)
    neutral: Tensor  # (B,)
    images: Tensor


class Ablation:
    """One domain, one classifier, one setting: draws with an edited network and measures."""

    def __init__(
        self,
        sd: StableDiffusion,
        cell: Cell,
        classifier: Classifier,
        settings: Settings,
        done: Callable[[int], object] = lambda rows: None,
    ) -> None:
        self.sd, self.cell, self.classifier, self.settings, self.done = sd, cell, classifier, settings, done
        self.prompts = Prompts.of(sd, cell)
        self.columns = columns(classifier.attributes, list(cell.styles), f"the classifier of {cell.name}")

    def draw(self) -> Tensor:
        """The neutral prompt and every style: images (K, B, 3, h, w)."""
        contexts = torch.cat([self.prompts.neutral, self.prompts.styles])
        return decoded(self.sd, denoise(self.sd, contexts, self.prompts.empty, self.settings, self.done))

    def probabilities(self, images: Tensor) -> Tensor:
        """(K, B, 3, h, w) -> (K, B, A): how surely each image shows each attribute."""
        p = self.classifier.probabilities(images.flatten(0, 1))[:, self.columns]
        return p.unflatten(0, images.shape[:2])

    def intact(self) -> Intact:
        """The network as it is."""
        images = self.draw()
        change = (images[1:] - images[0]).abs().mean(dim=2)  # (A, B, h, w)
        regions = np.stack([dilated(moved.cpu().numpy() > CHANGED, DILATE_PX) for moved in change])
        mask = torch.from_numpy(regions)
        return Intact(images, mask, effects(self.probabilities(images)), outside_error(images, mask))

    def remove(self, part: Part, intact: Intact) -> Removed:
        """The network without one part."""
        with probe.edit(self.sd.unet, part.edits):
            images = self.draw()
        neutral = GREY * (images[0] - intact.images[0]).square().mean(dim=(1, 2, 3)).sqrt()
        identity = outside_error(images, intact.regions)
        return Removed(part, effects(self.probabilities(images)), identity, neutral, images[:, 0])

    def inject(self, layers: Sequence[str], timesteps: Collection[float]) -> Tensor:
        """(A, B): how surely an image shows the attribute when only some layers see it asked for, at some times."""
        contexts = self.prompts.neutral.expand_as(self.prompts.styles)
        with probe.edit(self.sd.unet, injection(self.prompts, self.settings, layers, timesteps)):
            latents = denoise(self.sd, contexts, self.prompts.empty, self.settings, self.done)
        return self.probabilities(decoded(self.sd, latents)).diagonal(dim1=0, dim2=2).T


def injection(
    prompts: Prompts, settings: Settings, layers: Sequence[str], timesteps: Collection[float]
) -> dict[str, Edit]:
    """The edits by which some cross-attentions see the styles at some times, in A B rows under the neutral prompt."""
    rows = prompts.styles.repeat_interleave(len(settings.seeds), dim=0)
    edit = put(rows).only(timesteps=timesteps)
    if settings.guidance != 1:  # then a call's first half are the unconditional rows, which stay as they are
        edit = put(rows.repeat(2, 1, 1)).only(timesteps=timesteps, rows="cond")
    return {f"{layer}.context": edit for layer in layers}


def effects(p: Tensor) -> Tensor:
    """What each attribute's prompt does to its own probability.

    Args:    p: (K, B, A), the neutral image first.
    Returns: (A, B).
    """
    return (p[1:] - p[0]).diagonal(dim1=0, dim2=2).T


def outside_error(images: Tensor, regions: Tensor) -> Tensor:
    """Root mean square difference between each edit and the neutral image outside a region, in grey levels of 255.

    Args:    images: (K, B, 3, h, w) in [-1, 1].  regions: (A, B, h, w) bool.
    Returns: (A, B); NaN where a region is the whole image.
    """
    squares = (images[1:] - images[0]).square().mean(dim=2)
    outside = ~regions.to(squares.device)
    return GREY * ((squares * outside).sum(dim=(2, 3)) / outside.sum(dim=(2, 3))).sqrt()


def windows(steps: int, count: int) -> list[range]:
    """The steps in `count` windows of about equal length. Raises ValueError for more windows than steps, or none."""
    if not 1 <= count <= steps:
        raise ValueError(f"windows: expected 1..{steps}, the number of steps, got {count}")
    ends = [round(i * steps / count) for i in range(count + 1)]
    return [range(start, stop) for start, stop in pairwise(ends)]


def injections(ablation: Ablation, count: int) -> Iterator[tuple[int, int, Tensor]]:
    """The style in each layer alone, and all of them, during each window alone, and all of them.

    Yields: layer, window, (A, B) probabilities; the number of layers stands for all layers, that of windows for all.
    """
    layers, steps = cross_attentions(ablation.sd.unet), leading(ablation.settings.steps)
    times = [*windows(ablation.settings.steps, count), range(ablation.settings.steps)]
    for i, chosen in enumerate([*([layer] for layer in layers), layers]):
        for j, window in enumerate(times):
            yield i, j, ablation.inject(chosen, [steps[step] for step in window])


def rows_of_ablation(unet_parts: int, attributes: int, settings: Settings) -> int:
    """U-Net rows, guidance's second half not counted, of the intact network and each removed part."""
    return (unet_parts + 1) * (1 + attributes) * len(settings.seeds) * settings.steps


def rows_of_injections(layers: int, count: int, attributes: int, settings: Settings) -> int:
    """U-Net rows, guidance's second half not counted, of `injections`."""
    return (layers + 1) * (count + 1) * attributes * len(settings.seeds) * settings.steps
