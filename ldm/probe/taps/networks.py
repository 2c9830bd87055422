"""The networks' side of taps: what has a name, and the hooks that are there while a `with` is open.

Letters: B rows of a call, h heads of width d, N positions, M tokens.
"""

from __future__ import annotations

import inspect
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableSequence, Sequence
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ldm.names import nearest
from ldm.probe.taps.edits import Edit, Moment, Taps, in_turn


class MultiHead(nn.Module):
    """An attention whose inside has places. What it is made of is said by the class, for names differ by network."""

    projections: tuple[str, str, str, str]  # the names of the modules that make q, k, v, and mix the heads
    heads: int
    causal: bool = False  # position n sees tokens 0..n only
    cross: bool = False  # looks at a context, its second input, instead of at itself


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
                raise ValueError(f"place: {type(self).__name__} has no {name!r}{nearest(name, known)}")
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
                self._attach(hooks, place, in_turn(edit), clock, first=True)
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
            module = self.get_submodule(place)
            hook = module.register_forward_hook(lambda m, args, output: _output_seen(output, shown), prepend=first)
        elif inside == "context":
            hook = owner.register_forward_pre_hook(lambda m, args: (args[0], shown(args[1])), prepend=first)
        else:
            mixing = owner.get_submodule(owner.projections[3])
            before = _heads_seen(owner, shown) if inside == "heads" else _probabilities_seen(hooks, owner, shown)
            hook = mixing.register_forward_pre_hook(lambda m, args: before(args), prepend=first)
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
