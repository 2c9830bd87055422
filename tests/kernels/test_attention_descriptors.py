"""Hopper's forward with tensor descriptors: numbers against float64, the compiler's code, and when it is used."""

import re
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import pytest
import torch
from accuracy import FACTOR, ROUNDING, randn, relative_error
from ldm_kernels import attention, attention_descriptors, compiling
from ldm_kernels.attention_descriptors import CANDIDATES
from ldm_kernels.configurations import SM90, Configuration
from torch import Tensor
from torch.nn import functional as F

LOW = (torch.float16, torch.bfloat16)
ON_HOPPER = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of sm_90",
)


def small(width: int) -> Configuration:
    """Tiles so small that short sequences have several."""
    return Configuration(width, "forward", 32, 16, 4, 2, (SM90,), "box")


def triple(batch: int, n: int, m: int, count: int, width: int, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
    """q, k, v (B, N or M, H, d) as the network lays them out: views of one packed projection where they are as long."""
    if n == m:
        return list(randn(batch, n, 3, count, width, dtype=dtype).to(device).unbind(2))
    return [randn(batch, length, count, width, seed=s, dtype=dtype).to(device) for s, length in enumerate((n, m, m))]


def by_torch(qkv: list[Tensor], causal: bool) -> Tensor:
    moved = (x.transpose(1, 2) for x in qkv)
    return F.scaled_dot_product_attention(*moved, is_causal=causal).transpose(1, 2)


def by_descriptors(qkv: list[Tensor], causal: bool, c: Configuration) -> tuple[Tensor, Tensor]:
    q, k, v = qkv
    attention.require_supported(q, k, v, causal)
    out, lse = q.new_empty(q.shape), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)
    attention.launch(attention.kernel_of(c), c, causal, (q, k, v, out, lse), (q, k, v))
    return out, lse


def assert_as_exact_as_torch(qkv: list[Tensor], causal: bool, c: Configuration) -> None:
    """The result's error against float64 is at most twice torch's in the same dtype; lse is exact to float32's sums."""
    exact = by_torch([x.double() for x in qkv], causal)
    out, lse = by_descriptors(qkv, causal, c)
    bound = FACTOR[out.dtype] * relative_error(by_torch(qkv, causal), exact) + 2 * ROUNDING[out.dtype]
    assert relative_error(out, exact) <= bound
    s = torch.einsum("bnhd,bmhd->bhnm", qkv[0].double(), qkv[1].double()) / qkv[0].shape[-1] ** 0.5
    if causal:
        s = s.masked_fill(torch.ones_like(s).triu(1).bool(), float("-inf"))
    torch.testing.assert_close(lse.double(), s.logsumexp(-1), rtol=1e-5, atol=1e-5)


# ---- numbers ---------------------------------------------------------------------------------------

SHAPES = [
    (2, 64, 64, 2, 40, False),  # whole tiles: no masks
    (1, 63, 63, 2, 80, False),  # one short of them
    (1, 2, 2, 2, 40, False),  # less than a tile
    (1, 33, 101, 2, 40, False),  # more keys than queries
    (1, 45, 45, 1, 160, False),  # the widest head, in a box of 256
    (1, 77, 77, 2, 64, True),  # the text encoder
]


@pytest.mark.parametrize(("batch", "n", "m", "count", "width", "causal"), SHAPES)
def test_float32(batch, n, m, count, width, causal):
    assert_as_exact_as_torch(triple(batch, n, m, count, width, torch.float32), causal, small(width))


@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize(("batch", "n", "m", "count", "width", "causal"), SHAPES[:3])
def test_half_precision(batch, n, m, count, width, causal, dtype):
    assert_as_exact_as_torch(triple(batch, n, m, count, width, dtype), causal, small(width))


