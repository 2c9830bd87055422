"""The perceptual loss: by hand on an EfficientNet's first blocks, and what it prefers."""

from pathlib import Path

import pytest
import torch

from ldm.study import classifier
from ldm.study.classifier import Classifier
from ldm.train import perceptual
from ldm.train.perceptual import Perceptual

SHIPPED = Path(__file__).parents[2] / "weights"


def judge(model="test_efficientnet"):
    torch.manual_seed(0)
    network = classifier.build(model, 2).eval()
    return Classifier(model, ["hair", "ink"], 64, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), network, {})


@pytest.fixture
def images():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_zhang_et_al_2018_arxiv_1801_03924_eq_1(images):
    """In bfloat16 the features have 8 bits, and so each squared distance of unit vectors 1 % of error at most."""
    of = judge()
    other = images.roll(3, 3)

    def blocks(x):
        x = (x * 0.5 + 0.5 - torch.tensor(of.mean)[:, None, None]) / torch.tensor(of.std)[:, None, None]
        x, maps = of.network.bn1(of.network.conv_stem(x)), []
        for block in of.network.blocks:
            x = block(x)
            maps.append(x)
        sides = [m.shape[-1] for m in maps]  # a level's map is the last of its side
        return [maps[max(i for i, side in enumerate(sides) if side == wanted)] for wanted in (32, 16, 8)]

    with torch.no_grad():
        by_hand = sum(
            (a / a.norm(dim=1, keepdim=True) - b / b.norm(dim=1, keepdim=True)).square().sum(1).mean()
            for a, b in zip(blocks(images), blocks(other), strict=True)
        )
    torch.testing.assert_close(Perceptual(of)(images, other), by_hand, rtol=1e-2, atol=0)


def test_only_what_was_decoded_learns(images):
    loss = Perceptual(judge())
    before = {name: tensor.clone() for name, tensor in loss.state_dict().items()}
    decoded = images.roll(1, 2).requires_grad_()
    loss(images.requires_grad_(), decoded).backward()
    assert images.grad is None
    assert decoded.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in loss.parameters())
    assert all(torch.equal(before[name], tensor) for name, tensor in loss.state_dict().items())


def test_a_lost_line_costs_more_than_as_large_an_error_of_brightness():
    """The squared error of pixels is the same. To layers that learned from photographs."""
    loss = perceptual.load(SHIPPED / "real_skin_classifier.safetensors")
    skin = torch.tensor([0.5, 0.2, 0.1])[:, None, None].expand(1, 3, 128, 128)
    hair = skin.clone()
    hair[..., 40:42, :] = -0.5
    shift = (hair - skin).square().mean().sqrt()
    torch.testing.assert_close((hair - (hair + shift)).square().mean(), (hair - skin).square().mean())
    assert loss(hair, hair) == 0
    assert loss(hair, skin) > 3 * loss(hair, hair + shift)


def test_a_network_without_feature_maps_is_refused():
    of = judge()
    bare = Classifier("own", of.attributes, 64, of.mean, of.std, torch.nn.Linear(2, 2), {})
    with pytest.raises(ValueError, match="timm gives no feature maps of own"):
        Perceptual(bare)
