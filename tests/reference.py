"""Reference vectors of independent implementations, and the deterministic weights that they were computed with.

The vectors (tests/golden/*.npz) come from CompVis stable-diffusion 21f890f9, diffusers 0.42.1, transformers 5.23,
open_clip 3.3.0 and k-diffusion 0.1.1, on CPU in float32. Every network was filled by the generator below, so no
published weights are needed: a tensor depends only on its name in the single-file layout, its shape and the seed.

Tolerances (l2 of the difference over l2 of the reference) are three times the worst disagreement seen between two
reference implementations, or between float32 and float64: 3.4e-6 for one forward pass of any network, 7e-7 and 1.6e-5
for 50 DDIM steps at guidance 1 and 7.5.
"""

import json
import math
import zlib
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

GOLDEN = Path(__file__).parent / "golden"
SEED = 20240915
FORWARD, TRAJECTORY_G1, TRAJECTORY_G75 = 1e-5, 3e-6, 1e-4

QUERY_KEY = (".to_q.weight", ".to_k.weight", ".q_proj.weight", ".k_proj.weight", ".attn_1.q.weight", ".attn_1.k.weight")


def bell(name: str, shape: tuple[int, ...], scale: float, offset: float, seed: int = SEED) -> NDArray[np.float32]:
    """offset + scale * n with n of mean 0 and variance 1: four 16-bit fields of PCG64's raw stream, summed.

    Only integer arithmetic and correctly rounded float64 products, so the same bits on every machine.
    """
    bits = np.random.PCG64((seed << 32) | zlib.crc32(name.encode()))
    unit = math.sqrt(3.0 / (65536.0**2 - 1.0)) * scale
    size = math.prod(shape)
    values = np.empty(size, np.float32)
    even_fields, low_half = np.uint64(0x0000FFFF0000FFFF), np.uint64(0xFFFFFFFF)
    for start in range(0, size, 1 << 16):  # pieces that fit a cache: SD1.5 is 1.07e9 values
        raw = bits.random_raw(min(1 << 16, size - start))
        pairs = (raw & even_fields) + ((raw >> np.uint64(16)) & even_fields)  # two sums of two, side by side
        fields = (pairs & low_half) + (pairs >> np.uint64(32))
        values[start : start + len(raw)] = (fields.astype(np.float64) - 131070.0) * unit + offset
    return values.reshape(shape)


def weight(name: str, shape: tuple[int, ...], seed: int = SEED) -> NDArray[Any]:
    """The deterministic tensor of one key of the single-file layout."""
    if name.endswith("position_ids"):
        return np.arange(shape[-1], dtype=np.int64).reshape(shape)
    if name.endswith(".bias"):
        return bell(name, shape, 0.02, 0.0, seed)
    if len(shape) == 1:
        return bell(name, shape, 0.1, 1.0, seed)
    if name.endswith("embedding.weight"):
        return bell(name, shape, 0.5, 0.0, seed)
    gain = 1.5 if name.endswith(QUERY_KEY) else 1.0
    return bell(name, shape, gain / math.sqrt(math.prod(shape[1:])), 0.0, seed)


def noise(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A test input of unit variance, float32."""
    return torch.from_numpy(bell("input/" + name, shape, 1.0, 0.0))


def image(name: str, height: int, width: int) -> torch.Tensor:
    """A test image (1, 3, height, width) in [-1, 1]."""
    return (0.5 * noise(name, (1, 3, height, width))).clamp(-1, 1)


class Golden:
    """One file of reference vectors. Large tensors are stored as samples (@idx, @val) and statistics (@stats)."""

    def __init__(self, name: str) -> None:
        with np.load(GOLDEN / f"{name}.npz", allow_pickle=False) as arrays:
            self.arrays = dict(arrays)
        self.meta: dict[str, Any] = json.loads(bytes(self.arrays.pop("@meta"))) if "@meta" in self.arrays else {}

    def names(self) -> list[str]:
        return sorted({key.split("@")[0] for key in self.arrays})

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]

    def error(self, name: str, ours: torch.Tensor) -> float:
        """Relative l2 error at the stored places, or of the statistics over all places, whichever is worse.

        The statistics (mean, std, l2, min, max) catch what is wrong outside the samples; they are relative to the
        standard deviation and forgiven 20 times more, since an extreme value is a single number.
        """
        values = ours.detach().double().numpy()
        assert np.isfinite(values).all(), f"{name}: {np.count_nonzero(~np.isfinite(values))} values are not finite"
        if name in self.arrays:
            stored, sampled = self.arrays[name].astype(np.float64), values
            assert stored.shape == values.shape, f"{name}: {values.shape}, reference {stored.shape}"
        else:
            shape = tuple(self.arrays[name + "@shape"].tolist())
            assert shape == values.shape, f"{name}: {values.shape}, reference {shape}"
            stored = self.arrays[name + "@val"].astype(np.float64)
            sampled = values.reshape(-1)[self.arrays[name + "@idx"]]
        error = float(np.linalg.norm(sampled - stored) / np.linalg.norm(stored))
        if name + "@stats" in self.arrays:
            mean, std, norm, low, high = self.arrays[name + "@stats"]
            ours_stats = [values.mean(), values.std(), np.linalg.norm(values), values.min(), values.max()]
            scale = [std, std, norm, std, std]
            off = [abs(a - b) / s for a, b, s in zip(ours_stats, (mean, std, norm, low, high), scale, strict=True)]
            error = max(error, max(off) / 20)
        return error


@cache
def golden(name: str) -> Golden:
    return Golden(name)
