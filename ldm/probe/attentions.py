"""Which modules are attentions, and what in them makes q, k and v.

Letters: B rows of a call, h heads of width d, N positions, M tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ldm.blocks import Attention
from ldm.clip import SelfAttention


@dataclass(frozen=True)
class AttentionKind:
    """The names of the modules in an attention; `out` is given the heads side by side.

    The attention has its number of heads in `.heads`, and `.cross` where it may look at a second input.
    """

    q: str
    k: str
    v: str
    out: str
    causal: bool = False  # position n sees tokens 0..n only


# Attentions of one's own are added here, and then have places inside.
ATTENTIONS: dict[type[nn.Module], AttentionKind] = {
    Attention: AttentionKind("to_q", "to_k", "to_v", "to_out"),
    SelfAttention: AttentionKind("q_proj", "k_proj", "v_proj", "out_proj", causal=True),
}


def kind_of(module: nn.Module) -> AttentionKind | None:
    """What a module is as an attention, by its class or the class it comes from; None: none."""
    return next((ATTENTIONS[of] for of in type(module).__mro__ if of in ATTENTIONS), None)


def inside(module: nn.Module) -> tuple[str, ...]:
    """The places inside a module."""
    if kind_of(module) is None:
        return ()
    return ("probabilities", "heads", "context") if getattr(module, "cross", False) else ("probabilities", "heads")


def attention_probabilities(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)), written out: what the fused attention multiplies the values with.

    [Vaswani et al. 2017, eq. 1]

    Args:    q: (B, h, N, d).  k: (B, h, M, d).  causal: position n sees tokens 0..n only.
    Returns: (B, h, N, M); each row sums to 1.
    """
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(dim=-1)
