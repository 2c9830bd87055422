"""LoRA: a frozen weight W, and beside it a change of low rank that learns. [Hu et al. 2021]

    h = W x + (alpha / r) B A x        A (r, in) random, B (out, r) zero at first

An `Adapter` holds every A and B under the names of kohya's files, where A is lora_down and B is lora_up.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ldm.checkpoint.container import LazyTensor, write_tensors
from ldm.unet import UNet

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
MODULES = {  # a choice of what changes -> the ends of the modules' names
    "attention": ATTENTION,
    "transformer": (*ATTENTION, "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out"),
}


class LowRank(nn.Module):
    """(alpha / r) B A x, for a linear layer or a convolution. [Hu et al. 2021, eq. 3]"""

    def __init__(self, layer: nn.Linear | nn.Conv2d, rank: int, alpha: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = alpha / rank
        self.lora_down: nn.Linear | nn.Conv2d  # A
        self.lora_up: nn.Linear | nn.Conv2d  # B
        if isinstance(layer, nn.Linear):
            self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
            self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        else:
            shape = (layer.kernel_size, layer.stride, layer.padding)
            self.lora_down = nn.Conv2d(layer.in_channels, rank, *shape, bias=False)  # type: ignore[arg-type]
            self.lora_up = nn.Conv2d(rank, layer.out_channels, 1, bias=False)
        nn.init.kaiming_uniform_(self.lora_down.weight, a=math.sqrt(5), generator=generator)  # as kohya's and PEFT's
        nn.init.zeros_(self.lora_up.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.lora_up(self.lora_down(x))


class Adapted(nn.Module):
    """h = W x + b + change(x)."""

    def __init__(self, frozen: nn.Module, change: LowRank) -> None:
        super().__init__()
        self.frozen, self.change = frozen, change

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.change(x)


class Adapter(nn.ModuleDict):
    """All that is trained: "lora_unet_" and a module's name, its dots as underscores -> its change.

    base: tells the model that it was trained on, its SHA-256.
    """

    def __init__(self, rank: int, alpha: float, modules: str, base: str) -> None:
        super().__init__()
        self.rank, self.alpha, self.kind, self.base = rank, alpha, modules, base

    def settings(self) -> dict[str, object]:
        """What must stay the same when a run is continued."""
        return {"rank": self.rank, "alpha": self.alpha, "modules": self.kind, "base_sha256": self.base}


def adapt(
    unet: UNet, rank: int, alpha: float | None = None, modules: str = "attention", *, seed: int = 0, base: str = ""
) -> Adapter:
    """Freeze a U-Net, in place, and put a change that is zero beside each of some modules.

    Args:    alpha: None: the rank, so that the change counts as it is.  modules: a name in MODULES.
             seed: of every A.  base: of `Adapter`.
    Raises:  ValueError: for a rank that is not low, or a network without such modules.
    """
    unet.requires_grad_(False)
    adapter = Adapter(rank, rank if alpha is None else alpha, modules, base)
    generator = torch.Generator().manual_seed(seed)
    ends = tuple(f".{end}" for end in MODULES[modules])
    for name, layer in list(unet.named_modules()):
        if name.endswith(ends) and isinstance(layer, nn.Linear | nn.Conv2d):
            full = min(layer.weight.shape[:2])
            if not 1 <= rank <= full:
                raise ValueError(f"--lora: got rank {rank}, expected 1..{full}, the rank of {name}")
            change = LowRank(layer, rank, adapter.alpha, generator).to(layer.weight.device)
            unet.set_submodule(name, Adapted(layer, change))
            adapter[f"lora_unet_{name.replace('.', '_')}"] = change
    if not len(adapter):
        raise ValueError(f"--lora: this U-Net has no module that ends in one of {', '.join(MODULES[modules])}")
    return adapter


def save_adapter(path: Path, adapter: Adapter, weights: Mapping[str, Tensor]) -> None:
    """Write a file in kohya's names, alpha beside each pair. Args: weights: as of the adapter's state."""
    alphas = {f"{name}.alpha": torch.tensor(float(adapter.alpha)) for name in adapter}
    tensors = {name: LazyTensor.of(name, tensor) for name, tensor in {**weights, **alphas}.items()}
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(adapter.rank),
        "ss_network_alpha": f"{adapter.alpha:g}",
        "ss_base_model_version": "sd_v1",
        "ldm.base_sha256": adapter.base,
    }
    write_tensors(path, tensors, metadata)
