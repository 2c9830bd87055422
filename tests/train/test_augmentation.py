"""Augmentation by hand."""

import math
from dataclasses import replace

import pytest
import torch
from classifier_training import SIZE

from ldm.train import augmentation
from ldm.train.augmentation import CHEXPERT, ISIC, Augmentation, augment


def images(count: int = 8) -> torch.Tensor:
    return torch.rand(count, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_no_augmentation_is_the_identity() -> None:
    assert torch.equal(augment(images(), Augmentation()), images())


def test_flips_give_each_of_the_four_views_and_nothing_else() -> None:
    torch.manual_seed(0)
    one = images(1)
    views = [one, one.flip(2), one.flip(3), one.flip(2, 3)]
    moved = augment(one.expand(64, -1, -1, -1), ISIC)
    seen = [sum(torch.equal(image, view[0]) for image in moved) for view in views]
    assert sum(seen) == 64
    assert min(seen) > 0  # that one of four is missed has probability 4 (3/4)^64 = 4e-8


def test_a_shift_moves_right_and_down_and_leaves_black() -> None:
    one = images(1)
    moved = augmentation.move(one, torch.zeros(1, 1), torch.tensor([[4 / SIZE, 2 / SIZE]]))
    torch.testing.assert_close(moved[..., 2:, 4:], one[..., :-2, :-4], rtol=0, atol=1e-5)  # bilinear, in float32
    assert (moved[..., :2, :] == -1).all()
    assert (moved[..., :4] == -1).all()


def test_a_quarter_turn_is_a_quarter_turn() -> None:
    one = images(1)
    moved = augmentation.move(one, torch.full((1, 1), math.pi / 2), torch.zeros(1, 2))
    turned = min((moved - one.rot90(k, (2, 3))).abs().max() for k in (1, 3))
    assert turned < 1e-4  # bilinear, in float32


def test_rotation_and_shift_compose_on_a_square_image() -> None:
    """Shifting after rotating equals both at once; away from the border, on a smooth image."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIZE), torch.linspace(-1, 1, SIZE), indexing="ij")
    smooth = (0.5 * torch.sin(2 * x + y)).expand(1, 3, -1, -1)
    angle, shift, nothing = torch.full((1, 1), 0.17), torch.tensor([[2 / SIZE, -3 / SIZE]]), torch.zeros(1, 1)
    both = augmentation.move(smooth, angle, shift)
    apart = augmentation.move(augmentation.move(smooth, angle, torch.zeros(1, 2)), nothing, shift)
    inside = slice(9, -9)
    # Whole pixels of shift, so the two differ by float rounding only
    torch.testing.assert_close(both[..., inside, inside], apart[..., inside, inside], rtol=0, atol=1e-5)


def test_jitter_by_hand() -> None:
    one = images(1)
    brighter = augmentation.jitter(one, torch.full((1, 1), 0.8), torch.ones(1, 1))
    torch.testing.assert_close(brighter + 1, 0.8 * (one + 1))
    flat = augmentation.jitter(one, torch.ones(1, 1), torch.zeros(1, 1))
    torch.testing.assert_close(flat, one.mean().expand_as(one))
    assert augmentation.jitter(one, torch.full((1, 1), 1.2), torch.ones(1, 1)).max() <= 1


def test_softening_blurs_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    soft = augmentation.soften(images(32))
    assert soft.diff(dim=3).abs().mean() < 0.9 * images(32).diff(dim=3).abs().mean()
    # Means over 3 x 3 move brightness across the border a little
    torch.testing.assert_close(soft.mean(), images(32).mean(), rtol=0, atol=0.01)
    flat = torch.zeros(4, 3, SIZE, SIZE)
    assert augmentation.soften(flat).abs().max() < 6 * augmentation.NOISE


@pytest.mark.parametrize("recipe", [CHEXPERT, ISIC, replace(ISIC, soften=True)])
def test_each_image_moves_in_its_own_way(recipe: Augmentation) -> None:
    torch.manual_seed(0)
    moved = augment(images(1).expand(8, -1, -1, -1), recipe)
    assert moved.shape == (8, 3, SIZE, SIZE)
    assert len({tuple(image.flatten()[:200].tolist()) for image in moved}) >= 3
