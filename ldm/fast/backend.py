"""Which of torch and the kernels computes on a device.

"auto": the kernels of `kernels/` on CUDA GPUs of compute capability 8.0 and newer, plain torch everywhere else.
"torch": never a kernel. "triton": always, and a ValueError that says why where it cannot be; in Triton's interpreter
(TRITON_INTERPRET=1) on the CPU too, slowly. "openvino": the U-Net by OpenVINO on a CPU, all else by torch; see
`ldm.fast.openvino_engine`.
"""

import os
from importlib.util import find_spec
from typing import Literal, get_args

import torch

Backend = Literal["auto", "torch", "triton", "openvino"]

_TRITON = find_spec("triton") is not None  # asked, not imported: the CPU has no need of it
_OPENVINO = find_spec("openvino") is not None


def resolved(backend: Backend, device: torch.device) -> Literal["torch", "triton", "openvino"]:
    """What a choice means on a device.

    Raises:  ValueError: another name, or one that cannot compute there.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend: got {backend!r}, expected one of {', '.join(get_args(Backend))}")
    if backend == "openvino":
        if not _OPENVINO:
            raise ValueError('backend: openvino is not installed here; pip install -e ".[openvino]" installs it')
        if device.type != "cpu":
            raise ValueError(f"backend: openvino computes on a CPU, the tensors are on {device}; expected --device cpu")
        return "openvino"
    why_not = _why_not(device)
    if backend == "triton" and why_not:
        raise ValueError(f"backend: triton was asked for, but {why_not}")
    on_gpu = backend == "auto" and device.type == "cuda" and not why_not
    return "triton" if backend == "triton" or on_gpu else "torch"


def _why_not(device: torch.device) -> str | None:
    """Why no kernel can run on a device; None where they can."""
    if not _TRITON:
        return "triton is not installed here"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if device.type != "cuda":
        return f"the tensors are on {device}; expected a CUDA GPU, or TRITON_INTERPRET=1 and patience"
    gpu = torch.cuda.get_device_properties(device)
    if gpu.major < 8:
        return f"{gpu.name} has compute capability {gpu.major}.{gpu.minor}, expected 8.0 or newer"
    return None
