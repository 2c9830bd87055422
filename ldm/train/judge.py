"""Does the phantom model do what it is told? A small probe, trained on rendered phantoms, looks at its samples.

The probe sees latents: it is quick to train, and whatever it misses is also small in the image. It is no substitute
for looking at contact sheets, since it was never shown a malformed image.

Letters: B samples, K attributes over both domains, h w latent size.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.phantom import ATTRIBUTES
from ldm.train.learner import Recipe
from ldm.train.loop import fit
from ldm.train.phantom_set import PhantomSet, draw

COLUMNS = [(domain, attribute) for domain, names in ATTRIBUTES.items() for attribute in names]
PROBE = Recipe(steps=600, lr=2e-3, weight_decay=0.01)
PROBE_BATCH = 128


class Probe(nn.Module):
    """Latents (B, 4, h, w) -> logits (B, K), one per attribute in the order of COLUMNS."""

    def __init__(self, latent_shape: tuple[int, int, int], width: int = 64) -> None:
        super().__init__()
        channels, h, w = latent_shape
        layers: list[nn.Module] = []
        for c_in, stride in ((channels, 1), (width, 2), (width, 2)):
            layers += [nn.Conv2d(c_in, width, 3, stride, 1), nn.GroupNorm(8, width), nn.SiLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(width * (h // 4) * (w // 4), len(COLUMNS)))

    def forward(self, latents: Tensor) -> Tensor:
        return self.layers(latents)

    @torch.no_grad()
    def probabilities(self, latents: Tensor, domain: str) -> dict[str, Tensor]:
        """attribute -> (B,) probability that each sample shows it."""
        p = torch.sigmoid(self(latents))
        return {name: p[:, i] for i, (own, name) in enumerate(COLUMNS) if own == domain}


def targets(data: PhantomSet) -> tuple[Tensor, Tensor]:
    """Labels (N, K) and a mask (N, K) that is 1 where the attribute belongs to the image's domain."""
    labels = torch.zeros(len(data), len(COLUMNS))
    mask = torch.zeros(len(data), len(COLUMNS))
    for i, ((domain, _), attributes) in enumerate(zip(data.keys, data.attributes, strict=True)):
        for k, (own, name) in enumerate(COLUMNS):
            if own == domain:
                mask[i, k] = 1.0
                labels[i, k] = float(attributes[name])
    return labels, mask


def train_probe(latents: Tensor, data: PhantomSet, folder: Path, seed: int = 0) -> Probe:
    """A probe for the latents (N, 4, h, w) of a set. A little noise on them makes it forgive what sampling leaves."""
    torch.manual_seed(seed)
    probe = Probe((latents.shape[1], latents.shape[2], latents.shape[3]))
    labels, mask = targets(data)

    def loss_at(step: int) -> Tensor:
        images = torch.from_numpy(draw(seed, step, len(latents), PROBE_BATCH))
        noise = torch.randn(latents[images].shape, generator=torch.Generator().manual_seed(step))
        logits = probe(latents[images] + 0.1 * noise)
        return (F.binary_cross_entropy_with_logits(logits, labels[images], reduction="none") * mask[images]).mean()

    fit("probe", probe, loss_at, PROBE, folder)
    return probe


def accuracy(probe: Probe, latents: Tensor, data: PhantomSet) -> dict[str, float]:
    """The share of a set's images that the probe gets right, by attribute."""
    labels, mask = targets(data)
    with torch.no_grad():
        right = ((probe(latents) > 0) == (labels > 0.5)).float() * mask
    return {name: float(right[:, k].sum() / mask[:, k].sum()) for k, (_, name) in enumerate(COLUMNS)}


def verdict(
    probe: Probe, domain: str, neutral: Tensor, styled: Mapping[str, Mapping[int, Tensor]]
) -> dict[str, object]:
    """What the probe says of a traversal's latents.

    Args:    neutral: (B, 4, h, w).  styled: attribute -> swap step -> (B, 4, h, w).
    Returns: "clean": the share of neutral samples that show no attribute. For each attribute and swap step, "shown":
             the share of samples that show it; "others": the share where any other attribute differs from the neutral
             sample of the same seed.
    """
    before = {name: p > 0.5 for name, p in probe.probabilities(neutral, domain).items()}
    report: dict[str, object] = {"clean": float(1 - torch.stack(list(before.values())).any(dim=0).float().mean())}
    for attribute, by_step in styled.items():
        rows = {}
        for step, latents in by_step.items():
            after = {name: p > 0.5 for name, p in probe.probabilities(latents, domain).items()}
            others = torch.stack([after[name] != before[name] for name in after if name != attribute])
            rows[f"s{step:02d}"] = {
                "shown": float(after[attribute].float().mean()),
                "others": float(others.any(dim=0).float().mean()),
            }
        report[attribute] = rows
    return report
