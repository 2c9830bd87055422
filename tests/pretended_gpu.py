"""A GPU that is none: CPU tensors that say they lie on one, and refuse what those refuse.

    with pretended_gpu():
        x = x.to("cuda")  # from here on a tensor of the CPU beside it, `.numpy()`, a CPU's generator are errors

Numbers in tensors without dimensions may meet any, and copies, as on a GPU. Nothing is computed elsewhere.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

COPIES = {"copy_", "__setitem__", "__getitem__", "index_put_", "_has_compatible_shallow_copy_type"}
MOVES = {"to", "cpu", "cuda"}


class OnGpu(Tensor):
    """A tensor of the CPU that says it lies on a GPU."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert a tensor on cuda to numpy; use .cpu() first")


def is_gpu(device: object) -> bool:
    return isinstance(device, str | torch.device) and str(device).startswith("cuda")


def there(result: Any) -> Any:
    """What an operation gives, on the GPU."""
    return tree_map(lambda x: x.as_subclass(OnGpu) if isinstance(x, Tensor) and not isinstance(x, OnGpu) else x, result)


def plainly(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    with torch._C.DisableTorchFunctionSubclass():
        return func(*args, **kwargs)


def run(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """One operation. Raises TypeError, RuntimeError where a GPU's tensors would."""
    name, tensors = getattr(func, "__name__", ""), [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    on_gpu = any(isinstance(x, OnGpu) for x in tensors)
    if on_gpu and func == Tensor.device.__get__:
        return torch.device("cuda", 0)
    if on_gpu and name in ("numpy", "__array__"):
        raise TypeError("can't convert a tensor on cuda to numpy; use .cpu() first")
    if name in MOVES and tensors:
        return moved(name, func, args, kwargs)
    placed = is_gpu(kwargs.get("device"))
    generator = kwargs.get("generator")
    if (placed or on_gpu) and generator is not None:
        raise RuntimeError(f"{name}: expected a generator on cuda, got one on {generator.device}")
    if on_gpu and name not in COPIES | {"__get__", "__set__"}:
        beside = [tuple(x.shape) for x in tensors if not isinstance(x, OnGpu) and x.ndim]
        if beside:
            raise RuntimeError(f"{name}: expected all tensors on one device, got cuda and, on the CPU, {beside}")
    if name == "__getitem__" and on_gpu and not isinstance(args[0], OnGpu):
        raise RuntimeError("indices: on cuda, of a tensor on the CPU")
    result = plainly(func, args, {**kwargs, "device": torch.device("cpu")} if placed else kwargs)
    if name in COPIES:
        on_gpu = isinstance(args[0], OnGpu)
    return result if any(result is x for x in tensors) or not (on_gpu or placed) else there(result)


def moved(name: str, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """`to`, `cpu` and `cuda`."""
    targets = [x for x in (*args[1:], *kwargs.values()) if isinstance(x, str | torch.device | Tensor)]
    goes = {"cpu": False, "cuda": True}.get(name, isinstance(args[0], OnGpu))
    for target in targets:
        goes = isinstance(target, OnGpu) if isinstance(target, Tensor) else is_gpu(target)

    def here(x: Any) -> Any:
        return torch.device("cpu") if isinstance(x, str | torch.device) else x

    if name == "cuda":
        func, args, kwargs = Tensor.to, (args[0], "cpu"), {}
    result = plainly(func, [*map(here, args)], {option: here(value) for option, value in kwargs.items()})
    if result is args[0] and goes != isinstance(args[0], OnGpu):
        result = plainly(Tensor.clone, [result], {})
    return result if result is args[0] else plainly(Tensor.as_subclass, [result, OnGpu if goes else Tensor], {})


class _Everywhere(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """ "cuda" is such a GPU; modules that are moved there get new parameters."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with _Everywhere():
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(before)
