"""What was captured, and what changes an activation: an edit is a function of it and of where and when it is.

Letters: B rows of a call, h heads of width d, N positions, M or L tokens, C channels.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor

from ldm.names import nearest

Rows = Sequence[int] | Literal["uncond", "cond"]


@dataclass(frozen=True)
class Moment:
    """Where and when an activation is: its place, and the training timestep of each row, (B,), in a U-Net."""

    place: str
    t: Tensor | None


@dataclass(frozen=True)
class Taps:
    """What was captured.

    runs: place -> what it held each time it ran.  timesteps: of each call of a U-Net, (B,); empty for other networks.
    """

    runs: Mapping[str, list[Tensor]]
    timesteps: list[Tensor] = field(default_factory=list)

    def __getitem__(self, place: str) -> Tensor:
        """The activation of the latest call; place: its name, or a pattern that was captured and means one place.

        Raises:  ValueError: the place was not captured or did not run, or the pattern means several.
        """
        place = self._one(place)
        if not self.runs[place]:
            raise ValueError(f"place: {place!r} never ran")
        return self.runs[place][-1]

    def _one(self, name: str) -> str:
        matches = [place for place in self.runs if place == name or ("*" in name and fnmatchcase(place, name))]
        if not matches:
            raise ValueError(f"place: {name!r} was not captured{nearest(name, list(self.runs))}")
        if len(matches) > 1:
            raise ValueError(f"place: {name!r} is {len(matches)} places, expected one: {', '.join(matches)}")
        return matches[0]

    def at(self, place: str, t: Tensor) -> Tensor:
        """The activation of the one call that had these timesteps, (B,).

        Raises:  ValueError: no call had, or several did: rows split by `max_batch`, a sampler that asks twice.
        """
        found = [i for i, of in enumerate(self.timesteps) if of.shape == t.shape and bool((of.cpu() == t.cpu()).all())]
        if len(found) != 1 or place not in self.runs:
            times = f"{len(found)} captured calls" if place in self.runs else "no capture"
            raise ValueError(f"place: {place!r} has {times} of {len(t)} rows at t = {t.tolist()}, expected exactly one")
        return self.runs[place][found[0]]


# ---- edits -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Edit:
    """A change of an activation, and what part of it is changed; None: all. Made by `zero`, `scale` and the others."""

    change: Callable[[Tensor, Moment], Tensor]  # -> the activation's shape
    timesteps: frozenset[float] | None = None
    rows: Rows | None = None
    heads: tuple[int, ...] | None = None
    tokens: tuple[int, ...] | None = None

    def only(
        self,
        *,
        timesteps: Collection[float] | None = None,
        rows: Rows | None = None,
        heads: Collection[int] | None = None,
        tokens: Collection[int] | None = None,
    ) -> Edit:
        """The same change, of a part of the activation.

        Args:    timesteps: training timesteps at which it acts. The network knows no step numbers; with
                 `ldm.schedule.leading`, `leading(50)[:20]` are the first twenty of 50.
                 rows: of one call of the network, as numbers. Under guidance (`ldm.guidance`), a call's first half are
                 the unconditional rows: "uncond" and "cond" name the halves, however `max_batch` splits the batch.
                 At guidance 1 there are no halves, and numbers count within the pieces that `max_batch` makes.
                 heads: of `.heads` and `.probabilities`.
                 tokens: those that are looked at in `.probabilities`; else positions, of (B, N, C) and `.heads`.
        """
        return replace(
            self,
            timesteps=self.timesteps if timesteps is None else frozenset(timesteps),
            rows=self.rows if rows is None else rows,
            heads=self.heads if heads is None else tuple(heads),
            tokens=self.tokens if tokens is None else tuple(tokens),
        )

    def __call__(self, activation: Tensor, moment: Moment) -> Tensor:
        """The edited activation; the activation itself, bit for bit, wherever nothing is selected."""
        chosen = self._chosen(activation, moment)
        if chosen is not None and not bool(chosen.any()):
            return activation
        changed = self.change(activation, moment)
        return changed if chosen is None else torch.where(chosen, changed, activation)

    def _chosen(self, x: Tensor, moment: Moment) -> Tensor | None:
        """A mask that broadcasts to the activation, or None for all of it."""
        inside = moment.place.rpartition(".")[2] in ("heads", "probabilities")
        masks = []
        if self.timesteps is not None:
            if moment.t is None:
                raise ValueError(f"timesteps: {moment.place!r} ran outside a U-Net's call, where there is no time")
            masks.append((torch.tensor([t in self.timesteps for t in moment.t.tolist()], device=x.device), 0))
        if self.rows is not None:
            masks.append((self._row_mask(len(x), x.device), 0))
        if self.heads is not None:
            if not inside:
                raise ValueError(f"heads: {moment.place!r} has none; edit '.heads' or '.probabilities' of an attention")
            masks.append((_index_mask("heads", self.heads, x.shape[1], x.device), 1))
        if self.tokens is not None:
            if x.ndim != 3 and not inside:
                raise ValueError(f"tokens: {moment.place!r} is {tuple(x.shape)}, expected (B, N, C)")
            axis = 3 if moment.place.endswith(".probabilities") else x.ndim - 2
            masks.append((_index_mask("tokens", self.tokens, x.shape[axis], x.device), axis))
        if not masks:
            return None
        chosen = torch.ones([1] * x.ndim, dtype=torch.bool, device=x.device)
        for mask, axis in masks:
            chosen = chosen & mask.view([-1 if i == axis else 1 for i in range(x.ndim)])
        return chosen

    def _row_mask(self, rows: int, device: torch.device) -> Tensor:
        if not isinstance(self.rows, str):
            return _index_mask("rows", self.rows or (), rows, device)
        if self.rows not in ("uncond", "cond") or rows % 2:
            raise ValueError(
                f"rows: got {self.rows!r} of {rows} rows, expected numbers, or 'uncond' or 'cond' of halves"
            )
        return (torch.arange(rows, device=device) >= rows // 2) == (self.rows == "cond")


def zero() -> Edit:
    """Nothing there: removes a skip, a head, or the branch that ends at this place."""
    return Edit(lambda x, moment: torch.zeros_like(x))


def scale(factor: float) -> Edit:
    """The activation times a number."""
    return Edit(lambda x, moment: factor * x)


def add(direction: Tensor, strength: float = 1.0) -> Edit:
    """The activation plus a direction; direction: any shape that broadcasts to the activation's."""
    return Edit(lambda x, moment: x + strength * _fitted(direction, x, moment.place))


