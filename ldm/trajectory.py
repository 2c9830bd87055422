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

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.conditioning import EmbeddingSchedule, Indexing, constant, neutral_steps
from ldm.samplers import EpsFn, Noise, ddim
from ldm.schedule import Schedule

log = logging.getLogger(__name__)

KEEPABLE = ("x_t", "x0_pred", "eps")  # the tensors of a sampler's Step


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


def unet_rows(tree: Branch, steps: int) -> int:
    """Network evaluations one seed costs: each branch pays for its own steps only.

    Guidance doubles them (its unconditional half); running the branches separately would cost `steps` for each.
    """
    return sum(steps - branch.at for branch, _ in _walk(tree))


@dataclass(frozen=True, eq=False)
class TreeResult:
    """What a traversal found, by branch name."""

    x_T: Tensor  # (B, C, H, W)
    latents: dict[str, Tensor]  # final latents (B, C, H, W)
    unet_rows: int  # latents that went through the network, all seeds and steps, guidance's second half not counted
    unet_rows_separate: int  # the same had every branch been run alone from x_T
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
        branch, parent = next(pair for pair in _walk(self.tree) if pair[0].name == name)
        return own if parent is None else torch.cat([self.path(parent.name, quantity)[: branch.at], own])


@torch.no_grad()
def traverse_tree(
    guide: Callable[[EmbeddingSchedule], EpsFn],
    x_T: Tensor,
    tree: Branch,
    schedule: Schedule,
    steps: int = 50,
    *,
    eta: float = 0.0,
    noise: Noise | None = None,
    keep: Sequence[str] = (),
    progress: Callable[[int], object] | None = None,
) -> TreeResult:
    """Denoise every branch of a prompt tree for every seed, sharing each step before a fork.

    A branch is the ddim run under the swapped embedding schedule, step for step. How closely the two
    agree in floating point is up to `guide`, since a matrix product rounds a row by the size of the
    batch that it is in, and even by its place there. With `max_batch` (see `ldm.guidance.guided`)
    - None, or any number: to the last bits of float32, some 1e-7 after 10 steps at guidance 1;
    - B: every branch makes the very calls that it would make alone, so bit for bit: a neutral -> neutral
      swap is then the neutral path;
    - 1: so does every seed, and no result depends on anything else in the batch.

        guide = partial(guided, sd.unet, guidance_scale=7.5, uncond=empty, max_batch=16)
        result = traverse_tree(guide, initial_noise(seeds, (4, 64, 64)), tree, sd.schedule)

    Args:    guide: turns an embedding schedule over n B rows (n live branches, seeds within a branch) into an eps_fn.
             What it adds must fit any number of rows: an uncond of (1, L, D), not of (B, L, D).
             x_T: (B, C, H, W) standard normal, one row a seed.  tree: the root branch.  steps: S.
             eta, noise: see `ldm.samplers.ddim`; all branches of a seed get the same noise.
             keep: quantities to keep from every step, out of `KEEPABLE`.
             progress: called after each step with the number of rows done; they add up to B unet_rows(tree, S).
    Returns: final latents and kept quantities, in dtype and on device of x_T.
    Raises:  ValueError: a tree that cannot be run (names, fork steps, context shapes), before the first evaluation.
    """
    _check_tree(tree, len(x_T), steps)
    if unknown := set(keep) - set(KEEPABLE):
        raise ValueError(f"keep: expected some of {KEEPABLE}, got {sorted(unknown)}")
    if len(set(keep)) != len(keep):
        raise ValueError(f"keep: expected each quantity once, got {list(keep)}")

    branches = list(_walk(tree))
    contexts = {branch.name: branch.context.expand(len(x_T), -1, -1) for branch, _ in branches}
    latents: dict[str, Tensor] = {}
    kept: dict[str, dict[str, list[Tensor]]] = {quantity: {name: [] for name in contexts} for quantity in keep}

    forks = sorted({branch.at for branch, _ in branches})
    for start, stop in pairwise([*forks, steps]):
        for branch, parent in branches:
            if branch.at == start:
                latents[branch.name] = x_T if parent is None else latents[parent.name]

        # The segment: all live branches of all seeds as one batch, until the next fork.
        live = list(latents)
        batch = torch.cat([latents[name] for name in live])
        eps_fn = guide(constant(torch.cat([contexts[name] for name in live]), steps))
        for step in ddim(eps_fn, batch, schedule, steps, eta=eta, start=start, noise=_repeated(noise, len(live))):
            batch = step.x_t
            for quantity in keep:
                for name, rows in zip(live, getattr(step, quantity).split(len(x_T)), strict=True):
                    kept[quantity][name].append(rows)
            if progress is not None:
                progress(len(batch))
            if step.index + 1 == stop:
                break
        latents = dict(zip(live, batch.split(len(x_T)), strict=True))

    empty = x_T.new_empty(0, *x_T.shape)  # of a branch that forks after the last step
    return TreeResult(
        x_T=x_T,
        latents={branch.name: latents[branch.name] for branch, _ in branches},
        unet_rows=len(x_T) * unet_rows(tree, steps),
        unet_rows_separate=len(x_T) * len(branches) * steps,
        kept={q: {n: torch.stack(rows) if rows else empty for n, rows in of.items()} for q, of in kept.items()},
        tree=tree,
    )