@pytest.mark.gpu
@ON_HOPPER
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("lengths", [(4096, 4096), (1024, 1024), (129, 129), (63, 200), (2, 2)], ids=str)
@pytest.mark.parametrize("c", CANDIDATES, ids=str)
def test_candidates_on_a_gpu(c, lengths, dtype):
    qkv = triple(2, *lengths, 8, c.width, dtype, "cuda")
    assert_as_exact_as_torch(qkv, False, c)
    first, second = (by_descriptors(qkv, False, c) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# ---- what the compiler makes of it -----------------------------------------------------------------


Case = tuple[Configuration, dict[str, bool]]
CASES: list[Case] = [*((c, {}) for c in CANDIDATES), (CANDIDATES[0], {"causal": True, "even": False})]


def ir(cases: list[Case]) -> list[str]:
    """Triton's own code for sm_90; called in a process that does not interpret kernels."""
    return [compiling.build(attention.compile_spec(c, **options), SM90)[0].asm["ttgir"] for c, options in cases]


@pytest.fixture(scope="module")
def every_code() -> list[str]:
    with ProcessPoolExecutor(1, get_context("spawn"), compiling._compile_for_real) as pool:
        return pool.submit(ir, CASES).result()


@pytest.fixture(params=range(len(CASES)), ids=lambda i: f"{CASES[i][0]} {' '.join(CASES[i][1])}")
def case(request: pytest.FixtureRequest, every_code: list[str]) -> tuple[str, str, str]:
    """Its code, and the shapes of a half of q and of a tile of k."""
    constants = attention.compile_spec(CASES[request.param][0]).constexprs
    return every_code[request.param], f"64x{constants['BOX']}", f"{constants['LOOP']}x{constants['BOX']}"


def test_each_copy_brings_what_its_place_holds(case):
    """Where the host makes q's descriptor, Triton 3.6 halves its place, but not what is brought there."""
    code, half, tile = case
    boxes = re.findall(r"async_tma_copy_global_to_local .*?tensordesc<(?:tensor<)?([\dx]+)xf16", code)
    places = re.findall(r"async_tma_copy_global_to_local .* -> !ttg.memdesc<([\dx]+)xf16", code)
    assert boxes == places == [half, half, tile, tile]  # of q twice, k and v


def test_the_second_half_of_the_queries_is_64_rows_on_once(case):
    """Brought from there by the group that copies; written there by one that multiplies, by its range alone."""
    code, half, tile = case
    first, second = re.findall(r"async_tma_copy_global_to_local %q\w*\[%(\w+), %c0_i32\]", code)
    moved = re.findall(rf"%(\w+) = arith.addi %{first}, %c64_i32\w* {{async_task_id = array<i32: (\d)>", code)
    assert moved == [(second, "0")]
    assert not re.search(rf"tt.splat %(?:{first}|{second}) ", code)
    ranges = set(re.findall(r"make_range {async_task_id = array<i32: (\d)>, end = (\d+) : i32, start = (\d+)", code))
    rows, sizes = {("1", "64", "0"), ("2", "128", "64")}, {*half.split("x"), *tile.split("x")}
    assert rows <= ranges
    assert ranges - rows <= {(group, size, "0") for group in "12" for size in sizes}  # columns, keys


def test_products_are_split_among_two_groups_of_warps(case):
    code, half, tile = case
    assert code.count("ttg.warp_specialize(") == 1
    products = re.findall(r"warp_group_dot .*async_task_id = array<i32: (\d)>.*-> tensor<([\dx]+)xf32", code)
    weights = f"64x{tile.split('x')[0]}"
    assert products == [(group, shape) for group in "12" for shape in (weights, half)]


# ---- when it is used -------------------------------------------------------------------------------


def test_nothing_chooses_it_by_itself():
    assert [str(c) for c in attention.CONFIGURATIONS if c.layout == "box"] == []
    assert all(c.layout == "box" and c.capabilities == (SM90,) for c in CANDIDATES)


@pytest.mark.parametrize(
    ("capability", "dtype", "n", "expected"),
    [
        (90, torch.float16, 20, True),
        (90, torch.float32, 20, False),  # no tensor cores at full precision
        (80, torch.float16, 20, False),
        (100, torch.float16, 20, False),  # Blackwell specialises by another pass
        (90, torch.float16, 1, False),  # one row: its stride may be any
    ],
)
def test_put_first_it_serves_half_precision_on_hopper_alone(monkeypatch, capability, dtype, n, expected):
    ran = []
    monkeypatch.setattr("ldm_kernels.configurations.capability", lambda x: capability)
    monkeypatch.setattr("ldm_kernels.attention_descriptors.capability", lambda x: capability)
    monkeypatch.setattr(attention, "launch", lambda kernel, c, *rest: ran.append(c.layout))
    attention.launch_forward(*triple(1, n, n, 2, 40, dtype), False, [small(40), *attention.CONFIGURATIONS])
    assert ran == ["box" if expected else "split8"]


def test_put_first_its_results_are_differentiated_as_any_others(monkeypatch):
    for place in ("configurations", "attention_descriptors"):
        monkeypatch.setattr(f"ldm_kernels.{place}.capability", lambda x: SM90)
    leaves = [x.detach().requires_grad_() for x in triple(1, 34, 34, 2, 40, torch.float16)]
    gradients = {}
    for name, first in (("box", [small(40)]), ("split8", [])):
        monkeypatch.setattr(attention, "launch_forward", partial(forward, first))
        gradients[name] = torch.autograd.grad(attention.attention(*leaves).float().square().sum(), leaves)
    for ours, others in zip(gradients["box"], gradients["split8"], strict=True):
        assert relative_error(ours, others.double()) < 2e-3  # a rounding to float16 of each weight


forward_of = attention.launch_forward


def forward(first: list[Configuration], q: Tensor, k: Tensor, v: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    return forward_of(q, k, v, causal, [*first, *attention.CONFIGURATIONS])


def test_scratch_is_given_for_one_launch_alone():
    from triton.runtime import _allocation

    before, within = _allocation._allocator.get(), []
    attention_descriptors.with_scratch(lambda: within.append(_allocation._allocator.get()))
    assert within[0] is not before
    assert _allocation._allocator.get() is before
