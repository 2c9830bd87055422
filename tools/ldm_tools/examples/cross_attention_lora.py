"""Example 3: teach the frozen U-Net an attribute that it has never seen, through low-rank changes of cross-attention.

    h = W_0 x + (scale / r) B A x,   A (r, in) random, B (out, r) zero at first                  [Hu et al. 2021, eq. 3]

The attribute is cardiomegaly: the phantoms can draw it, and the shipped model was trained without it.

python -m ldm_tools.examples.cross_attention_lora
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import ldm
from ldm.blocks import Attention
from ldm.phantom import render
from ldm.phantom.prompts import DOMAINS, chest_style
from ldm.pipeline import PHANTOM_WEIGHTS, StableDiffusion
from ldm.train.diffusion import predict_noise
from ldm.unet import UNet
from ldm_tools.examples.measure import sample

PROMPTS = (DOMAINS["chest"].neutral, chest_style("cardiomegaly"))


class LoRA(nn.Module):
    """A frozen linear layer and a change of rank r."""

    def __init__(self, linear: nn.Linear, rank: int, scale: float) -> None:
        super().__init__()
        self.linear, self.factor = linear, scale / rank
        self.a = nn.Parameter(torch.randn(rank, linear.in_features) / linear.in_features**0.5)
        self.b = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.factor * F.linear(F.linear(x, self.a), self.b)


def add_lora(unet: UNet, rank: int = 4, scale: float = 4.0) -> list[nn.Parameter]:
    """Put one on every projection of every cross-attention, freeze all else, and return what is to be trained."""
    unet.requires_grad_(False)
    layers = []
    for attention in [module for module in unet.modules() if isinstance(module, Attention) and module.cross]:
        for name in ("to_q", "to_k", "to_v", "to_out.0"):
            linear = attention.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            layers.append(LoRA(linear, rank, scale))
            attention.set_submodule(name, layers[-1])
    return [parameter for layer in layers for parameter in (layer.a, layer.b)]


def pairs(sd: StableDiffusion, count: int, first_seed: int) -> Tensor:
    """(2, count, 4, h, w): latents of the same chests with a normal and an enlarged heart."""
    images = [
        [render("chest", first_seed + i, {"cardiomegaly": large}).image for i in range(count)]
        for large in (False, True)
    ]
    pixels = 2 * torch.stack([torch.stack([torch.from_numpy(image) for image in row]) for row in images]) - 1
    return torch.stack([sd.encode_image(row.permute(0, 3, 1, 2)) for row in pixels])


def train(sd: StableDiffusion, latents: Tensor, steps: int, batch: int = 16, lr: float = 2e-3, seed: int = 0) -> None:
    """Denoising of both kinds of chests under their captions; latents as from `pairs`."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    parameters = add_lora(sd.unet)
    optimizer = torch.optim.Adam(parameters, lr)
    contexts = sd.encode_prompts(PROMPTS)
    for step in range(steps):
        kind = torch.arange(batch) % 2
        x_0 = latents[kind, torch.randint(latents.shape[1], (batch,), generator=generator)]
        t = torch.randint(len(sd.schedule), (batch,), generator=generator)
        eps = torch.randn(x_0.shape, generator=generator)
        predicted = predict_noise(sd.unet, x_0, eps, t, contexts[kind], sd.schedule, autocast=None)
        loss = F.mse_loss(predicted, eps)
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def effect(sd: StableDiffusion, truth: Tensor, seeds: tuple[int, ...]) -> tuple[float, float]:
    """What the caption does to a normal chest of the same noise, on average over the seeds.

    truth: (4, h, w), the mean change of the drawn pairs. Returns its cosine with the truth and its size along it:
    0 is no change, 1 an enlargement as large as drawn.
    """
    neutral, large = sample(sd, sd.unet, PROMPTS, seeds).unflatten(0, (2, len(seeds)))
    change, truth = (large - neutral).mean(0).flatten(), truth.flatten()
    return float(F.cosine_similarity(change, truth, dim=0)), float(change @ truth / (truth @ truth))


def main(count: int = 256, steps: int = 600) -> None:
    sd = ldm.load(PHANTOM_WEIGHTS)
    seeds = tuple(range(16))
    latents = pairs(sd, count, first_seed=1_000_000)  # seeds that no phantom of the shipped model's training had
    truth = (latents[1] - latents[0]).mean(0)
    print("before: cosine {:.2f}, size {:.2f}".format(*effect(sd, truth, seeds)))
    train(sd, latents, steps)
    trained = sum(parameter.numel() for parameter in sd.unet.parameters() if parameter.requires_grad)
    print("after:  cosine {:.2f}, size {:.2f}".format(*effect(sd, truth, seeds)))
    print(f"{trained:,} parameters trained, of {sum(p.numel() for p in sd.unet.parameters()):,}")


if __name__ == "__main__":
    main()
