"""`capture` and `edit`: hooks on any network, there only while a `with` is open.

Letters: B rows of a call, h heads of width d, N positions, M tokens.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, MutableSequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ldm.names import nearest
from ldm.probe import attentions
from ldm.probe.attentions import AttentionKind, attention_probabilities
from ldm.probe.edits import Change, Edit, Moment, Taps, as_edits, in_turn

logger = logging.getLogger(__name__)

See = Callable[[Tensor, Moment], Tensor]
Clock = Callable[[], Tensor | None]


def places(network: nn.Module) -> tuple[str, ...]:
    """The name of every place, in the order of the modules."""
    known = []
    for name, module in network.named_modules():
        known += [name] if name and not isinstance(module, nn.ModuleList) else []
        known += [f"{name}.{place}" if name else place for place in attentions.inside(module)]
    return tuple(known)


def find_places(network: nn.Module, *names: str) -> tuple[str, ...]:
    """The places that some names mean, each once; a name may hold `*` for any characters: "*.attn2.context".

    Raises:  ValueError: a name that means no place, saying what is near.
    """
    known = places(network)
    meant: dict[str, None] = {}
    for name in names:
        matches = [place for place in known if place == name or ("*" in name and fnmatchcase(place, name))]
        if not matches:
            hint = nearest(name, known) if "*" in name else _what_is_there(network, name)
            raise ValueError(f"place: {type(network).__name__} has no {name!r}{hint}")
        meant |= dict.fromkeys(matches)
    return tuple(meant)


def _what_is_there(network: nn.Module, name: str) -> str:
    """Where a name goes astray: the part that was meant, or what is there instead, and who has such a part."""
    parts, owner = name.split("."), network
    for i, part in enumerate(parts):
        children = dict(owner.named_children())
        if part in children:
            owner = children[part]
            continue
        there, path = [*children, *attentions.inside(owner)], parts[:i]
        if near := get_close_matches(part, there, n=1):
            return f"; did you mean {'.'.join([*path, near[0], *parts[i + 1 :]])!r}?"
        same_end = [place for place in places(network) if i and place.endswith(f".{part}")]
        if part is parts[-1] and (hint := nearest(name, same_end)):
            return hint
        has = f"; {'.'.join(path)!r} has {', '.join(there) or 'nothing inside'}" if path else ""
        owners = {re.sub(r"\d+", "*", path) for path, module in network.named_modules() if hasattr(module, part)}
        elsewhere = f"; {part!r} is in {', '.join(sorted(owners))}" if owners and part.isidentifier() else ""
        return has + elsewhere or nearest(name, places(network))
    return f"; it is a list: name one of {', '.join(f'{name}.{child}' for child, _ in owner.named_children())}"


@contextmanager
def capture(network: nn.Module, *names: str, keep: Callable[[Tensor], Tensor] | None = None) -> Iterator[Taps]:
    """While open, record what some places hold, after whatever an edit does to them.

    Probabilities are computed beside the fused attention, from the q and k that it is given; an edit of probabilities
    shows in `.heads` and in the output, not in them.

    Args:    names: see `find_places`.  keep: what to keep of each activation, such as a mean; None: all of it.
    Raises:  ValueError: a name that means no place.
    """
    taps = Taps({place: [] for place in find_places(network, *names)})

    def record(x: Tensor, moment: Moment) -> Tensor:
        taps.runs[moment.place].append(x if keep is None else keep(x))
        return x

    with ExitStack() as hooks:
        clock = _watch_time(network, hooks, taps.timesteps)
        for place in taps.runs:
            _attach(network, hooks, place, record, clock, first=False)
        yield taps


@contextmanager
def edit(network: nn.Module, edits: Mapping[str, Change]) -> Iterator[None]:
    """While open, change what some places hold; several edits of one place act in turn.

    Composes with samplers, prompt trees and guidance, which call the network as ever. Not with `torch.compile`.

    Args:    edits: name, see `find_places` -> an edit, a function of the activation, or several of them.
    Raises:  ValueError: a name that means no place, or a place that is edited already. While the network runs: an
             edit that does not fit the activation.
    """
    at_places = {place: as_edits(name, of) for name, of in edits.items() for place in find_places(network, name)}
    # Changed probabilities give new heads, so the two of one attention are edited in one go, that first.
    taken = {re.sub(r"(^|\.)probabilities$", r"\1heads", place) for place in at_places}
    edited: set[str] = vars(network).setdefault("_edited", set())
    if twice := edited & taken:
        raise ValueError(f"edits: {min(twice)!r} is edited already; edit it in one `with`, in turn by a list of edits")
    waiting = [(place, of) for place, several in at_places.items() for of in several if of.timesteps is not None]
    with ExitStack() as hooks:
        hooks.callback(edited.difference_update, taken)
        edited.update(taken)
        clock = _watch_time(network, hooks, deque(maxlen=1), waiting)
        for place, several in sorted(at_places.items(), key=lambda item: item[0].endswith("probabilities")):
            _attach(network, hooks, place, in_turn(several), clock, first=True)
        yield
    for place, of in waiting:
        few = sorted(of.timesteps or (), reverse=True)
        shown = ", ".join(f"{t:g}" for t in few[:3]) + (", ..." if len(few) > 3 else "")
        logger.warning("edit of %r never acted: the network was not called at any of its timesteps, %s", place, shown)


def _watch_time(
    network: nn.Module,
    hooks: ExitStack,
    timesteps: MutableSequence[Tensor],
    waiting: list[tuple[str, Edit]] | None = None,
) -> Clock:
    """Append each call's timesteps, where the network has any; returns what tells those of the latest call.

    Args:    waiting: edits whose timesteps have not come; those that do are taken out.
    """
    signature = inspect.signature(network.forward)
    if "t" not in signature.parameters:
        return lambda: None

    def before(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        given = signature.bind(*args, **options).arguments
        t = torch.as_tensor(given["t"])
        timesteps.append(t if t.ndim else t.expand(len(given["x_t"])))
        if waiting:
            now = set(t.flatten().tolist())
            waiting[:] = [(place, of) for place, of in waiting if of.timesteps is not None and not now & of.timesteps]

    hooks.callback(network.register_forward_pre_hook(before, with_kwargs=True).remove)
    return lambda: timesteps[-1] if timesteps else None


def _attach(network: nn.Module, hooks: ExitStack, place: str, see: See, clock: Clock, first: bool) -> None:
    """Show a place's activation to `see` whenever it runs, and go on with what that returns."""

    def shown(x: Tensor) -> Tensor:
        return see(x, Moment(place, clock()))

    name, _, inside = place.rpartition(".")
    owner = network.get_submodule(name)
    kind = attentions.kind_of(owner)
    if kind is None or inside not in attentions.inside(owner):
        module = network.get_submodule(place)
        hook = module.register_forward_hook(lambda m, args, output: _output_seen(output, shown), prepend=first)
    elif inside == "context":
        hook = owner.register_forward_pre_hook(lambda m, args: (args[0], shown(args[1])), prepend=first)
    else:
        seen = _heads_seen(owner, shown) if inside == "heads" else _probabilities_seen(hooks, owner, kind, shown)
        mixing = owner.get_submodule(kind.out)
        hook = mixing.register_forward_pre_hook(lambda m, args: seen(args), prepend=first)
    hooks.callback(hook.remove)


