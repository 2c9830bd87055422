"""How many rows and images go through a network at once; a GPU's free memory is made up."""

from dataclasses import replace

import pytest
import torch

import ldm
from ldm.config import SD15
from ldm.pipeline import PHANTOM_WEIGHTS
from ldm.traversal import batches
from ldm.traversal.batches import images_a_call, rows_a_call
from ldm.traversal.sampling import bounded

GIB = 2**30


@pytest.fixture(scope="module")
def sd():
    return ldm.load(PHANTOM_WEIGHTS)


class SD15Sized:
    """What is asked of a model, in float16 on a GPU."""

    config, dtype, device = SD15, torch.float16, torch.device("cuda")

    class vae:
        class quant_conv:
            weight = torch.zeros(1)


@pytest.fixture
def free(monkeypatch):
    return lambda gib: monkeypatch.setattr(batches, "free_bytes", lambda device: int(gib * GIB))


@pytest.mark.parametrize(("side", "rows", "images"), [(8, 512, 64), (16, 128, 16), (64, 8, 1), (96, 3, 1), (128, 2, 1)])
def test_on_a_cpu_it_is_what_it_was(sd, side, rows, images):
    shape = (4, side, side)
    assert (rows_a_call(sd, shape), images_a_call(sd, shape)) == (rows, images)
    assert bounded(sd, shape).max_batch == rows
    assert bounded(replace(sd, max_batch=3), shape).max_batch == 3


@pytest.mark.parametrize(
    ("gib", "rows", "images"), [(76, 64, 16), (20, 64, 8), (10, 64, 4), (6, 32, 2), (4, 16, 1), (1, 4, 1), (0.01, 1, 1)]
)
def test_on_a_gpu_it_is_what_half_of_the_free_memory_holds(free, gib, rows, images):
    free(gib)
    assert (rows_a_call(SD15Sized, (4, 64, 64)), images_a_call(SD15Sized, (4, 64, 64))) == (rows, images)


def test_a_small_model_fills_a_gpu_at_least_as_a_cpu(sd, free):
    free(76)
    on_gpu = replace(sd, device=torch.device("cuda"))
    assert rows_a_call(on_gpu, sd.latent_shape) == rows_a_call(sd, sd.latent_shape)


def test_a_little_more_or_less_memory_is_the_same_batch(free):
    found = set()
    for gib in (5.1, 6, 8, 9.9):
        free(gib)
        found.add(rows_a_call(SD15Sized, (4, 64, 64)))
    assert len(found) == 1


def test_free_memory_counts_what_torch_holds_and_does_not_use(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (5 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 7 * GIB)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 4 * GIB)
    assert batches.free_bytes(torch.device("cuda")) == 8 * GIB
