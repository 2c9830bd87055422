"""Triton's interpreter, which runs kernels on the CPU, slowly, where TRITON_INTERPRET=1."""

from functools import cache
from importlib.metadata import version
from typing import Any

import triton


def interpreting(kernel: object) -> bool:
    """Whether a function under `@triton.jit` runs in Triton's interpreter (TRITON_INTERPRET=1), on the CPU."""
    return not isinstance(kernel, triton.JITFunction)


@cache
def mend_loops() -> None:
    """Let a loop's bounds be numbers of the kernel: before 3.8 the interpreter makes them integers in a way that numpy
    2.4 refuses, "only 0-dimensional arrays can be converted to Python scalars". Elsewhere this does nothing."""
    if triton.knobs.runtime.interpret and tuple(map(int, version("triton").split(".")[:2])) < (3, 8):
        from triton.runtime import interpreter

        patch = interpreter._patch_lang_tensor

        def patched(tensor: Any, scope: Any) -> None:
            patch(tensor, scope)
            scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

        interpreter._patch_lang_tensor = patched
