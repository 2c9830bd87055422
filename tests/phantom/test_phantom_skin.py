"""The skin phantom: exact counterfactual pairs, determinism, and what the tied mode promises."""

import numpy as np
import pytest

from ldm.phantom import skin

NAMES = ("melanoma", "hair", "gel_bubble", "ruler", "ink")
SEEDS = range(40)

# Share of the image that a mask may cover: below the lower bound an autoencoder that downsamples 8 times would lose
# it, above the upper bound leakage outside the mask would mean little.
AREA = {
    "melanoma": (0.08, 0.28),
    "hair": (0.12, 0.42),
    "gel_bubble": (0.05, 0.32),
    "ruler": (0.03, 0.12),
    "ink": (0.03, 0.14),
}


def some_attributes(seed: int) -> dict[str, bool]:
    return {name: bool(flag) for name, flag in zip(NAMES, np.random.default_rng(seed).random(5) < 0.5, strict=True)}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_toggling_one_attribute_changes_only_its_mask(name: str, tied: bool) -> None:
    for seed in SEEDS:
        others = some_attributes(seed)
        on = skin.render(seed, {**others, name: True}, tied=tied)
        off = skin.render(seed, {**others, name: False}, tied=tied)
        outside = ~on.masks[name]
        np.testing.assert_array_equal(on.image[outside], off.image[outside])
        np.testing.assert_array_equal(on.to_uint8()[outside], off.to_uint8()[outside])
        assert on.anatomy == off.anatomy


@pytest.mark.parametrize("name", NAMES)
def test_attribute_is_large_and_visible(name: str) -> None:
    low, high = AREA[name]
    for seed in SEEDS:
        on, off = skin.render(seed, {name: True}), skin.render(seed, {})
        mask = on.masks[name]
        assert low < mask.mean() < high, f"seed {seed}: mask covers {mask.mean():.3f}"
        assert np.abs(on.image - off.image)[mask].mean() > 0.03, f"seed {seed}"


@pytest.mark.parametrize("tied", [True, False])
def test_masks_do_not_depend_on_other_attributes(tied: bool) -> None:
    """One stream a part: what else is drawn never moves an attribute."""
    for seed in SEEDS[:10]:
        every = skin.render(seed, dict.fromkeys(NAMES, True), tied=tied)
        assert sorted(every.masks) == sorted(NAMES)
        for name in NAMES:
            alone = skin.render(seed, {name: True}, tied=tied)
            assert list(alone.masks) == [name]
            np.testing.assert_array_equal(every.masks[name], alone.masks[name])


@pytest.mark.parametrize("name", sorted(skin.ARTIFACTS))
def test_tied_artifact_is_a_function_of_the_visible_anatomy(name: str) -> None:
    """Two seeds with the same anatomy get the same artifact when tied, and different ones when free."""
    image = np.full((128, 128, 3), 0.5, dtype=np.float32)
    unit = {key: 0.1 + 0.1 * k for k, key in enumerate(skin.ANATOMY)}
    anatomy = {key: low + (high - low) * unit[key] for key, (low, high) in skin.ANATOMY.items()}

    def draw(seed: int, tied: bool) -> np.ndarray:
        return skin.ARTIFACTS[name](image, skin.Scene(seed, 128, tied, unit, anatomy))[0]

    np.testing.assert_array_equal(draw(1, tied=True), draw(2, tied=True))
    assert not np.array_equal(draw(1, tied=False), draw(2, tied=False))


def test_tied_and_free_share_the_subject() -> None:
    """A nevus without artifacts has nothing to place, so both modes draw the same image."""
    for seed in SEEDS:
        np.testing.assert_array_equal(skin.render(seed, {}).image, skin.render(seed, {}, tied=False).image)


def test_rendering_is_deterministic_and_seeds_differ() -> None:
    attributes = dict.fromkeys(NAMES, True)
    first, again, other = (skin.render(seed, attributes) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first.image, again.image)
    assert np.abs(first.image - other.image).mean() > 0.02


@pytest.mark.parametrize("size", [64, 128, 256])
def test_image_and_masks_have_the_stated_form(size: int) -> None:
    phantom = skin.render(3, {"hair": True, "melanoma": False}, size=size)
    assert phantom.domain == "skin"
    assert phantom.image.shape == (size, size, 3)
    assert phantom.image.dtype == np.float32
    assert 0.0 <= phantom.image.min() < phantom.image.max() <= 1.0
    assert phantom.masks["hair"].shape == (size, size)
    assert phantom.masks["hair"].dtype == bool
    assert phantom.attributes == {name: name == "hair" for name in NAMES}
    assert sorted(phantom.anatomy) == sorted(skin.ANATOMY)


def test_melanoma_is_darker_and_more_varied_than_the_nevus_of_its_seed() -> None:
    """The two classes can be told from the pixels: black areas, and more than one hue inside the lesion."""
    darker = more_varied = 0
    for seed in SEEDS:
        nevus, melanoma = skin.render(seed, {}), skin.render(seed, {"melanoma": True})
        inside = melanoma.masks["melanoma"]
        darkest = [np.quantile(phantom.image[inside].mean(-1), 0.05) for phantom in (nevus, melanoma)]
        red_over_blue = [
            np.std(phantom.image[inside][:, 0] - phantom.image[inside][:, 2]) for phantom in (nevus, melanoma)
        ]
        darker += darkest[1] < darkest[0]
        more_varied += red_over_blue[1] > red_over_blue[0]
    assert darker == len(SEEDS)
    assert more_varied >= 0.9 * len(SEEDS)


def test_an_unknown_attribute_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dark_corner.*expected some of.*melanoma"):
        skin.render(0, {"dark_corner": True})
