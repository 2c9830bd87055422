"""What the elementwise and norm kernels ask of their tensors, before a launch that would read whatever lies there."""

from torch import Tensor, bfloat16, float16, float32

from ldm_kernels.interpreter import mend_loops

DTYPES = (float16, bfloat16, float32)
MOST_ELEMENTS = 2**31  # of what a kernel addresses with 32-bit offsets
MOST_BLOCKS = 65535  # in the second and third dimension of a launch's grid


def require_alike(**tensors: Tensor | None) -> None:
    """Raises ValueError unless all are non-empty, of supported dtypes, and on one device; None is passed over.

    Kernels compute in float32 whatever the dtypes are, so these may differ: float16 activations, float32 weights.
    """
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first, x = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name}: dtype {tensor.dtype}, expected float16, bfloat16 or float32")
        if tensor.device != x.device:
            raise ValueError(f"{name}: on {tensor.device}, but {first} is on {x.device}; bring them together")
        if tensor.numel() == 0:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} holds nothing, expected at least one of each")
    mend_loops()


def require_shape(name: str, tensor: Tensor, expected: tuple[int, ...], meaning: str) -> None:
    """Raises ValueError unless a tensor has the expected shape; meaning: the shape in letters."""
    if tuple(tensor.shape) != expected:
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {meaning} = {expected}")