def _walk(branch: Branch, parent: Branch | None = None) -> Iterator[tuple[Branch, Branch | None]]:
    """Every branch with its parent, parents first."""
    yield branch, parent
    for child in branch.children:
        yield from _walk(child, branch)


def _repeated(noise: Noise | None, times: int) -> Noise | None:
    """The seeds' noise once for every live branch."""
    return None if noise is None else lambda step: torch.cat([noise(step)] * times)


def _check_tree(tree: Branch, batch: int, steps: int) -> None:
    if tree.at != 0:
        raise ValueError(f"tree: expected the root {tree.name!r} at step 0, got {tree.at}")
    seen: set[str] = set()
    for branch, parent in _walk(tree):
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


# ---- on disk: many seeds, one file, and runs that can be interrupted --------------------------------


@dataclass(frozen=True, eq=False)
class SavedLatents:
    """The content of a latents.safetensors."""

    seeds: list[int]  # ascending
    latents: dict[str, Tensor]  # name -> (len(seeds), ...): what `run_seeds` was given
    settings: dict[str, Any]  # what they were computed with


def run_seeds(
    compute: Callable[[list[int]], Mapping[str, Tensor]],
    seeds: Sequence[int],
    folder: Path,
    settings: Mapping[str, Any],
    at_once: int = 1,
) -> Path:
    """Compute latents for many seeds into one file, resuming where an earlier call was cut off.

    Every finished seed is written at once to folder/partial/seed0000.safetensors; at the end all of
    them become folder/latents.safetensors, with keys "seed0000/<name>". Files appear under their
    name only when complete. Seeds found in either place are not computed again, unless their file in
    partial/ is damaged.

    Args:    compute: seeds -> {name: (number of seeds, ...)}; a `TreeResult.latents` and whatever else is wanted.
             seeds: which; earlier seeds in the folder stay.  settings: everything the latents depend on, as JSON
             values; kept in the files.  at_once: seeds given to one `compute` call.
    Returns: the path of latents.safetensors.
    Raises:  ValueError: the folder holds latents of other settings, latents.safetensors is damaged, or compute
             returned a wrong number of rows.
    """
    merged, partial = folder / "latents.safetensors", folder / "partial"
    _delete_damaged(partial)
    done: set[int] = set()
    for path in [merged, *sorted(partial.glob("seed*.safetensors"))]:
        if path.exists():
            keys, found = _read_header(path)
            _check_settings(path, found, _as_json(settings))
            done |= {_seed_of(key) for key in keys}

    partial.mkdir(parents=True, exist_ok=True)
    pending = [seed for seed in dict.fromkeys(seeds) if seed not in done]
    for first in range(0, len(pending), at_once):
        group = pending[first : first + at_once]
        computed = compute(group)
        for name, rows in computed.items():
            if len(rows) != len(group):
                raise ValueError(f"compute: expected {len(group)} rows of {name!r}, one a seed, got {len(rows)}")
        for row, seed in enumerate(group):
            tensors = {f"seed{seed:04d}/{name}": rows[row] for name, rows in computed.items()}
            _write(partial / f"seed{seed:04d}.safetensors", tensors, settings)

    parts = sorted(partial.glob("seed*.safetensors"))
    if parts:
        everything: dict[str, Tensor] = {}
        for path in [merged, *parts]:
            everything |= _read(path) if path.exists() else {}
        _write(merged, everything, settings)
    for path in sorted(partial.glob("seed*.safetensors*")):  # and what a write that was cut off has left
        path.unlink()
    if not any(partial.iterdir()):  # other files are not ours to delete
        partial.rmdir()
    return merged


