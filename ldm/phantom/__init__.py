"""Phantoms: drawn radiographs and dermoscopies whose true counterfactuals are known.

A seed fixes the anatomy, a set of attributes says what is laid over it. Each part draws from its own random stream and
every edge has compact support, so rendering one seed twice with one attribute toggled gives a pair that is equal, bit
for bit, outside that attribute's mask.

    render("chest", seed=7, attributes={"pleural_effusion": True}).image
"""

from collections.abc import Mapping, Sequence

from ldm.phantom.draw import stream
from ldm.phantom.types import Phantom

__all__ = ["ATTRIBUTES", "EXTRAS", "Phantom", "render", "sample_attributes"]

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "chest": ("pleural_effusion", "support_devices"),
    "skin": ("melanoma", "hair", "gel_bubble", "ruler", "ink"),
}

# Drawn only when asked for by name. The shipped model and its classifiers have never seen them: `ldm finetune` has
# something to teach.
EXTRAS: dict[str, tuple[str, ...]] = {"chest": ("cardiomegaly",), "skin": ()}

FREQUENCY = {
    "chest": {"pleural_effusion": 0.4, "support_devices": 0.4, "cardiomegaly": 0.4},
    "skin": {"melanoma": 0.5, "hair": 0.3, "gel_bubble": 0.3, "ruler": 0.3, "ink": 0.3},
}

# domain: (cause, companion, P(companion | cause)). In ISIC 202 of 272 images with ink also show a ruler.
CONFOUNDED = {"chest": ("pleural_effusion", "support_devices", 0.74), "skin": ("ink", "ruler", 0.74)}


def render(
    domain: str, seed: int, attributes: Mapping[str, bool] | None = None, size: int = 128, tied: bool = True
) -> Phantom:
    """Draw one phantom.

    Args:    domain: "chest" or "skin".  seed: >= 0, fixes the anatomy.  attributes: name -> present, extras too; a
             name left out is absent.  size: the side in pixels.  tied: place attributes as a function of the visible
             anatomy, so that the counterfactual is unique; else from random streams of their own.
    Raises:  ValueError: for an unknown domain or attribute, a negative seed, a size below 32.
    """
    names = attribute_names(domain)
    given, known = dict(attributes or {}), (*names, *EXTRAS[domain])
    if unknown := sorted(given.keys() - set(known)):
        raise ValueError(f"attributes: {unknown} unknown for domain {domain!r}, expected some of {list(known)}")
    if seed < 0:
        raise ValueError(f"seed: got {seed}, expected >= 0")
    if size < 32:
        raise ValueError(f"size: got {size}, expected >= 32 pixels")
    present = {name: bool(given.get(name, False)) for name in known if name in names or name in given}
    if domain == "chest":
        from ldm.phantom import chest

        return chest.render(seed, present, size, tied)
    from ldm.phantom import skin

    return skin.render(seed, present, size, tied)


def sample_attributes(domain: str, seed: int, confounded: bool = False, extras: Sequence[str] = ()) -> dict[str, bool]:
    """Which attributes phantom `seed` shows in a training set: independent draws, one stream an attribute.

    Extras come last and change nothing about the others.

    With `confounded`, one pair goes together (chest: devices with effusion, skin: a ruler with ink) while every
    attribute keeps its frequency: P(b | not a) = (P(b) - P(b | a) P(a)) / (1 - P(a)).
    """
    names = (*attribute_names(domain), *extras)
    frequency = FREQUENCY[domain]
    chance = {name: stream(seed, f"{domain} has {name}").random() for name in names}
    present = {name: bool(chance[name] < frequency[name]) for name in names}
    if confounded:
        cause, companion, together = CONFOUNDED[domain]
        p = frequency[cause]
        alone = (frequency[companion] - together * p) / (1.0 - p)
        present[companion] = bool(chance[companion] < (together if present[cause] else alone))
    return present


def attribute_names(domain: str) -> tuple[str, ...]:
    """The attributes of a domain, in the order in which tables list them. Raises ValueError for an unknown domain."""
    if domain not in ATTRIBUTES:
        raise ValueError(f"domain: got {domain!r}, expected one of {sorted(ATTRIBUTES)}")
    return ATTRIBUTES[domain]
