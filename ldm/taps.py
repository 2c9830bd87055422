"""Taps: look at any activation of a network, or change it, while it runs, without touching the network's code.

    with sd.unet.capture("mid_block", "*.attn2.probabilities") as seen:
        sd.unet(x_t, t, context)
    seen["mid_block"]                                                      # (B, C, h, w)

    with sd.unet.edit({"up_blocks.1.skips.0": zero(), "mid_block": scale(0.5).only(timesteps=leading(50)[:20])}):
        for step in ddim(eps_fn, x_T, sd.schedule, 50): ...

A place is the key path of a module, as in the checkpoint, and means the module's output. An attention has further
places:

    NAME.probabilities   (B, h, N, M)   how much each position looks at each token, for each head
    NAME.heads           (B, h, N, d)   what each head found, before the heads are mixed
    NAME.context         (B, L, D)      what a cross-attention looks at: the prompt, of this layer alone

A block on the way down returns all its skips: its place means the last of them, which is the block's output. A residual
branch is removed by zeroing its last layer: `conv2` of a resnet, `proj_out` of a transformer, `attn2` itself.

Hooks exist only while a `with` is open, so a network that nobody looks at runs as if this file were not there.
Letters: B rows of a call, h heads of width d, N positions, M or L tokens, C channels, D context width.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

Rows = Sequence[int] | Literal["uncond", "cond"]


class MultiHead(nn.Module):
    """An attention whose inside has places. What it is made of is said by the class, for names differ by network."""

    projections: tuple[str, str, str, str]  # the names of the modules that make q, k, v, and mix the heads
    heads: int
    causal: bool = False  # position n sees tokens 0..n only
    cross: bool = False  # looks at a context, its second input, instead of at itself


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
        """The activation of the latest call. Raises ValueError where the place was not captured or did not run."""
        if not self.runs.get(place):
            missing = "never ran" if place in self.runs else "was not captured" + _nearest(place, list(self.runs))
            raise ValueError(f"place: {place!r} {missing}")
        return self.runs[place][-1]

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


# ---- networks --------------------------------------------------------------------------------------


class Tapped(nn.Module):
    """A network whose activations have names, to be captured and edited."""

    def places(self) -> tuple[str, ...]:
        """The name of every place, in the order of the modules."""
        found = []
        for name, module in self.named_modules():
            found += [name] if name and not isinstance(module, nn.ModuleList) else []
            if isinstance(module, MultiHead):
                inside = ("probabilities", "heads", "context") if module.cross else ("probabilities", "heads")
                found += [f"{name}.{place}" for place in inside]
        return tuple(found)

    def find_places(self, *names: str) -> tuple[str, ...]:
        """The places that some names mean, each once; a name may hold `*` for any characters: "*.attn2.context".

        Raises:  ValueError: a name that means no place, offering the nearest.
        """
        known = self.places()
        found: dict[str, None] = {}
        for name in names:
            matches = [place for place in known if place == name or ("*" in name and fnmatchcase(place, name))]
            if not matches:
                raise ValueError(f"place: {type(self).__name__} has no {name!r}{_nearest(name, known)}")
            found |= dict.fromkeys(matches)
        return tuple(found)

    @contextmanager
    def capture(self, *names: str, keep: Callable[[Tensor], Tensor] | None = None) -> Iterator[Taps]:
        """While open, record what some places hold, after whatever an edit does to them.

        Probabilities are computed beside the fused attention, from the q and k that it is given; an edit of
        probabilities shows in `.heads` and in the output, not in them.

        Args:    names: see `find_places`.  keep: what to keep of each activation, such as a mean; None: all of it.
        Raises:  ValueError: a name that means no place.
        """
        taps = Taps({place: [] for place in self.find_places(*names)})

        def record(x: Tensor, moment: Moment) -> Tensor:
            taps.runs[moment.place].append(x if keep is None else keep(x))
            return x

        with ExitStack() as hooks:
            clock = self._watch_time(hooks, taps.timesteps)
            for place in taps.runs:
                self._attach(hooks, place, record, clock, first=False)
            yield taps

    @contextmanager
    def edit(self, edits: Mapping[str, Edit | Sequence[Edit]]) -> Iterator[None]:
        """While open, change what some places hold; several edits of one place act in turn.

        Composes with samplers, prompt trees and guidance, which call the network as ever. Not with `torch.compile`.

        Args:    edits: see `find_places` for the names.
        Raises:  ValueError: a name that means no place, or a place that is edited already. While the network runs: an
                 edit that does not fit the activation.
        """
        at_places = {place: edit for name, edit in edits.items() for place in self.find_places(name)}
        # Changed probabilities give new heads, so the two of one attention are edited in one go, that first.
        taken = {re.sub(r"\.probabilities$", ".heads", place) for place in at_places}
        edited: set[str] = vars(self).setdefault("_edited", set())
        if twice := edited & taken:
            raise ValueError(
                f"edits: {min(twice)!r} is edited already; edit it in one `with`, in turn by a list of edits"
            )
        with ExitStack() as hooks:
            hooks.callback(edited.difference_update, taken)
            edited.update(taken)
            clock = self._watch_time(hooks, deque(maxlen=1))
            for place, edit in sorted(at_places.items(), key=lambda item: item[0].endswith(".probabilities")):
                self._attach(hooks, place, _in_turn(edit), clock, first=True)
            yield

    def _watch_time(self, hooks: ExitStack, timesteps: MutableSequence[Tensor]) -> Callable[[], Tensor | None]:
        """Append each call's timesteps, where the network has any; returns what tells those of the latest call."""
        signature = inspect.signature(self.forward)
        if "t" not in signature.parameters:
            return lambda: None

        def before(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
            given = signature.bind(*args, **options).arguments
            t = torch.as_tensor(given["t"])
            timesteps.append(t if t.ndim else t.expand(len(given["x_t"])))

        hooks.callback(self.register_forward_pre_hook(before, with_kwargs=True).remove)
        return lambda: timesteps[-1] if timesteps else None

    def _attach(
        self,
        hooks: ExitStack,
        place: str,
        see: Callable[[Tensor, Moment], Tensor],
        clock: Callable[[], Tensor | None],
        first: bool,
    ) -> None:
        """Show a place's activation to `see` whenever it runs, and go on with what that returns."""

        def shown(x: Tensor) -> Tensor:
            return see(x, Moment(place, clock()))

        name, _, inside = place.rpartition(".")
        owner = self.get_submodule(name)
        if not isinstance(owner, MultiHead) or inside not in ("probabilities", "heads", "context"):
            module, before = self.get_submodule(place), None
        elif inside == "context":
            module, before = owner, lambda args: (args[0], shown(args[1]))
        else:
            module = owner.get_submodule(owner.projections[3])
            before = _heads_seen(owner, shown) if inside == "heads" else _probabilities_seen(hooks, owner, shown)
        if before is None:
            hook = module.register_forward_hook(lambda m, args, output: _output_seen(output, shown), prepend=first)
        else:
            hook = module.register_forward_pre_hook(lambda m, args: before(args), prepend=first)
        hooks.callback(hook.remove)


def _output_seen(output: Tensor | list[Tensor], shown: Callable[[Tensor], Tensor]) -> Tensor | list[Tensor]:
    """A module's output, or the last of the skips that a block on the way down returns."""
    return [*output[:-1], shown(output[-1])] if isinstance(output, list) else shown(output)


def _heads_seen(owner: MultiHead, shown: Callable[[Tensor], Tensor]) -> Callable[[tuple[Tensor]], tuple[Tensor]]:
    """What stands before the output projection of an attention, the heads apart."""
    return lambda args: (_joined(shown(_split(args[0], owner.heads))),)


def _probabilities_seen(
    hooks: ExitStack, owner: MultiHead, shown: Callable[[Tensor], Tensor]
) -> Callable[[tuple[Tensor]], tuple[Tensor]]:
    """The probabilities that the fused attention does not show; where they are changed, its result from the changed."""
    seen: dict[str, Tensor] = {}
    for name in owner.projections[:3]:

        def remember(module: nn.Module, args: object, output: Tensor, name: str = name) -> None:
            seen[name] = _split(output, owner.heads)

        hooks.callback(owner.get_submodule(name).register_forward_hook(remember).remove)

    def before(args: tuple[Tensor]) -> tuple[Tensor]:
        q, k, v = (seen.pop(name) for name in owner.projections[:3])
        probabilities = attention_probabilities(q, k, owner.causal)
        changed = shown(probabilities)
        return args if changed is probabilities else (_joined(changed @ v),)

    return before


def attention_probabilities(q: Tensor, k: Tensor, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)), written out: what the fused attention multiplies the values with.

    [Vaswani et al. 2017, eq. 1]

    Args:    q: (B, h, N, d).  k: (B, h, M, d).  causal: position n sees tokens 0..n only.
    Returns: (B, h, N, M); each row sums to 1.
    """
    scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    return scores.softmax(dim=-1)


def _split(x: Tensor, heads: int) -> Tensor:
    """(B, N, h d) -> (B, h, N, d)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _joined(x: Tensor) -> Tensor:
    """(B, h, N, d) -> (B, N, h d)."""
    return x.transpose(1, 2).flatten(2)


def _in_turn(edits: Edit | Sequence[Edit]) -> Callable[[Tensor, Moment], Tensor]:
    """Several edits as one."""

    def see(x: Tensor, moment: Moment) -> Tensor:
        for edit in [edits] if isinstance(edits, Edit) else edits:
            x = edit(x, moment)
        return x

    return see


def _nearest(name: str, known: Sequence[str]) -> str:
    """ "; did you mean 'mid_block'?", or nothing where no known name is like the one that came."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
