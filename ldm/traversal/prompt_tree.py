"""Traversal: one noise, many prompts, and the steps that they have in common taken once.

A traversal is a tree of prompts. Its root is the neutral prompt; every other branch leaves its
parent after `at` steps and has another context from there on:

    step   0         5        10                      50
    noise  +---------+---------+---- neutral ----------+
                     |         +---- effusion/s10 -----+
                     +-------------- effusion/s05 -----+

Run one by one, nine swaps of 50 steps and the neutral image are 500 evaluations a seed; the tree
needs 275. Between two forks the set of live branches is fixed, so such a segment is one ordinary
sampler run over one batch.

Letters: B seeds, S steps, L tokens, D width, C H W of a latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Protocol

import torch
from torch import Tensor

from ldm.conditioning import Contexts, Indexing, constant, neutral_steps
from ldm.samplers import History, Sampler, Step, ddim

KEPT = {"x_t": "x_prev", "x0_pred": "x0_pred", "eps": "eps"}  # a kept quantity -> the field of a Step; x_t: after it
KEEPABLE = tuple(KEPT)


@dataclass(frozen=True, eq=False)
class Branch:
    """A prompt, the step from which it holds, and the branches that leave it later."""

    name: str  # unique in its tree
    context: Tensor  # (B or 1, L, D)
    at: int = 0  # steps taken along the parent before this context holds; 0 at the root
    children: tuple[Branch, ...] = ()


def swaps(
    neutral: Tensor,
    styles: Mapping[str, Tensor],
    swap_steps: Iterable[int],
    steps: int = 50,
    indexing: Indexing = "steps",
) -> Branch:
    """The common tree: every style swapped in at every swap step, straight from the neutral path.

    Args:    neutral: (B or 1, L, D).  styles: name -> context like neutral.  swap_steps: for each style.
             indexing: see `ldm.conditioning.swap`.
    Returns: the root "neutral", with children named "<style>/s05", "<style>/s10" ...
    Raises:  ValueError: a swap step outside 0..steps.
    """
    swap_steps = list(swap_steps)
    return Branch(
        "neutral",
        neutral,
        children=tuple(
            Branch(f"{style}/s{swap_step:02d}", context, neutral_steps(swap_step, steps, indexing))
            for style, context in styles.items()
            for swap_step in swap_steps
        ),
    )


def unet_rows(tree: Branch, steps: int, sampler: Sampler = ddim) -> int:
    """Network evaluations one seed costs (at least, where they vary): each branch pays for its own steps only.

    Guidance doubles them (its unconditional half); running the branches separately would cost those of a whole run for
    each.
    """
    return sum(sampler.evaluations_of(steps - branch.at) for branch, _ in walk(tree))


@dataclass(frozen=True, eq=False)
class TreeResult:
    """What a traversal found, by branch name."""

    x_T: Tensor  # (B, C, H, W)
    latents: dict[str, Tensor]  # final latents (B, C, H, W)
    unet_rows: int  # latents that went through the network, all seeds and steps, guidance's second half not counted
    kept: dict[str, dict[str, Tensor]] = field(repr=False)  # quantity -> branch -> (S - at, B, C, H, W), own steps
    tree: Branch = field(repr=False)

    def path(self, name: str, quantity: str) -> Tensor:
        """A kept quantity along a branch's whole way from the noise, shared prefix included.

        Args:    name: a branch.  quantity: one of those named in `keep`.
        Returns: (S, B, C, H, W).
        Raises:  ValueError: an unknown branch, or a quantity that was not kept.
        """
        if quantity not in self.kept:
            raise ValueError(f"quantity: expected one that was kept, {sorted(self.kept)}, got {quantity!r}")
        if name not in self.latents:
            raise ValueError(f"name: expected one of {sorted(self.latents)}, got {name!r}")
        own = self.kept[quantity][name]
        branch, parent = next(pair for pair in walk(self.tree) if pair[0].name == name)
        return own if parent is None else torch.cat([self.path(parent.name, quantity)[: branch.at], own])


class Sample(Protocol):
    """`StableDiffusion.sample` with all of its options given but these, as by `functools.partial`."""

    def __call__(
        self, contexts: Contexts, seeds: Sequence[int], /, *, x_T: Tensor, start: int, history: History
    ) -> Iterator[Step]: ...


def traverse_tree(
    sample: Sample,
    x_T: Tensor,
    tree: Branch,
    seeds: Sequence[int],
    steps: int = 50,
    *,
    keep: Sequence[str] = (),
    progress: Callable[[int], object] | None = None,
) -> TreeResult:
    """Denoise every branch of a prompt tree for every seed, sharing each step before a fork.

        sample = partial(sd.sample, guidance_scale=7.5, sampler="ddim")
        result = traverse_tree(sample, initial_noise(seeds, sd.latent_shape), tree, seeds)

    A branch is the sampler's run under the swapped contexts, step for step. How closely the two agree in floating point
    is up to the model's `max_batch` (see `ldm.guidance.guided`), since a matrix product rounds a row by the size of the
    batch that it is in, and even by its place there:
    - None, or any number: to the last bits of float32, some 1e-7 after 10 steps at guidance 1;
    - B, or 2B under guidance: every branch makes the very calls that it would make alone, so bit for bit: a
      neutral -> neutral swap is then the neutral path;
    - 1: so does every seed, and no result depends on anything else in the batch.

    A multistep sampler begins anew at every fork: its memory of the old prompt's predictions says nothing about the
    new one's, and would make every method one of order 1 (measured in ldm/samplers/README.md).

    Args:    sample: its options must fit any number of rows: a negative prompt of (1, L, D), not of (B, L, D).
             x_T: (B, C, H, W), one row a seed.  tree: the root branch.  seeds: all branches of one get the same noise.
             steps: S.  keep: quantities to keep from every step, out of `KEEPABLE`.
             progress: called after each step with the number of rows done; they add up to B unet_rows(tree, S, ...),
             or more where the sampler's evaluations vary.
    Returns: final latents and kept quantities, in dtype of x_T and on the model's device.
    Raises:  ValueError: a tree that cannot be run (names, fork steps, context shapes), before the first evaluation.
    """
    check_arguments(tree, x_T, seeds, steps, keep)
    paths = Paths(x_T, keep)
    forks = sorted({branch.at for branch, _ in walk(tree)})
    for start, stop in pairwise([*forks, steps]):
        paths.fork_all(tree, start)
        for live in paths.equally_long():  # the segment: these branches of all seeds as one batch, until the next fork
            x_t, history = paths.batch(live)
            contexts = constant(paths.contexts(live), steps)
            run = sample(contexts, [*seeds] * len(live), x_T=x_t, start=start, history=history)
            for step in islice(run, stop - start):
                paths.move(live, step)
                if progress is not None:
                    progress(round(len(step.x_prev) * step.evaluations))
    return paths.result(tree)


class Paths:
    """Where every branch stands: its latents, what its sampler remembers, and what is kept of its steps."""

    def __init__(self, x_T: Tensor, keep: Sequence[str]) -> None:
        self.x_T = x_T
        self.rows = 0  # of the network, so far
        self.latents: dict[str, Tensor] = {}
        self.histories: dict[str, History] = {}
        self.prompts: dict[str, Tensor] = {}
        self.kept: dict[str, dict[str, list[Tensor]]] = {quantity: {} for quantity in keep}

    def fork_all(self, tree: Branch, at: int) -> None:
        """The branches that leave after `at` steps begin where their parents stand."""
        for branch, parent in walk(tree):
            if branch.at == at:
                self._fork(branch, parent)

    def _fork(self, branch: Branch, parent: Branch | None) -> None:
        self.latents[branch.name] = self.x_T if parent is None else self.latents[parent.name]
        self.histories[branch.name] = ()
        self.prompts[branch.name] = branch.context.expand(len(self.x_T), -1, -1)
        for steps in self.kept.values():
            steps[branch.name] = []

    def equally_long(self) -> list[list[str]]:
        """The branches by the length of their history: a sampler can only run those together that remember as much."""
        lengths = sorted({len(history) for history in self.histories.values()})
        return [[name for name, history in self.histories.items() if len(history) == length] for length in lengths]

    def batch(self, live: Sequence[str]) -> tuple[Tensor, History]:
        """Latents and history of some branches, one after the other."""
        histories = zip(*(self.histories[name] for name in live), strict=True)
        return torch.cat([self.latents[name] for name in live]), tuple(torch.cat(past) for past in histories)

    def contexts(self, live: Sequence[str]) -> Tensor:
        """Their prompts, likewise."""
        return torch.cat([self.prompts[name] for name in live])

    def move(self, live: Sequence[str], step: Step) -> None:
        """Take a step of the batch apart again."""
        self.rows += round(len(step.x_prev) * step.evaluations)
        size = len(self.x_T)
        histories = [past.split(size) for past in step.history]
        for i, name in enumerate(live):
            self.latents[name] = step.x_prev.split(size)[i]
            self.histories[name] = tuple(past[i] for past in histories)
            for quantity, steps in self.kept.items():
                steps[name].append(getattr(step, KEPT[quantity]).split(size)[i])

    def result(self, tree: Branch) -> TreeResult:
        """All of it, after the last step."""
        latents = {branch.name: self.latents[branch.name] for branch, _ in walk(tree)}
        return TreeResult(self.x_T, latents, self.rows, self._stacked(), tree)

    def _stacked(self) -> dict[str, dict[str, Tensor]]:
        """quantity -> branch -> (S - at, B, C, H, W); empty for a branch that forks after the last step."""
        empty = self.x_T.new_empty(0, *self.x_T.shape)
        return {
            quantity: {name: torch.stack(rows) if rows else empty for name, rows in steps.items()}
            for quantity, steps in self.kept.items()
        }


def walk(branch: Branch, parent: Branch | None = None) -> Iterator[tuple[Branch, Branch | None]]:
    """Every branch with its parent, parents first."""
    yield branch, parent
    for child in branch.children:
        yield from walk(child, branch)


def check_arguments(tree: Branch, x_T: Tensor, seeds: Sequence[int], steps: int, keep: Sequence[str]) -> None:
    """What `traverse_tree` raises before the first evaluation."""
    _check_tree(tree, len(x_T), steps)
    if len(seeds) != len(x_T):
        raise ValueError(f"seeds: expected {len(x_T)}, one a row of x_T, got {len(seeds)}")
    if unknown := set(keep) - set(KEEPABLE):
        raise ValueError(f"keep: expected some of {KEEPABLE}, got {sorted(unknown)}")
    if len(set(keep)) != len(keep):
        raise ValueError(f"keep: expected each quantity once, got {list(keep)}")


def _check_tree(tree: Branch, batch: int, steps: int) -> None:
    if tree.at != 0:
        raise ValueError(f"tree: expected the root {tree.name!r} at step 0, got {tree.at}")
    seen: set[str] = set()
    for branch, parent in walk(tree):
        if branch.name in seen:
            raise ValueError(f"tree: expected unique names, got {branch.name!r} twice")
        seen.add(branch.name)
        earliest = 0 if parent is None else parent.at
        if not earliest <= branch.at <= steps:
            raise ValueError(f"branch {branch.name!r}: expected to fork at step {earliest}..{steps}, got {branch.at}")
        context = branch.context
        if context.ndim != 3 or len(context) not in (1, batch):
            raise ValueError(
                f"branch {branch.name!r}: expected a context of (1 or {batch}, L, D), got {tuple(context.shape)}"
            )
        if (context.shape[1:], context.dtype) != (tree.context.shape[1:], tree.context.dtype):
            raise ValueError(
                f"branch {branch.name!r}: expected a context like the root's, {tuple(tree.context.shape[1:])} "
                f"{tree.context.dtype}, got {tuple(context.shape[1:])} {context.dtype}"
            )
