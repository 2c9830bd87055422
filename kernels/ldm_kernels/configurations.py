"""Block sizes: which exist, which one a GPU gets, and what happens when it does not fit."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from ldm_kernels.heads import Layout

logger = logging.getLogger(__name__)

SM80, SM86, SM89, SM90 = EVERYWHERE = 80, 86, 89, 90  # A100; RTX 30; RTX 40, L4; H100


@dataclass(frozen=True)
class Configuration:
    """One way to cut one kernel's work, for heads up to `width` wide.

    kernel:       "forward", "dq", "dkdv" (self-attention), "backward" (cross-attention).
    own:          rows that a program owns: queries, or keys in "dkdv".
    loop:         rows of the tiles that it loops over.
    warps:        warps a program, 32 threads each.
    stages:       depth of the software pipeline.
    capabilities: the GPUs it is offered on, 80 for sm_80.
    layout:       how a head's width is cut, see `ldm_kernels.heads.pieces`.
    """

    width: int
    kernel: str
    own: int
    loop: int
    warps: int
    stages: int
    capabilities: tuple[int, ...]
    layout: Layout = "split"

    def __str__(self) -> str:
        return f"{self.kernel} d{self.width} {self.own}x{self.loop} w{self.warps} s{self.stages} {self.layout}"


def capability(x: Tensor) -> int:
    """The compute capability of a tensor's GPU, 80 for sm_80; on the CPU, where kernels are interpreted, also 80."""
    if not x.is_cuda:
        return SM80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def candidates(configurations: Sequence[Configuration], kernel: str, x: Tensor) -> list[Configuration]:
    """The configurations for a tensor of heads on its GPU, the best guess first, the others to fall back on.

    A head width without its own gets those of the next wider one, a GPU without its own those of the next older one.

    Args:    x: (..., d).
    Raises:  ValueError: when the GPU is older than all that there are configurations for.
    """
    mine = [c for c in configurations if c.kernel == kernel and c.width >= x.shape[-1]]
    mine = [c for c in mine if c.width == min(other.width for other in mine)]
    known = [older for c in mine for older in c.capabilities if older <= capability(x)]
    if not known:
        raise ValueError(f"q: on a GPU of compute capability {capability(x) / 10}, expected 8.0 or newer")
    return [c for c in mine if max(known) in c.capabilities]


_too_large: set[tuple[Configuration, torch.dtype, int]] = set()


def run_first_that_fits(
    configurations: Sequence[Configuration], kernel: str, x: Tensor, launch: Callable[[Configuration], None]
) -> None:
    """Launches on x's GPU with the first configuration that has the shared memory for it; says once which one had not.

    Raises:  ValueError: when none fits.
    """
    if x.shape[0] == 0:
        return None  # an empty batch: the result is empty, and there is no empty grid
    for option in candidates(configurations, kernel, x):
        key = (option, x.dtype, capability(x))
        if key in _too_large:
            continue
        try:
            with torch.cuda.device_of(x):
                return launch(option)
        except OutOfResources as error:
            _too_large.add(key)
            logger.warning("%s does not fit this GPU, trying the next configuration: %s", option, error)
    raise ValueError(f"q: no configuration of {kernel} fits this GPU in {x.dtype}; use torch's attention")
