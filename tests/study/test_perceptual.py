"""LPIPS with and without its weights, and SSIM against its formula. No weights are downloaded: random ones do here."""

import hashlib
import math
from io import BytesIO

import numpy as np
import pytest
import torch
from torchvision import models
from torchvision.models import Weights, WeightsEnum

from ldm.study.metrics import perceptual
from ldm.study.metrics.perceptual import Lpips, Unavailable


def images(count, size=64, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(scope="module")
def alexnet():
    """torchvision's layers with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.alexnet(weights=None).eval()


@pytest.fixture(scope="module")
def distance(alexnet):
    return Lpips("alex", perceptual.build_network("alex", alexnet.state_dict()))


# ---- LPIPS -----------------------------------------------------------------------------------------


def test_lpips_of_an_image_with_itself_is_0(distance):
    x = images(3)
    assert distance(x, x).tolist() == [0, 0, 0]


def test_lpips_is_its_formula(alexnet, distance):
    """Unit-length features after every ReLU: squared differences, weighted by the shipped heads, mean of positions."""
    x, y = images(2), images(2, seed=1)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    a, b = ((z - shift.view(3, 1, 1)) / scale.view(3, 1, 1) for z in (x, y))
    heads = [lin.model[1].weight for lin in distance.network.lins]
    assert [tuple(head.shape) for head in heads] == [(1, c, 1, 1) for c in (64, 192, 384, 256, 256)]
    assert all((head >= 0).all() for head in heads)  # those of the package, not random ones
    expected = torch.zeros(2)
    head = iter(heads)
    with torch.no_grad():
        for layer in alexnet.features:
            a, b = layer(a), layer(b)
            if isinstance(layer, torch.nn.ReLU):
                unit_a, unit_b = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (a, b))
                expected += ((unit_a - unit_b).square() * next(head)).sum(1).mean((1, 2))
    # float32 through five layers in two orders of the same operations
    torch.testing.assert_close(distance(x, y), expected, rtol=1e-4, atol=1e-6)


def test_lpips_takes_one_reference_for_all(distance):
    x, y = images(3), images(1, seed=1)[0]
    torch.testing.assert_close(distance(x, y), distance(x, y.expand(3, 3, 64, 64)), rtol=0, atol=0)
    assert distance(x, y).shape == (3,)


def test_lpips_does_not_depend_on_the_batch(distance):
    x, y = images(4), images(1, seed=1)[0]
    alone = torch.cat([distance(image[None], y) for image in x])
    torch.testing.assert_close(
        distance(x, y), alone, rtol=1e-5, atol=1e-7
    )  # float32, other blocking of the convolutions


def test_squeeze_is_built_as_well():
    backbone = models.squeezenet1_1(weights=None).state_dict()
    network = perceptual.build_network("squeeze", backbone)
    assert torch.equal(network.net.slice3.get_parameter("6.squeeze.weight"), backbone["features.6.squeeze.weight"])
    assert Lpips("squeeze", network)(images(2), images(1)[0])[0] == 0


def test_building_draws_no_random_number(alexnet):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    perceptual.build_network("alex", alexnet.state_dict())
    assert torch.equal(torch.rand(1), expected)


# ---- weights that are there, or not ----------------------------------------------------------------


@pytest.fixture
def served(tmp_path, monkeypatch):
    """An empty torch cache, and a file elsewhere that the small network's weights could be fetched from."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    buffer = BytesIO()
    torch.save(models.squeezenet1_1(weights=None).state_dict(), buffer)
    digest = hashlib.sha256(buffer.getvalue()).hexdigest()
    source = tmp_path / f"squeezenet1_1-{digest[:8]}.pth"
    source.write_bytes(buffer.getvalue())

    class Served(WeightsEnum):
        FILE = Weights(url=source.as_uri(), transforms=torch.nn.Identity, meta={})

    monkeypatch.setitem(perceptual.BACKBONES, "squeeze", Served.FILE)
    return source


def test_without_weights_it_says_so_and_how_to_get_them(served, caplog):
    caplog.set_level("INFO")
    found = perceptual.load_lpips("squeeze")
    assert str(found) == (
        "LPIPS was not measured: its ImageNet weights were not on disk; `ldm evaluate --fetch` gets them"
    )
    assert not perceptual.backbone_path("squeeze").exists()  # it did not fetch on its own
    assert served.as_uri() in caplog.text
    assert str(perceptual.backbone_path("squeeze")) in caplog.text


def test_fetched_once_it_stays(served):
    fetched = perceptual.load_lpips("squeeze", fetch=True)
    served.unlink()
    again = perceptual.load_lpips("squeeze")
    assert isinstance(fetched, Lpips)
    assert isinstance(again, Lpips)
    x, y = images(2), images(1, seed=1)[0]
    assert torch.equal(fetched(x, y), again(x, y))


def test_what_cannot_be_fetched_is_said(served, caplog):
    caplog.set_level("INFO")
    served.unlink()
    found = perceptual.load_lpips("squeeze", fetch=True)
    assert isinstance(found, Unavailable)
    assert "could not be fetched" in found.reason
    assert "URLError" in caplog.text
    assert str(served.parent) not in str(found)  # no path of this machine in a report


@pytest.mark.parametrize("where", ["on disk", "fetched"])
def test_another_file_under_the_name_is_not_read(served, where, caplog):
    caplog.set_level("INFO")
    path = perceptual.backbone_path("squeeze") if where == "on disk" else served
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(served.read_bytes()[:-1])
    found = perceptual.load_lpips("squeeze", fetch=where == "fetched")
    assert isinstance(found, Unavailable)
    assert "SHA-256" in caplog.text or "hash" in caplog.text
    assert str(path.parent) not in str(found)
    assert where == "on disk" or list(perceptual.backbone_path("squeeze").parent.iterdir()) == []


def test_an_unknown_net_is_refused():
    with pytest.raises(ValueError, match=r"net: expected one of .* got 'resnet'"):
        perceptual.load_lpips("resnet")


# ---- SSIM ------------------------------------------------------------------------------------------


def test_ssim_of_an_image_with_itself_is_1():
    x = images(2, size=32)
    assert perceptual.ssim(x, x).tolist() == [1, 1]


def test_ssim_of_flat_images_is_the_luminance_term():
    # Without variance: (2 m m' + C1) / (m^2 + m'^2 + C1), C1 = (0.01 * 2)^2.
    flat = torch.full((1, 3, 16, 16), 0.5)
    expected = (2 * 0.5 * 0.25 + 4e-4) / (0.5**2 + 0.25**2 + 4e-4)
    assert perceptual.ssim(flat, flat[0] / 2).item() == pytest.approx(expected, abs=1e-12)


def test_ssim_is_its_formula_in_the_only_window_of_a_small_image():
    x, y = images(1, size=11)[0].double(), images(1, size=11, seed=1)[0].double()
    offsets = torch.arange(-5, 6, dtype=torch.float64)
    line = torch.exp(-(offsets**2) / (2 * 1.5**2))
    window = torch.outer(line, line) / line.sum() ** 2
    values = []
    for a, b in zip(x, y, strict=True):
        m, k = (window * a).sum(), (window * b).sum()
        va, vb, vab = ((window * p * q).sum() - r * s for p, q, r, s in ((a, a, m, m), (b, b, k, k), (a, b, m, k)))
        c1, c2 = (0.01 * 2) ** 2, (0.03 * 2) ** 2
        values.append((2 * m * k + c1) * (2 * vab + c2) / ((m**2 + k**2 + c1) * (va + vb + c2)))
    # scikit-image means over the windows that lie inside the image: here one, its centre
    assert perceptual.ssim(x[None], y).item() == pytest.approx(float(np.mean(values)), abs=1e-10)


def test_ssim_falls_as_noise_grows():
    x, noise = images(1, size=32) / 2, images(1, size=32, seed=1)
    values = perceptual.ssim(torch.cat([x + strength * noise for strength in (0, 0.1, 0.2, 0.4)]), x[0]).tolist()
    assert values == sorted(values, reverse=True)


# ---- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (images(1)[0], images(1)[0], r"images: expected \(B, 3, H, W\)"),
        (images(1, size=8), images(1, size=8), "sides of at least 11 px"),
        (images(2), images(1)[0, :, :32], "reference: expected one image or 2 as large"),
        ((images(1) + 1) * 127.5, images(1)[0], r"images: expected values in \[-1, 1\], got up to 25"),
        (images(1) * math.nan, images(1)[0], "images: expected values"),
        (images(1), images(1)[0] * 2, "reference: expected values"),
    ],
)
def test_other_images_are_refused(x, y, message):
    with pytest.raises(ValueError, match=message):
        perceptual.ssim(x, y)


@pytest.mark.parametrize("net", ["alex", "vgg", "squeeze"])
def test_lpips_takes_the_smallest_images_that_its_network_does(net):
    backbone = {"alex": models.alexnet, "vgg": models.vgg16, "squeeze": models.squeezenet1_1}[net]
    distance = Lpips(net, perceptual.build_network(net, backbone(weights=None).state_dict()))
    smallest = perceptual.SMALLEST_LPIPS_PX[net]
    assert distance(images(1, size=smallest), images(1, smallest, seed=1)).isfinite().all()
    with pytest.raises(RuntimeError):  # and a pixel less than that is none to the network
        distance.network(images(1, size=smallest - 1), images(1, size=smallest - 1))
    with pytest.raises(ValueError, match=f"sides of at least {smallest} px"):
        distance(images(1, size=smallest - 1), images(1, size=smallest - 1))
