"""Numbers that are none: found where they first show, and traced to the tensor that they come from."""

import torch
from torch import Tensor, nn


class NotFinite(ValueError):
    """A network gave NaN or Inf: which, when, where it comes from, and what usually cures it."""


def is_finite(x: Tensor) -> bool:
    """Whether all of it is; waits for the device."""
    return bool(x.isfinite().all())


def first_bad_weight(network: nn.Module) -> tuple[int, str]:
    """How many of a network's tensors hold NaN or Inf, and the first of them; "" for none."""
    bad = [name for name, tensor in network.state_dict().items() if not is_finite(tensor)]
    return len(bad), bad[0] if bad else ""


def blame(name: str, network: nn.Module, when: str = "") -> NotFinite:
    """The error for a network, called `name`, whose output is not finite though its input was; when: "at step 3"."""
    count, first = first_bad_weight(network)
    what = " ".join(filter(None, (f"the {name}'s output is not finite", when)))
    if count:
        return NotFinite(
            f"{what}: {count} of its weights are not, the first: {first}. The file is damaged, or its weights were "
            "beyond float16's 65504; get it again, or in float32 (`ldm inspect` counts such tensors)"
        )
    dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
    if dtype == "float16":
        return NotFinite(f"{what}: its weights are, so it overflows float16; use float32 or bfloat16 (--dtype)")
    return NotFinite(f"{what}, in {dtype}: its weights are, so its input lies far outside what it was trained on")


class Watch:
    """Finds the first step at which a run's latents are not finite: at once on a CPU, on a GPU at the end."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.first: Tensor | None = None  # the first bad step, on the device; -1 while there is none

    def __call__(self, index: int, x0_pred: Tensor, last: bool) -> None:
        """Judge a step. Raises NotFinite: on the CPU at once, elsewhere at the last step."""
        bad = x0_pred.isfinite().all().logical_not()
        if self.first is None:
            self.first = torch.full((), -1, dtype=torch.int64, device=x0_pred.device)
        self.first = torch.where((self.first < 0) & bad, index, self.first)
        if (last or x0_pred.device.type == "cpu") and (step := int(self.first)) >= 0:
            raise blame("U-Net", self.network, f"at step {step}")
