"""The networks that the reference vectors were computed with: filled by name, and watched module by module."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from reference import Golden, weight
from torch import Tensor, nn

from ldm.checkpoint import layouts
from ldm.checkpoint.loading import build
from ldm.checkpoint.settings import PartConfig
from ldm.config import CLIPConfig, Config, UNetConfig, VAEConfig

# As deep as SD1.5, so with all of its key names; only the widths are smaller.
SMALL = Config(
    CLIPConfig(width=64, layers=3, heads=4, mlp_width=256),
    VAEConfig(widths=(32, 64, 128, 128)),
    UNetConfig(widths=(32, 64, 128, 128), context_width=64),
)


def filled(part: str, config: PartConfig) -> nn.Module:
    """The network of a configuration, each tensor generated under its single-file name. No gradients."""
    network = build(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    stored = layouts.to_single(part, shapes, layouts.depth_of(config))
    # The autoencoder's (C, C) attention weights are stored as (C, C, 1, 1): the same fan-in, so the same values.
    state = {name: torch.from_numpy(weight(stored[name], shape)) for name, shape in shapes.items()}
    network.load_state_dict(state, assign=True)
    return network.eval().requires_grad_(False)


@cache
def small(part: str) -> nn.Module:
    """One of the small networks. Shared by all tests: copy before changing it."""
    return filled(part, {"clip": SMALL.clip, "vae": SMALL.vae, "unet": SMALL.unet}[part])


def module_name(part: str, single: str, config: PartConfig) -> str:
    """Our name of a module that the single file's network calls `single`; "" is the whole network.

    The rename table knows what holds weights. A module around those is found as the parent of its first child; the
    halves of a resnet (`in_layers`, ...) are no modules here: their output is that of their last child.
    """
    depth = layouts.depth_of(config)
    pairs = layouts.unet_table(depth) if part == "unet" else layouts.vae_table(depth)
    known = layouts.rename(single, dict(pairs))
    if known is not None:
        return known
    children = [ours for name, ours in pairs if name.startswith(single + ".")]
    if single.endswith("_layers"):
        return children[-1]
    parent, dot, _ = children[0].rpartition(".")
    return parent if dot else ""


@contextmanager
def tap_errors(network: nn.Module, part: str, reference: Golden) -> Iterator[dict[str, float]]:
    """While open, the first row of every output that `reference` holds a tap of is compared with it.

    Yields a dictionary that fills up in running order: name -> error. The first large one is where a mismatch begins.
    """
    errors: dict[str, float] = {}

    def watch(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            errors[name] = reference.error(name, output[:1])

        return hook

    config = network.config
    names = [name for name in reference.names() if name.startswith("tap.")]
    modules = {name: network.get_submodule(module_name(part, name.removeprefix("tap."), config)) for name in names}
    hooks = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        yield errors
    finally:
        for hook in hooks:
            hook.remove()
    assert set(errors) == set(names), f"never ran: {sorted(set(names) - set(errors))}"


def too_large(errors: dict[str, float], limit: float) -> dict[str, float]:
    """The errors above a limit. Asserted to be empty, so that a failure shows names and numbers."""
    return {name: error for name, error in errors.items() if not error <= limit}