def put(value: Tensor) -> Edit:
    """Something else instead; value: any shape that broadcasts to the activation's, such as a (1, L, D) context."""
    return Edit(lambda x, moment: _fitted(value, x, moment.place))


def swap_in(taps: Taps, place: str | None = None) -> Edit:
    """Another run's activation of the same timesteps; place: where to take it from, None: where it is put."""

    def change(x: Tensor, moment: Moment) -> Tensor:
        source = place or moment.place
        value = taps[source] if moment.t is None else taps.at(source, moment.t)
        return _fitted(value, x, moment.place)

    return Edit(change)


def apply(function: Callable[[Tensor], Tensor]) -> Edit:
    """Any function of the activation that keeps its shape."""
    return Edit(lambda x, moment: _fitted(function(x), x, moment.place))


Change = Edit | Callable[[Tensor], Tensor] | Sequence[Edit | Callable[[Tensor], Tensor]]
"""What `ldm.probe.edit` takes for a place: an edit, a function of the activation, or several of them."""


def as_edits(place: str, change: Change) -> list[Edit]:
    """What is done to a place, one after the other. Raises ValueError for what is no edit."""
    several = list(change) if isinstance(change, Sequence) and not isinstance(change, str) else [change]
    for one in several:
        if not callable(one):
            raise ValueError(
                f"edits: {place!r} is given {one!r}, expected an edit such as zero(), a function of the activation, or "
                "a list of them"
            )
    return [one if isinstance(one, Edit) else apply(one) for one in several]  # type: ignore[arg-type]


def in_turn(edits: Sequence[Edit]) -> Callable[[Tensor, Moment], Tensor]:
    """Several edits as one."""

    def see(x: Tensor, moment: Moment) -> Tensor:
        for edit in edits:
            x = edit(x, moment)
        return x

    return see


def _fitted(value: Tensor, x: Tensor, place: str) -> Tensor:
    """The value in the activation's shape, type and on its device. Raises ValueError where it does not broadcast."""
    try:
        return value.to(x).expand_as(x)
    except RuntimeError as error:
        raise ValueError(f"value: {tuple(value.shape)} does not broadcast to {place!r}, {tuple(x.shape)}") from error


def _index_mask(name: str, chosen: Sequence[int], size: int, device: torch.device) -> Tensor:
    """(size,) booleans, true at the chosen numbers."""
    if any(not 0 <= i < size for i in chosen):
        raise ValueError(f"{name}: got {list(chosen)}, expected numbers in 0..{size - 1}")
    mask = torch.zeros(size, dtype=torch.bool, device=device)
    mask[list(chosen)] = True
    return mask