def _output_seen(output: Tensor | list[Tensor], shown: Callable[[Tensor], Tensor]) -> Tensor | list[Tensor]:
    """A module's output, or the last of the skips that a block on the way down returns."""
    return [*output[:-1], shown(output[-1])] if isinstance(output, list) else shown(output)


def _heads_seen(owner: nn.Module, shown: Callable[[Tensor], Tensor]) -> Callable[[tuple[Tensor]], tuple[Tensor]]:
    """What stands before the output projection of an attention, the heads apart."""
    return lambda args: (_joined(shown(_split(args[0], owner))),)


def _probabilities_seen(
    hooks: ExitStack, owner: nn.Module, kind: AttentionKind, shown: Callable[[Tensor], Tensor]
) -> Callable[[tuple[Tensor]], tuple[Tensor]]:
    """The probabilities that the fused attention does not show; where they are changed, its result from the changed."""
    projected: dict[str, Tensor] = {}
    for name in (kind.q, kind.k, kind.v):

        def remember(module: nn.Module, args: object, output: Tensor, name: str = name) -> None:
            projected[name] = _split(output, owner)

        hooks.callback(owner.get_submodule(name).register_forward_hook(remember).remove)

    def before(args: tuple[Tensor]) -> tuple[Tensor]:
        q, k, v = (projected.pop(name) for name in (kind.q, kind.k, kind.v))
        probabilities = attention_probabilities(q, k, kind.causal)
        changed = shown(probabilities)
        return args if changed is probabilities else (_joined(changed @ v),)

    return before


def _split(x: Tensor, attention: nn.Module) -> Tensor:
    """(B, N, h d) -> (B, h, N, d)."""
    return x.unflatten(-1, (int(attention.heads), -1)).transpose(1, 2)  # type: ignore[arg-type]


def _joined(x: Tensor) -> Tensor:
    """(B, h, N, d) -> (B, N, h d)."""
    return x.transpose(1, 2).flatten(2)
