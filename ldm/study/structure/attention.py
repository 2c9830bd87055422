"""Where each word looks while an image is drawn, by the cross-attention's probabilities; and is it the right place?

A rendered phantom, whose attribute's mask is known, is encoded, inverted under the prompt that names the attribute, and
drawn again, so that the words' maps can be held against the mask.

Letters: B images, S steps, N layers, V words, h w of a layer's grid, G the finest grid's side, H W of an image.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from ldm import probe
from ldm.conditioning import constant
from ldm.images import from_uint8
from ldm.phantom import render
from ldm.phantom.prompts import Cell
from ldm.pipeline import StableDiffusion
from ldm.probe.parts import cross_attentions
from ldm.probe.words import Word
from ldm.traversal.inversion import ddim_inversion

ITERATIONS = 2  # of the inversion, a step; see `ldm.traversal.inversion`
Bools = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class MaskedImages:
    """Rendered images that show an attribute, and where."""

    images: Tensor  # (B, 3, H, W) in [-1, 1]
    masks: Bools  # (B, H, W)

    @classmethod
    def render(cls, cell: Cell, attribute: str, seeds: Sequence[int], size: int) -> "MaskedImages":
        shown = [render(cell.domain or "", seed, {**cell.base, attribute: True}, size) for seed in seeds]
        return cls(
            from_uint8(np.stack([patient.to_uint8() for patient in shown])),
            np.stack([patient.masks[attribute] for patient in shown]),
        )


@dataclass(frozen=True, eq=False)
class Looks:
    """Where each word looked."""

    layers: tuple[str, ...]  # names of the cross-attentions, in the order of execution
    maps: tuple[Tensor, ...]  # for each layer (S, B, V, h, w): the mean over heads; all words of a pixel add up to 1

    def mean_over_layers(self) -> Tensor:
        """(S, B, V, G, G): every layer brought to the finest grid, and averaged."""
        height, width = max(layer.shape[-2:] for layer in self.maps)
        return torch.stack([resized(layer, height, width) for layer in self.maps]).mean(dim=0)


def invert(sd: StableDiffusion, images: Tensor, context: Tensor, steps: int, done: Callable[[int], object]) -> Tensor:
    """The noise (B, C, H/8, W/8) from which images (B, 3, H, W) come back under a context (1, L, D), at guidance 1."""
    eps_fn = sd.guided(constant(context, steps), 1.0)
    x_0 = sd.encode_image(images).float()
    with torch.no_grad():
        for step in ddim_inversion(eps_fn, x_0, sd.schedule, steps, iterations=ITERATIONS):
            done(ITERATIONS * len(step.x_t))
    return step.x_t


def look(
    sd: StableDiffusion,
    x_T: Tensor,
    context: Tensor,
    words: Sequence[Word],
    steps: int,
    done: Callable[[int], object] = lambda rows: None,
) -> tuple[Looks, Tensor]:
    """Draw from noise under one prompt, at guidance 1, and record where its words look.

    Args:    x_T: (B, C, H/8, W/8).  context: (1, L, D).
    Returns: the maps, and the latents drawn.
    """
    layers = cross_attentions(sd.unet)
    names = [f"{layer}.probabilities" for layer in layers]
    with probe.capture(sd.unet, *names, keep=lambda p: of_words(p.mean(dim=1), words)) as seen:
        for step in sd.sample(context, range(len(x_T)), steps=steps, guidance_scale=1, x_T=x_T):
            done(len(step.x_prev))
    height, width = x_T.shape[-2:]
    maps = [on_grid(torch.stack(seen.runs[name]), height / width) for name in names]
    return Looks(tuple(layers), tuple(maps)), step.x_prev


def of_words(probabilities: Tensor, words: Sequence[Word]) -> Tensor:
    """(B, N, L) -> (B, N, V): what goes to a word is the sum of what goes to its tokens."""
    return torch.stack([probabilities[..., list(word.tokens)].sum(dim=-1) for word in words], dim=-1)


def on_grid(looked: Tensor, aspect: float) -> Tensor:
    """(S, B, N, V), N = h w positions row by row -> (S, B, V, h, w) with h / w the aspect."""
    width = round((looked.shape[2] / aspect) ** 0.5)
    return looked.movedim(2, 3).unflatten(-1, (-1, width))


def resized(maps: Tensor, height: int, width: int) -> Tensor:
    """(..., h, w) -> (..., height, width), bilinear."""
    flat = maps.reshape(-1, 1, *maps.shape[-2:]).float()
    big = F.interpolate(flat, size=(height, width), mode="bilinear", align_corners=False)
    return big.reshape(*maps.shape[:-2], height, width)


def overlap(maps: Tensor, masks: Bools) -> NDArray[np.float64]:
    """How well maps find a mask: intersection over union of the mask with as many of the map's brightest pixels.

    Args:    maps: (..., B, h, w), brought to the masks' size.  masks: (B, H, W).
    Returns: (..., B) in 0..1; NaN for an empty mask.
    """
    big = resized(maps, *masks.shape[1:]).flatten(-2).cpu().numpy()  # (..., B, H W)
    order = np.argsort(-big, axis=-1, kind="stable")
    scores = np.full(big.shape[:-1], np.nan)
    for b, mask in enumerate(masks.reshape(len(masks), -1)):
        if count := int(mask.sum()):
            common = mask[order[..., b, :count]].sum(axis=-1)
            scores[..., b] = common / (2 * count - common)
    return scores


def limits(masks: Bools, grid: int) -> Mapping[str, float]:
    """What a map could score: "chance" of a random place, "ceiling" of the mask itself on a grid of that side.

    chance = k / (2 n - k), of k masked pixels out of n
    """
    share = masks.mean(axis=(1, 2))
    coarse = F.adaptive_avg_pool2d(torch.from_numpy(masks).float()[:, None], grid)[:, 0]
    return {"chance": float((share / (2 - share)).mean()), "ceiling": float(np.nanmean(overlap(coarse, masks)))}
