"""Look inside a network and change it while it runs, without touching its code.

    with probe.capture(sd.unet, "mid_block", "*.attn2.probabilities") as seen:
        sd.unet(x_t, t, context)
    seen["mid_block"]                                                      # (B, C, h, w)

    skips = {"up_blocks.1.skips.0": probe.zero(), "mid_block": probe.scale(0.5).only(timesteps=leading(50)[:20])}
    with probe.edit(sd.unet, skips):
        for step in ddim(eps_fn, x_T, sd.schedule, 50): ...

A place is the key path of a module, as in the checkpoint, and means the module's output. An attention has further
places:

    NAME.probabilities   (B, h, N, M)   how much each position looks at each token, for each head
    NAME.heads           (B, h, N, d)   what each head found, before the heads are mixed
    NAME.context         (B, L, D)      what a cross-attention looks at: the prompt, of this layer alone

A block on the way down returns all its skips: its place means the last of them, which is the block's output. A residual
branch is removed by zeroing its last layer: `conv2` of a resnet, `proj_out` of a transformer, `attn2` itself.

Letters: B rows of a call, h heads of width d, N positions, M or L tokens, C channels, D context width.
"""

from ldm.probe.attentions import ATTENTIONS, AttentionKind, attention_probabilities
from ldm.probe.edits import Edit, Moment, Taps, add, apply, put, scale, swap_in, zero
from ldm.probe.taps import capture, edit, find_places, places

__all__ = [
    "ATTENTIONS",
    "AttentionKind",
    "Edit",
    "Moment",
    "Taps",
    "add",
    "apply",
    "attention_probabilities",
    "capture",
    "edit",
    "find_places",
    "places",
    "put",
    "scale",
    "swap_in",
    "zero",
]
