"""What a phantom data set holds: an order, and the images that make it up, in groups of one anatomy."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from ldm.phantom import EXTRAS, sample_attributes
from ldm.phantom.draw import stream


@dataclass(frozen=True, kw_only=True)
class Order:
    """A data set to be drawn."""

    n: int  # images
    seed0: int = 0  # of the first anatomy
    size: int = 128  # the side in pixels
    confounded: bool = False  # see `ldm.phantom.sample_attributes`
    counterfactuals: bool = False  # also write every image with each attribute toggled
    tied: bool = True  # see `ldm.phantom.render`
    extras: Sequence[str] = ()  # some of `EXTRAS`, drawn like the other attributes, which they do not change

    def check(self, domain: str) -> None:
        """Raises ValueError for a number out of range, or an extra that the domain does not have."""
        if unknown := sorted(set(self.extras) - set(EXTRAS[domain])):
            known = list(EXTRAS[domain])
            raise ValueError(f"extras: {unknown} unknown for domain {domain!r}, expected some of {known}")
        for name, value, least in (("n", self.n, 1), ("seed0", self.seed0, 0), ("size", self.size, 32)):
            if value < least:
                raise ValueError(f"{name}: got {value}, expected >= {least}")


@dataclass(frozen=True)
class Item:
    """One image to be rendered: what it shows and where it goes."""

    domain: str
    seed: int
    attributes: Mapping[str, bool]
    path: str  # of the JPEG, relative to the output folder
    key: str  # names the masks and counterfactuals
    group: int  # the patient or the lesion, counted from 0: images of one group share their anatomy
    index: int  # within the group


def groups(domain: str, order: Order, starts: Sequence[int], fixed: Sequence[str] = ()) -> Iterator[Item]:
    """n images in groups of one seed; a new group, numbered from 0 again, begins at each of `starts`.

    The first image of a group has the attributes of `sample_attributes`; further ones are drawn in the same way, drawn
    anew if they repeat a state, and keep the attributes named in `fixed`.
    """
    seed, group, count = order.seed0 - 1, -1, 0
    states: list[dict[str, bool]] = []
    for i in range(order.n):
        if i in starts:
            group, count = -1, 0
        if len(states) >= count or count == 0:
            seed, group, states = seed + 1, group + 1, []
            chance = stream(seed, f"{domain} group").random()
            count = 1 if chance < 0.75 else 2 if chance < 0.92 else 3
        states.append(_next_state(domain, seed, states, order, fixed))
        yield Item(domain, seed, states[-1], "", "", group, len(states) - 1)


def _next_state(
    domain: str, seed: int, states: Sequence[dict[str, bool]], order: Order, fixed: Sequence[str]
) -> dict[str, bool]:
    if not states:
        return sample_attributes(domain, seed, order.confounded, order.extras)
    seeds = stream(seed, f"{domain} state {len(states)}")
    while True:
        state = sample_attributes(domain, int(seeds.integers(2**62)), order.confounded, order.extras)
        state |= {name: states[0][name] for name in fixed}
        if state not in states:
            return state


def draw(item: Item, what: str) -> float:
    """Uniform in [0, 1), one number for each image and purpose."""
    return float(stream(item.seed, f"report {item.index} {what}").random())
