"""GroupNorm on channels_last images, with what stands before and behind it: the time added first, SiLU last.

    h = x + time        n = (h - mean) / sqrt(var + eps)        u = n weight + bias        out = u sigmoid(u)

mean and var are those of a group: some channels, all positions.               [Wu and He 2018; Elfwing et al. 2017]

Letters: B batch, N = H*W positions, C channels, G groups of C/G channels.
In memory, channels_last is (B, N, C), so a group is a narrow stripe; a tile cuts across groups and is read 16 bytes at
a time all the same:

              C                       1. statistics: a program takes COLUMNS channels of a chunk of positions and keeps
        +----+----+----+                 each channel's mean and squared deviations, tile by tile [Chan et al. 1983]
      N |    |tile|    |  chunk 0     2. combine: a program takes the chunks and channels of one group and merges them
        |    |tile|    |                 likewise. The time moves a channel's mean and leaves its deviations.
        +----+----+----+              3. apply: tile by tile, normalise and write.
        |    |    |    |  chunk 1
        +----+----+----+              x is read twice, the second time mostly from the L2 cache, and written once.
                                      Torch's GroupNorm makes the image NCHW first: two copies more, one pass for SiLU.

Deviations are taken from a mean that is known, never as E[x^2] - E[x]^2, which loses every digit where the mean is
large against the spread. Backward, with g the gradient of u:

    grad_x = rstd (g weight - s1 - n s2),      s1 = mean over the group of g weight,  s2 = that of g weight n

So again 1. sums over chunks of positions for each channel, 2. their merging (few numbers: left to torch), 3. apply.
No atomics: the same bits every time.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ldm_kernels.checks import MOST_BLOCKS, MOST_ELEMENTS, require_alike, require_shape
from ldm_kernels.specs import Spec

# ---- kernels ---------------------------------------------------------------------------------------


@triton.jit
def load_tile(x, rows, columns, end, C, EVEN: tl.constexpr):
    """x[rows, columns] in fp32; rows from `end` on are zeros."""
    at = x + rows[:, None] * C + columns[None, :]
    if EVEN:  # noqa: SIM108  decided when the kernel is compiled, as the `if` of every other kernel
        tile = tl.load(at)
    else:
        tile = tl.load(at, mask=rows[:, None] < end, other=0.0)
    return tile.to(tl.float32)


@triton.jit
def statistics_kernel(
    x, means, deviations, N, C, chunk_rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, EVEN: tl.constexpr
):
    """means, deviations (B, chunks, C): each channel's mean over a chunk, and the sum of squared deviations from it."""
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    x += batch * N * C
    begin = chunk * chunk_rows
    end = tl.minimum(begin + chunk_rows, N)
    mean = tl.zeros((COLUMNS,), tl.float32)
    deviation = tl.zeros((COLUMNS,), tl.float32)
    for start in range(begin, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        tile = load_tile(x, rows, columns, end, C, EVEN)
        n = tl.minimum(ROWS, end - start).to(tl.float32)
        tile_mean = tl.sum(tile, 0) / n
        centred = tile - tile_mean[None, :]
        if not EVEN:
            centred = tl.where(rows[:, None] < end, centred, 0.0)
        seen = (start - begin).to(tl.float32)
        apart = tile_mean - mean
        mean += apart * (n / (seen + n))
        deviation += tl.sum(centred * centred, 0) + apart * apart * (seen * n / (seen + n))
    at = (batch * tl.num_programs(0) + chunk) * C + columns
    tl.store(means + at, mean)
    tl.store(deviations + at, deviation)


@triton.jit
def combine_kernel(
    means, deviations, time, mean, rstd, N, C, chunk_rows, chunks, eps,
    WIDTH: tl.constexpr, PADDED_WIDTH: tl.constexpr, PADDED_CHUNKS: tl.constexpr, TIME: tl.constexpr,
):  # fmt: skip
    """mean, rstd (B, G) of x + time; WIDTH = C/G."""
    group, batch = tl.program_id(0), tl.program_id(1)
    chunk = tl.arange(0, PADDED_CHUNKS)[:, None]
    channel = group * WIDTH + tl.arange(0, PADDED_WIDTH)[None, :]
    in_group = tl.arange(0, PADDED_WIDTH)[None, :] < WIDTH
    there = (chunk < chunks) & in_group
    at = (batch * chunks + chunk) * C + channel
    part_mean = tl.load(means + at, mask=there, other=0.0)
    if TIME:
        part_mean += tl.load(time + batch * C + channel, mask=in_group, other=0.0).to(tl.float32)
    n = tl.where(there, tl.minimum(chunk_rows, N - chunk * chunk_rows), 0).to(tl.float32)
    size = N * 1.0 * WIDTH
    # Groups of one mean are common: what lies between it and the first part is small, and sums without loss.
    base = tl.sum(tl.sum(tl.where((chunk == 0) & (channel == group * WIDTH), part_mean, 0.0), 1), 0)
    group_mean = base + tl.sum(tl.sum(n * (part_mean - base), 1), 0) / size
    apart = part_mean - group_mean
    deviation = tl.load(deviations + at, mask=there, other=0.0) + n * apart * apart
    variance = tl.sum(tl.sum(deviation, 1), 0) / size
    tl.store(mean + batch * tl.num_programs(0) + group, group_mean)
    tl.store(rstd + batch * tl.num_programs(0) + group, 1 / tl.sqrt(variance + eps))


@triton.jit
def load_channels(time, weight, bias, mean, rstd, columns, batch, C, WIDTH: tl.constexpr, TIME: tl.constexpr):
    """What a tile of one image needs to know of its channels: (shift, rstd, weight, bias), n = (x + shift) rstd."""
    group = batch * (C // WIDTH) + columns // WIDTH
    shift = -tl.load(mean + group)
    if TIME:
        shift += tl.load(time + batch * C + columns).to(tl.float32)
    w = tl.load(weight + columns).to(tl.float32)
    b = tl.load(bias + columns).to(tl.float32)
    return shift, tl.load(rstd + group), w, b


@triton.jit
def apply_kernel(
    x, time, weight, bias, mean, rstd, out, N, C,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TIME: tl.constexpr, SILU: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """out (B, N, C)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    batch = tl.program_id(2).to(tl.int64)
    shift, r, w, b = load_channels(time, weight, bias, mean, rstd, columns, batch, C, WIDTH, TIME)
    normalised = (load_tile(x + batch * N * C, rows, columns, N, C, EVEN) + shift[None, :]) * r[None, :]
    result = normalised * w[None, :] + b[None, :]
    if SILU:
        result = result * tl.sigmoid(result)
    at = out + batch * N * C + rows[:, None] * C + columns[None, :]
    if EVEN:
        tl.store(at, result)
    else:
        tl.store(at, result, mask=rows[:, None] < N)


@triton.jit
def behind_silu(grad_out, result, SILU: tl.constexpr):
    """The gradient of u, from that of u sigmoid(u)."""
    if SILU:
        s = tl.sigmoid(result)
        grad_out = grad_out * s * (1 + result * (1 - s))
    return grad_out


@triton.jit
def sums_kernel(
    x, time, weight, bias, mean, rstd, grad_out, sums, N, C, chunk_rows,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TIME: tl.constexpr, SILU: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """sums (3, B, chunks, C): over a chunk's positions, of g, g n and n."""
    chunk, batch = tl.program_id(0), tl.program_id(2).to(tl.int64)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    shift, r, w, b = load_channels(time, weight, bias, mean, rstd, columns, batch, C, WIDTH, TIME)
    x += batch * N * C
    grad_out += batch * N * C
    begin = chunk * chunk_rows
    end = tl.minimum(begin + chunk_rows, N)
    g_sum = tl.zeros((COLUMNS,), tl.float32)
    gn_sum = tl.zeros((COLUMNS,), tl.float32)
    n_sum = tl.zeros((COLUMNS,), tl.float32)
    for start in range(begin, end, ROWS):
        rows = start + tl.arange(0, ROWS)
        normalised = (load_tile(x, rows, columns, end, C, EVEN) + shift[None, :]) * r[None, :]
        if not EVEN:
            normalised = tl.where(rows[:, None] < end, normalised, 0.0)
        g = load_tile(grad_out, rows, columns, end, C, EVEN)
        g = behind_silu(g, normalised * w[None, :] + b[None, :], SILU)
        g_sum += tl.sum(g, 0)
        gn_sum += tl.sum(g * normalised, 0)
        n_sum += tl.sum(normalised, 0)
    chunks, one = tl.num_programs(0), tl.num_programs(2).to(tl.int64) * tl.num_programs(0) * C
    at = (batch * chunks + chunk) * C + columns
    tl.store(sums + at, g_sum)
    tl.store(sums + one + at, gn_sum)
    tl.store(sums + 2 * one + at, n_sum)


@triton.jit
def grad_kernel(
    x, time, weight, bias, mean, rstd, grad_out, s1, s2, grad_x, N, C,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TIME: tl.constexpr, SILU: tl.constexpr,
    EVEN: tl.constexpr,
):  # fmt: skip
    """grad_x (B, N, C) = rstd (g weight - s1 - n s2); s1, s2 (B, G)."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    batch = tl.program_id(2).to(tl.int64)
    shift, r, w, b = load_channels(time, weight, bias, mean, rstd, columns, batch, C, WIDTH, TIME)
    normalised = (load_tile(x + batch * N * C, rows, columns, N, C, EVEN) + shift[None, :]) * r[None, :]
    g = load_tile(grad_out + batch * N * C, rows, columns, N, C, EVEN)
    g = behind_silu(g, normalised * w[None, :] + b[None, :], SILU)
    group = batch * (C // WIDTH) + columns // WIDTH
    first, second = tl.load(s1 + group), tl.load(s2 + group)
    result = (g * w[None, :] - first[None, :] - normalised * second[None, :]) * r[None, :]
    at = grad_x + batch * N * C + rows[:, None] * C + columns[None, :]
    if EVEN:
        tl.store(at, result)
    else:
        tl.store(at, result, mask=rows[:, None] < N)


# ---- launchers -------------------------------------------------------------------------------------

WARPS = 4
MOST_CHUNKS = 128  # the partial statistics of a group have to fit one program
NARROWEST = 8  # channels: one load of 16 bytes


class Tiling(NamedTuple):
    """How an image of N positions and C channels is cut."""

    rows: int  # of a tile
    columns: int  # of a tile, a divisor of C
    tiles: int  # down the positions
    chunks: int  # down the positions, for what is summed over them
    chunk_rows: int  # a multiple of `rows`
    even: bool  # no tile sticks out

    @classmethod
    def of(cls, positions: int, channels: int) -> "Tiling":
        """Tiles of 4096 numbers: 32 a thread at 4 warps, four loads of 16 bytes."""
        columns = min(64, channels & -channels)
        rows = min(4096 // columns, triton.next_power_of_2(positions))
        tiles = triton.cdiv(positions, rows)
        chunk_rows = rows * triton.cdiv(tiles, MOST_CHUNKS)
        even = positions % chunk_rows == 0
        return cls(rows, columns, tiles, triton.cdiv(positions, chunk_rows), chunk_rows, even)


def _constants(tiling: Tiling, channels: int, groups: int, time: Tensor | None, silu: bool) -> dict[str, int | bool]:
    return {
        **{"WIDTH": channels // groups, "ROWS": tiling.rows, "COLUMNS": tiling.columns},
        **{"TIME": time is not None, "SILU": silu, "EVEN": tiling.even},
    }


def _require(x: Tensor, weight: Tensor, bias: Tensor, groups: int, time: Tensor | None) -> None:
    """Raises ValueError unless the kernels can take these."""
    require_alike(x=x, weight=weight, bias=bias, time=time)
    if x.ndim != 4 or x[0].numel() >= MOST_ELEMENTS:
        raise ValueError(f"x: shape {tuple(x.shape)}, expected (B, C, H, W), an image of fewer than 2^31 numbers")
    batch, channels = x.shape[:2]
    if batch > MOST_BLOCKS:
        raise ValueError(f"x: a batch of {batch}, expected at most {MOST_BLOCKS}; split the batch")
    if channels % NARROWEST or groups < 1 or channels % groups:
        raise ValueError(f"x: {channels} channels in {groups} groups, expected a multiple of {NARROWEST} and of groups")
    require_shape("weight", weight, (channels,), "(C,)")
    require_shape("bias", bias, (channels,), "(C,)")
    if time is not None:
        require_shape("time", time, (batch, channels), "(B, C)")


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def launch_forward(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, time: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, C, H, W) channels_last; mean and rstd of every group, (B, G) fp32."""
    _require(x, weight, bias, groups, time)
    x, weight, bias = _channels_last(x), weight.contiguous(), bias.contiguous()
    time = None if time is None else time.contiguous()
    batch, channels, height, width = x.shape
    n = height * width
    tiling = Tiling.of(n, channels)
    means, deviations = (x.new_empty((batch, tiling.chunks, channels), dtype=torch.float32) for _ in range(2))
    mean, rstd = (x.new_empty((batch, groups), dtype=torch.float32) for _ in range(2))
    out = torch.empty_like(x, memory_format=torch.channels_last)
    constants = _constants(tiling, channels, groups, time, silu)
    blocks = channels // tiling.columns
    statistics_kernel[(tiling.chunks, blocks, batch)](
        *(x, means, deviations, n, channels, tiling.chunk_rows),
        **{name: constants[name] for name in ("ROWS", "COLUMNS", "EVEN")},
        num_warps=WARPS,
    )
    combine_kernel[(groups, batch)](
        *(means, deviations, time, mean, rstd, n, channels, tiling.chunk_rows, tiling.chunks, eps),
        WIDTH=constants["WIDTH"],
        PADDED_WIDTH=triton.next_power_of_2(channels // groups),
        PADDED_CHUNKS=triton.next_power_of_2(tiling.chunks),
        TIME=constants["TIME"],
        num_warps=WARPS,
    )
    apply_kernel[(tiling.tiles, blocks, batch)](
        *(x, time, weight, bias, mean, rstd, out, n, channels), **constants, num_warps=WARPS
    )
    return out, mean, rstd


def launch_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    time: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x (channels_last), weight, bias and time (empty where there is none)."""
    require_alike(x=x, grad_out=grad_out)
    require_shape("grad_out", grad_out, tuple(x.shape), "x's shape")
    x, grad_out, weight, bias = _channels_last(x), _channels_last(grad_out), weight.contiguous(), bias.contiguous()
    time = None if time is None else time.contiguous()
    batch, channels, height, width = x.shape
    n, groups = height * width, mean.shape[1]
    tiling = Tiling.of(n, channels)
    constants = _constants(tiling, channels, groups, time, silu)
    grid = (channels // tiling.columns, batch)
    sums = x.new_empty((3, batch, tiling.chunks, channels), dtype=torch.float32)
    sums_kernel[(tiling.chunks, *grid)](
        *(x, time, weight, bias, mean, rstd, grad_out, sums, n, channels, tiling.chunk_rows),
        **constants,
        num_warps=WARPS,
    )
    g, gn, normalised = sums.sum(2)  # (B, C) each
    grad_weight, grad_bias = gn.sum(0).to(weight.dtype), g.sum(0).to(bias.dtype)

    in_groups = (batch, groups, channels // groups)
    w = weight.float()
    s1, s2 = ((summed * w).view(in_groups).mean(2) / n for summed in (g, gn))
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    grad_kernel[(tiling.tiles, *grid)](
        *(x, time, weight, bias, mean, rstd, grad_out, s1, s2, grad_x, n, channels), **constants, num_warps=WARPS
    )
    if time is None:
        return grad_x, grad_weight, grad_bias, x.new_empty(0)
    # The time is added at every position: its gradient is the sum of grad_x, term by term from the sums above.
    grad_time = (g * w).view(in_groups) - n * s1[:, :, None] - normalised.view(in_groups) * s2[:, :, None]
    return grad_x, grad_weight, grad_bias, (grad_time * rstd[:, :, None]).view(batch, channels).to(time.dtype)


# ---- registration ----------------------------------------------------------------------------------


@torch.library.custom_op("ldm::group_norm_silu", mutates_args=())
def group_norm_silu_op(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, time: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(x):
        return launch_forward(x, weight, bias, groups, eps, time, silu)


@group_norm_silu_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, time: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    mean, rstd = (x.new_empty((x.shape[0], groups), dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x, memory_format=torch.channels_last), mean, rstd


@torch.library.custom_op("ldm::group_norm_silu_backward", mutates_args=())
def group_norm_silu_backward_op(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    time: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(x):
        return launch_backward(grad_out, x, weight, bias, time, mean, rstd, silu)


@group_norm_silu_backward_op.register_fake
def _(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    time: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    grad_x = torch.empty_like(x, memory_format=torch.channels_last)
    grad_time = x.new_empty(0) if time is None else time.new_empty(time.shape)
    return grad_x, weight.new_empty(weight.shape), bias.new_empty(bias.shape), grad_time


def _save(ctx: Any, inputs: tuple, output: Any) -> None:
    x, weight, bias, _, _, time, ctx.silu = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.save_for_backward(x, weight, bias, time, mean, rstd)


def _differentiate(
    ctx: Any, grad_out: Tensor, _mean: Tensor, _rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor, None, None, Tensor | None, None]:
    time = ctx.saved_tensors[3]
    grad_x, grad_weight, grad_bias, grad_time = group_norm_silu_backward_op(grad_out, *ctx.saved_tensors, ctx.silu)
    return grad_x, grad_weight, grad_bias, None, None, None if time is None else grad_time, None


group_norm_silu_op.register_autograd(_differentiate, setup_context=_save)


def group_norm_silu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    eps: float,
    time: Tensor | None = None,
    silu: bool = True,
) -> Tensor:
    """GroupNorm of an image, the time added before and SiLU applied after where asked; differentiable once.

    Args:    x: (B, C, H, W) float16, bfloat16 or float32, C a multiple of 8 and of groups; copied first unless
             channels_last.  weight, bias: (C,).  time: (B, C), added at every position.  All computed in float32.
    Returns: (B, C, H, W) in x's dtype, channels_last.
    Raises:  ValueError: other shapes or dtypes, different devices, or nothing to normalise.
    """
    return group_norm_silu_op(x, weight, bias, groups, eps, time, silu)[0]


# ---- for the compiler ------------------------------------------------------------------------------

FP32 = {"means", "deviations", "mean", "rstd", "sums", "s1", "s2"}
INTEGERS = {"N", "C", "chunk_rows", "chunks"}


def _spec(fn: triton.JITFunction, name: str, constants: dict[str, int | bool]) -> Spec:
    taken = {name: value for name, value in constants.items() if name in fn.arg_names}
    numbers = dict.fromkeys(taken, "constexpr") | dict.fromkeys(INTEGERS, "i32") | {"eps": "fp32"}
    signature = {arg: numbers.get(arg, "*fp32" if arg in FP32 else "*fp16") for arg in fn.arg_names}
    return Spec(
        name=f"group_norm_silu.{name} {constants['WIDTH']} a group {constants['ROWS']}x{constants['COLUMNS']} w{WARPS}",
        fn=fn,
        signature=signature,
        constexprs=taken,
        divisible=tuple(arg for arg in signature if arg not in {*taken, "eps", "chunks"}),
        num_warps=WARPS,
        num_stages=1,
        capabilities=(80, 86, 89, 90),
    )


def compile_specs() -> Iterator[Spec]:
    """What to compile: the second norm of SD1.5's first resnet, which has the time and the most positions."""
    channels, groups, n = 320, 32, 4096
    tiling = Tiling.of(n, channels)
    constants = {
        **{"WIDTH": channels // groups, "ROWS": tiling.rows, "COLUMNS": tiling.columns},
        **{"TIME": True, "SILU": True, "EVEN": True, "PADDED_WIDTH": 16, "PADDED_CHUNKS": tiling.chunks},
    }
    for fn, name in (
        (statistics_kernel, "statistics"),
        (combine_kernel, "combine"),
        (apply_kernel, "apply"),
        (sums_kernel, "sums"),
        (grad_kernel, "grad"),
    ):
        yield _spec(fn, name, constants)
