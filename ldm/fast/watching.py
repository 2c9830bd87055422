"""Whether a step may span a module: only where nobody hangs on it or replaced what it computes."""

import torch
from torch import nn


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what its kind does, and nobody hangs on it or replaced its forward."""
    return type(module).forward is kind.forward and not watched(module) and "forward" not in vars(module)


def watched(module: nn.Module) -> bool:
    """Whether somebody hangs on a module."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks)


def transformed() -> bool:
    """Whether torch compiles what is called now, or functorch transforms it: then it is to see plain operations."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
