"""Example 4: one self-attention replaced by linear attention, and taught by the one that it replaces.

    out_n = phi(q_n)^T (sum_m phi(k_m) v_m^T) / (phi(q_n)^T sum_m phi(k_m)),   phi(x) = elu(x) + 1
                                                                          [Katharopoulos et al. 2020, section 3.2]

costs N d^2 where softmax costs N^2 d: at 64 x 64 positions and d = 40 a hundredth.

python -m ldm_tools.examples.linear_attention
"""

import torch
from torch import Tensor
from torch.nn import functional as F

import ldm
from ldm import probe
from ldm.blocks import Attention
from ldm.phantom import render, sample_attributes
from ldm.pipeline import PHANTOM_WEIGHTS, StableDiffusion
from ldm.traversal.round_trip import relative_error
from ldm_tools.examples.measure import PROMPTS, greys, sample

PLACE = "up_blocks.1.attentions.1.transformer_blocks.0"  # the largest map that the phantom model attends to


class LinearAttention(Attention):
    """Self-attention with the same weights and names."""

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        heads = (-1, self.heads, x.shape[-1] // self.heads)
        q, k, v = (project(x).unflatten(-1, heads[1:]) for project in (self.to_q, self.to_k, self.to_v))
        q, k = F.elu(q) + 1, F.elu(k) + 1
        summary = torch.einsum("bmhd,bmhe->bhde", k, v)
        weight = torch.einsum("bnhd,bhd->bnh", q, k.sum(1))
        return self.to_out((torch.einsum("bnhd,bhde->bnhe", q, summary) / weight[..., None]).flatten(2))


def replace(sd: StableDiffusion, place: str = PLACE) -> tuple[Attention, LinearAttention]:
    """Put a linear attention with the same weights in place of a block's self-attention; returns both."""
    block = sd.unet.get_submodule(place)
    teacher = block.attn1
    assert isinstance(teacher, Attention)
    student = LinearAttention(teacher.to_q.out_features, teacher.heads)
    student.load_state_dict(teacher.state_dict())
    block.attn1 = student
    return teacher, student


@torch.no_grad()
def lessons(sd: StableDiffusion, count: int, seed: int = 0) -> Tensor:
    """(count, N, C): what the self-attention gets for drawn phantoms with noise of random times; before `replace`."""
    generator = torch.Generator().manual_seed(seed)
    contexts = sd.encode_prompts(PROMPTS)
    shown = []
    for i in range(count // 2):
        images = [render(domain, 2_000_000 + i, sample_attributes(domain, i)).image for domain in ("chest", "skin")]
        x_0 = sd.encode_image(2 * torch.stack([torch.from_numpy(image) for image in images]).permute(0, 3, 1, 2) - 1)
        t = torch.randint(len(sd.schedule), (2,), generator=generator)
        x_t = sd.schedule.add_noise(x_0, torch.randn(x_0.shape, generator=generator), t)
        with probe.capture(sd.unet, f"{PLACE}.norm1") as taps:
            sd.unet(x_t, t, contexts)
        shown.append(taps[f"{PLACE}.norm1"])
    return torch.cat(shown)


def distil(teacher: Attention, student: LinearAttention, shown: Tensor, steps: int, lr: float = 2e-3) -> None:
    """Train the student to answer as the teacher does."""
    with torch.no_grad():
        answers = teacher(shown)
    student.requires_grad_(True)
    optimizer = torch.optim.Adam(student.parameters(), lr)
    for step in range(steps):
        rows = torch.arange(16 * step, 16 * (step + 1)) % len(shown)
        loss = F.mse_loss(student(shown[rows]), answers[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main(count: int = 128, steps: int = 600) -> None:
    sd = ldm.load(PHANTOM_WEIGHTS)
    plain = sample(sd, sd.unet)
    shown, unseen = lessons(sd, count).split([count - 32, 32])
    teacher, student = replace(sd)
    for when in ("same weights", "distilled"):
        with torch.no_grad():
            error = relative_error(student(unseen), teacher(unseen))
        changed = sample(sd, sd.unet)
        print(
            f"{when}: attention off by {error:.3f}, latents by {relative_error(changed, plain):.3f}, "
            f"images by {greys(sd, changed, plain):.2f} grey levels"
        )
        if when == "same weights":
            distil(teacher, student, shown, steps)


if __name__ == "__main__":
    main()