def _delete_damaged(partial: Path) -> None:
    for path in sorted(partial.glob("seed*.safetensors")):
        try:
            _read_header(path)
        except _DamagedFile:
            log.warning("%s: damaged, its seed is computed again", path)
            path.unlink()


def load_latents(path: Path) -> SavedLatents:
    """Read what `run_seeds` wrote.

    Raises: ValueError: the file is damaged, lacks the settings, or its seeds do not hold the same names.
    """
    _, settings = _read_header(path)
    by_seed: dict[int, dict[str, Tensor]] = {}
    for seed, name, tensor in iterate_latents(path):
        by_seed.setdefault(seed, {})[name] = tensor
    seeds = sorted(by_seed)
    names = list(by_seed[seeds[0]])
    for seed in seeds:
        if set(by_seed[seed]) != set(names):
            raise ValueError(f"{path}: expected {sorted(names)} of every seed, seed {seed} has {sorted(by_seed[seed])}")
    return SavedLatents(seeds, {name: torch.stack([by_seed[seed][name] for seed in seeds]) for name in names}, settings)


def iterate_latents(path: Path) -> Iterator[tuple[int, str, Tensor]]:
    """Every (seed, name, tensor) that `run_seeds` wrote, by seed, then by name: one tensor in memory at a time.

    Raises: ValueError: the file is damaged or lacks the settings. As with every generator, on the first `next`.
    """
    keys, _ = _read_header(path)
    with _opened(path) as file:
        for key in sorted(keys, key=lambda key: (_seed_of(key), key)):
            yield _seed_of(key), key.partition("/")[2], file.get_tensor(key)


def _seed_of(key: str) -> int:
    return int(key.partition("/")[0].removeprefix("seed"))


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they will read after a round trip: tuples become lists."""
    return json.loads(json.dumps(dict(settings)))


def _write(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    # Clones, because rows of one batch share memory and safetensors stores every tensor by itself.
    owned = {key: tensor.detach().cpu().clone() for key, tensor in tensors.items()}
    temporary = path.with_name(path.name + ".partial")
    save_file(owned, temporary, metadata={"settings": json.dumps(dict(settings), sort_keys=True)})
    temporary.replace(path)


class _DamagedFile(ValueError):
    """A latents file that was cut short or overwritten."""


@contextmanager
def _opened(path: Path) -> Iterator[safe_open]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, json.JSONDecodeError) as error:
        raise _DamagedFile(f"{path}: damaged ({error}); delete it to have its seeds computed again") from error


def _read(path: Path) -> dict[str, Tensor]:
    with _opened(path) as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)


def _read_header(path: Path) -> tuple[list[str], dict[str, Any]]:
    with _opened(path) as file:
        metadata = file.metadata() or {}
        if "settings" not in metadata:
            raise ValueError(f"{path}: expected latents written by a traversal, found no settings in the header")
        return list(file.keys()), json.loads(metadata["settings"])


def _check_settings(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    absent = "(absent)"
    differing = [key for key in sorted({*found, *wanted}) if found.get(key, absent) != wanted.get(key, absent)]
    if differing:
        changes = ", ".join(f"{key} was {found.get(key, absent)}, is {wanted.get(key, absent)}" for key in differing)
        raise ValueError(f"settings: {path} was computed with others ({changes}); expected the same, or another folder")
