"""What a kernel looks like to the compiler, as plain data: enough to compile it for a GPU that is not there."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from triton.runtime import JITFunction


@dataclass(frozen=True)
class Spec:
    """One shipped configuration of one kernel.

    name:         unique over all kernels, fit for a table's first column: "attention.forward d40 128x64 w4 s3 split8".
    fn:           the function under `@triton.jit`. Compiling needs a process that does not interpret kernels.
    signature:    every argument in the kernel's order -> its type as Triton writes it: "*fp16", "fp32", "i32",
                  or "constexpr".
    constexprs:   every argument that is "constexpr" in the signature -> its value.
    divisible:    arguments of which the launcher promises that 16 divides them: the bytes of a pointer's address, an
                  integer's value. Without that promise no load is 16 bytes wide.
    num_warps:    warps a program, 32 threads each.
    num_stages:   depth of the software pipeline: tiles on their way from memory while one is being multiplied.
    capabilities: the compute capabilities it is offered on, 80 for sm_80.
    useful_ratio: floating-point operations that the tensor cores execute in the loop over those that the mathematics
                  asks for, full tiles taken as given. 1.0: no padding. None: no matrix products in this kernel.
    """

    name: str
    fn: JITFunction
    signature: Mapping[str, str]
    constexprs: Mapping[str, int | float | bool | str]
    divisible: tuple[str, ...]
    num_warps: int
    num_stages: int
    capabilities: tuple[int, ...]
    useful_ratio: float | None = None


def signature(fn: JITFunction, kinds: Mapping[str, Collection[str]]) -> dict[str, str]:
    """Each argument's type, in the kernel's order.

    Args:    kinds: type as Triton writes it -> the arguments that have it; what is in none points to fp16 numbers.
    """
    kind_of = {name: kind for kind, names in kinds.items() for name in names}
    return {name: kind_of.get(name, "*fp16") for name in fn.arg_names}
