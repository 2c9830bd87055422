"""Taps: look at any activation of a network, or change it, while it runs, without touching the network's code.

    with sd.unet.capture("mid_block", "*.attn2.probabilities") as seen:
        sd.unet(x_t, t, context)
    seen["mid_block"]                                                      # (B, C, h, w)

    with sd.unet.edit({"up_blocks.1.skips.0": zero(), "mid_block": scale(0.5).only(timesteps=leading(50)[:20])}):
        for step in ddim(eps_fn, x_T, sd.schedule, 50): ...

A place is the key path of a module, as in the checkpoint, and means the module's output. An attention has further
places:

    NAME.probabilities   (B, h, N, M)   how much each position looks at each token, for each head
    NAME.heads           (B, h, N, d)   what each head found, before the heads are mixed
    NAME.context         (B, L, D)      what a cross-attention looks at: the prompt, of this layer alone

A block on the way down returns all its skips: its place means the last of them, which is the block's output. A residual
branch is removed by zeroing its last layer: `conv2` of a resnet, `proj_out` of a transformer, `attn2` itself.

Hooks exist only while a `with` is open, so a network that nobody looks at runs as if this file were not there.
Letters: B rows of a call, h heads of width d, N positions, M or L tokens, C channels, D context width.
"""

from ldm.probe.taps.edits import Edit, Moment, Taps, add, apply, put, scale, swap_in, zero
from ldm.probe.taps.networks import MultiHead, Tapped, attention_probabilities

__all__ = [
    "Edit",
    "Moment",
    "MultiHead",
    "Tapped",
    "Taps",
    "add",
    "apply",
    "attention_probabilities",
    "put",
    "scale",
    "swap_in",
    "zero",
]
