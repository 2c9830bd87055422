"""Whether a step may span a module: only where nobody hangs on it or replaced what it computes."""

from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

KNOWN = ("torch.", "ldm.")  # whose modules keep nothing from one call to the next


def untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what its kind does, and nobody hangs on it or replaced its forward, ours apart."""
    return type(module).forward is kind.forward and not watched(module) and own_or_ours(module)


def watched(module: nn.Module) -> bool:
    """Whether somebody hangs on a module, or on every module there is."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or bool(nn.modules.module._has_any_global_hook())


def transformed() -> bool:
    """Whether torch compiles what is called now, or functorch transforms it: then it is to see plain operations."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()


def traced() -> bool:
    """Whether sizes are not to be asked for: whoever compiles or traces would keep the answer."""
    return transformed() or torch.jit.is_tracing()


def readable(x: Tensor, dims: int) -> bool:
    """Whether x is a tensor of torch's own kind, of so many dimensions, whose sizes may be asked for."""
    return not traced() and type(x) is Tensor and x.ndim == dims


def intercepted() -> bool:
    """Whether gradients are asked for, or something looks at each operation: then it is to see the plain ones."""
    if traced():  # first: a compiler cannot read what follows
        return True
    dual = torch.autograd.forward_ad._current_level >= 0  # derivatives forward, which no_grad does not end
    asked = torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or dual
    modes = torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack()
    recorded = torch.autograd._profiler_enabled()
    hooked = nn.modules.module._has_any_global_hook()  # of every module there is
    return asked or recorded or hooked or bool(modes)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether all are tensors of torch's own kind, dense, in float32: others say themselves what an operation does."""
    all_of = (x, weight) if bias is None else (x, weight, bias)
    own = all(type(y) in (Tensor, nn.Parameter) and y.layout == torch.strided for y in all_of)
    return own and {y.dtype for y in all_of} == {torch.float32} and (bias is None or bias.shape == weight.shape[:1])


def parametrized(module: nn.Module) -> bool:
    """Whether a module's weights are computed as they are read: once a call, as some draw or count."""
    return parametrize.is_parametrized(module)


def convolves(module: nn.Module, size: int, stride: int = 1) -> TypeGuard[nn.Conv2d]:
    """Whether a module, as it is set now, is a plain convolution of size x size with a border of half as many zeros."""
    return (
        isinstance(module, nn.Conv2d)
        and (module.kernel_size, module.stride, module.dilation) == ((size, size), (stride, stride), (1, 1))
        and (module.padding, module.padding_mode, module.groups) == ((size // 2, size // 2), "zeros", 1)
        and getattr(module._conv_forward, "__func__", None) is nn.Conv2d._conv_forward  # some replace it, not forward
    )


def ordinary(module: nn.Module) -> bool:
    """Whether nobody watches a module or replaced its forward, ours apart, and it is torch's or of ldm."""
    return own_or_ours(module) and not watched(module) and known(module)


def own_or_ours(module: nn.Module) -> bool:
    """Whether a module's forward is that of its class, or what `ldm.fast` installed for it."""
    forward = vars(module).get("forward")
    return forward is None or getattr(getattr(forward, "func", None), "__module__", "") == "ldm.fast.forwards"


def known(module: nn.Module) -> bool:
    """Whether a module is torch's or of ldm."""
    return type(module).__module__.startswith(KNOWN)
