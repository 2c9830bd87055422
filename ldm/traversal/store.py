"""Latents of many seeds in one file, and runs that can be cut off and continued.

OUT/partial/seed0000.safetensors      while running: every finished seed at once
OUT/latents.safetensors               at the end: all of them, keys "seed0000/<name>", settings in the header
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm.files import complete

log = logging.getLogger(__name__)


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
    merged, partial = folder / "latents.safetensors", SeedFolder(folder / "partial", settings)
    done = partial.seeds()
    if merged.exists():
        keys, stored = _read_header(merged)
        _check_settings(merged, stored, _as_json(settings))
        done |= {_seed_of(key) for key in keys}

    pending = [seed for seed in dict.fromkeys(seeds) if seed not in done]
    for first in range(0, len(pending), at_once):
        group = pending[first : first + at_once]
        computed = compute(group)
        for name, rows in computed.items():
            if len(rows) != len(group):
                raise ValueError(f"compute: expected {len(group)} rows of {name!r}, one a seed, got {len(rows)}")
        for row, seed in enumerate(group):
            partial.write(seed, {name: rows[row] for name, rows in computed.items()})

    if parts := partial.files():
        everything: dict[str, Tensor] = {}
        for path in [merged, *parts]:
            everything |= _read(path) if path.exists() else {}
        _write(merged, everything, settings)
    partial.remove()
    return merged


class SeedFolder:
    """One file a seed, seed0000.safetensors, each with its settings in the header.

    A file appears under its name only when complete, so a folder is continued by computing the seeds that it lacks, by
    as many processes as there are: whoever computed a seed, the file is the same.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        """Opens a folder, making it where it is missing; damaged files in it are deleted, with a warning.

        Args:    settings: everything that the tensors depend on, as JSON values.
        Raises:  ValueError: the folder holds seeds of other settings.
        """
        self.folder, self.settings = folder, dict(settings)
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.files():
            try:
                _, stored = _read_header(path)
            except _DamagedFile:
                log.warning("%s: damaged, its seed is computed again", path)
                path.unlink(missing_ok=True)  # another process may have found it too
                continue
            _check_settings(path, stored, _as_json(settings))

    def files(self) -> list[Path]:
        """Those of finished seeds."""
        return sorted(self.folder.glob("seed*.safetensors"))

    def seeds(self) -> set[int]:
        """The finished seeds."""
        return {_seed_of(path.stem) for path in self.files()}

    def write(self, seed: int, tensors: Mapping[str, Tensor]) -> None:
        """Keep one seed's tensors."""
        keyed = {f"seed{seed:04d}/{name}": tensor for name, tensor in tensors.items()}
        _write(self.folder / f"seed{seed:04d}.safetensors", keyed, self.settings)

    def read(self, seed: int, names: Sequence[str] | None = None) -> dict[str, Tensor]:
        """One seed's tensors: all of them, or some. Raises ValueError where the file is damaged or lacks a name."""
        prefix = f"seed{seed:04d}/"
        with _opened(self.folder / f"seed{seed:04d}.safetensors") as file:
            wanted = [key.removeprefix(prefix) for key in file.keys()] if names is None else names  # noqa: SIM118
            return {name: file.get_tensor(prefix + name) for name in wanted}

    def names(self, seed: int, but: str) -> list[str]:
        """The names of one seed's tensors, but for those that begin so."""
        with _opened(self.folder / f"seed{seed:04d}.safetensors") as file:
            names = [key.removeprefix(f"seed{seed:04d}/") for key in file.keys()]  # noqa: SIM118  (not a dict)
        return [name for name in names if not name.startswith(but)]

    def remove(self) -> None:
        """Delete the seeds, and the folder unless it holds other files: those are not ours to delete."""
        for path in self.folder.glob("seed*.safetensors*"):  # and what a write that was cut off has left
            path.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()


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


def check_seeds(path: Path, seeds: Iterable[int]) -> None:
    """ValueError, naming the first, where what `run_seeds` wrote lacks one of these seeds."""
    keys, _ = _read_header(path)
    held = {_seed_of(key) for key in keys}
    for seed in seeds:
        if seed not in held:
            raise ValueError(f"seed: {path} has no seed {seed}; it has {sorted(held)}")


def load_seed(path: Path, seed: int) -> dict[str, Tensor]:
    """One seed's tensors out of what `run_seeds` wrote. Raises ValueError: damaged, or no such seed."""
    keys, _ = _read_header(path)
    check_seeds(path, [seed])
    with _opened(path) as file:
        return {key.partition("/")[2]: file.get_tensor(key) for key in keys if _seed_of(key) == seed}


def _seed_of(key: str) -> int:
    return int(key.partition("/")[0].removeprefix("seed"))


def _as_json(settings: Mapping[str, Any]) -> dict[str, Any]:
    """As they will read after a round trip: tuples become lists."""
    return json.loads(json.dumps(dict(settings)))


def _write(path: Path, tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> None:
    # Clones, because rows of one batch share memory and safetensors stores every tensor by itself.
    owned = {key: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for key, tensor in tensors.items()}
    with complete(path) as partial:
        save_file(owned, partial, metadata={"settings": json.dumps(dict(settings), sort_keys=True)})


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


def _check_settings(path: Path, stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    absent = "(absent)"
    differing = [key for key in sorted({*stored, *wanted}) if stored.get(key, absent) != wanted.get(key, absent)]
    if differing:
        changes = ", ".join(f"{key} was {stored.get(key, absent)}, is {wanted.get(key, absent)}" for key in differing)
        raise ValueError(f"settings: {path} was computed with others ({changes}); expected the same, or another folder")
