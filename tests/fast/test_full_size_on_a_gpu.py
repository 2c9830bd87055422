"""SD1.5's U-Net at full size as a GPU computes it, against the vectors of other implementations.

On a CPU the same check is made of the small one: so that it is known to work.
"""

import pytest
import torch
from networks import small
from reference import FORWARD, golden, noise

from ldm import fast
from ldm.bench.networks import AGREEMENT
from ldm.unet import UNet

T = 981


def on_device(network: UNet, device: str, dtype: torch.dtype) -> UNet:
    """A network like this one there; no second one is made here."""
    with torch.device("meta"):
        twin = UNet(network.config).eval()
    twin.load_state_dict({name: x.to(device, dtype) for name, x in network.state_dict().items()}, assign=True)
    return twin.requires_grad_(False)


@pytest.fixture
def strict():
    """float32 without TF32, as the commands have it."""
    switches = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [switch.allow_tf32 for switch in switches]
    for switch in switches:
        switch.allow_tf32 = False
    yield
    for switch, value in zip(switches, before, strict=True):
        switch.allow_tf32 = value


@pytest.mark.usefixtures("strict", "no_grad")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")],
        ),
    ],
)
def test_every_way_to_call_it_is_the_reference(device, dtype, request, x, context):
    network, vectors = small("unet"), "small_unet"
    if device == "cuda":
        network, vectors = request.getfixturevalue("full_unet"), "unet_full_64"
        x = noise("unet.latent64", (1, 4, 64, 64)).repeat(2, 1, 1, 1)
        context = torch.stack([noise(f"unet.context{k}", (77, 768)) for k in range(2)])
    limit = FORWARD if dtype == torch.float32 else AGREEMENT[dtype]
    errors = {}
    for backend, graph in (("torch", False), ("auto", False), ("auto", True)):
        twin = on_device(network, device, dtype)
        installed = fast.install(twin, kernels=backend, cuda_graph=graph)
        eps = twin(x.to(device, dtype), T, context.to(device, dtype))
        errors[backend, graph] = golden(vectors).error(f"eps.t{T}", eps.float().cpu())
        assert installed.cuda_graph_used == (graph and device == "cuda")
        assert not installed.refused
    assert max(errors.values()) < limit, errors
