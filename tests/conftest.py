"""What all tests share.

The full-size networks are built at most once a run: 4.3 GB in float32, half a minute of generating weights.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from markers import only_on_a_gpu
from networks import filled, small
from reference import noise
from torch import Tensor

from ldm.clip import CLIPTextEncoder
from ldm.config import SD15
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

# Properties meet the same examples in every run, and no clock decides over them.
settings.register_profile("steady", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("steady")

FULL_SIZE = {"full_clip", "full_vae", "full_unet"}


def pytest_configure(config: pytest.Config) -> None:
    """Kernels run in Triton's interpreter, on CPU tensors; where `-m` takes tests of a GPU alone, as they are, on it.

    Triton reads this when a kernel is decorated, also those of its own library: so before its first import.
    """
    if not only_on_a_gpu(config.getoption("markexpr")):
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if "PYTEST_XDIST_WORKER" in os.environ:  # -n 2: one of several processes, each on a core, and those that it starts
        os.environ["OMP_NUM_THREADS"] = "1"
        torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of a GPU are skipped where kernels are interpreted, which have their CPU twins.

    With -n, a process takes whole files, so that what a file shares is built once. All networks of full size are in
    one process, as two of them might not fit into memory; the step of training, which takes most, comes before them."""
    items.sort(key=lambda item: item.path.stem != "test_train_full_size")
    interpreted = pytest.mark.skip(reason="kernels are interpreted in this run; pytest -m gpu takes these tests alone")
    for item in items:
        if os.environ.get("TRITON_INTERPRET") == "1" and item.get_closest_marker("gpu"):
            item.add_marker(interpreted)
        full_size = "full_size" in item.nodeid or FULL_SIZE & set(getattr(item, "fixturenames", ()))
        item.add_marker(pytest.mark.xdist_group("full size" if full_size else item.path.stem))


@pytest.fixture(scope="session")
def full_clip() -> CLIPTextEncoder:
    """SD1.5's text encoder with the reference weights; 0.5 GB."""
    return filled("clip", SD15.clip)


@pytest.fixture(scope="session")
def full_vae() -> AutoencoderKL:
    """SD1.5's autoencoder with the reference weights; 0.3 GB."""
    return filled("vae", SD15.vae)


@pytest.fixture(scope="session")
def full_unet() -> UNet:
    """SD1.5's U-Net with the reference weights; 3.4 GB."""
    return filled("unet", SD15.unet)


@pytest.fixture(scope="module")
def unet() -> UNet:
    """The small U-Net that the reference vectors are of, which all tests share, and what it is called with."""
    return small("unet")


@pytest.fixture(scope="module")
def x() -> Tensor:
    return noise("small.latent", (2, 4, 16, 16))


@pytest.fixture(scope="module")
def context() -> Tensor:
    return noise("small.context", (2, 77, 64))


@pytest.fixture(scope="module")
def inputs(x, context) -> tuple[Tensor, int, Tensor]:
    """A call of it."""
    return x, 500, context


@pytest.fixture
def no_grad() -> Iterator[None]:
    """For tests that only run networks forwards."""
    with torch.no_grad():
        yield
