"""A folder of networks as diffusers and transformers write it: which files hold which network's weights.

A network's weights are one file, of which there may be variants (`model.fp16.safetensors`), or shards with an index.
"""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from ldm.checkpoint.container import CheckpointError, LazyTensor, TensorFile
from ldm.checkpoint.foreign import (
    PICKLE_SUFFIXES,
    read_json,
    refuse_other_classes,
    refuse_other_folders,
    refuse_other_formats,
    refuse_other_models,
)
from ldm.checkpoint.layouts import FOLDERS, PARTS

WEIGHT_FILES = {"clip": "model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}
WEIGHT_FILES["unet"] = WEIGHT_FILES["vae"]
NON_EMA_FILE = "diffusion_pytorch_model.non_ema.safetensors"
INDEX_SUFFIX = ".safetensors.index.json"

Files = tuple[TensorFile, ...]  # one, or the shards of one


def open_files(path: Path) -> Files:
    """The file, or the shards that an index names.

    Raises: CheckpointError when it is no safetensors file, of another model, or shards and index do not go together.
    """
    files = open_shards(path) if path.name.endswith(INDEX_SUFFIX) else (open_file(path),)
    refuse_other_models(path, {name: tensor.shape for name, tensor in stored(files).items()})
    return files


def open_file(path: Path) -> TensorFile:
    """One file, whatever model's. Raises CheckpointError when it is no safetensors file."""
    refuse_other_formats(path)
    return TensorFile(path)


def stored(files: Files) -> dict[str, LazyTensor]:
    """All tensors of some files, unread. Raises CheckpointError when two hold the same."""
    tensors: dict[str, LazyTensor] = {}
    for file in files:
        if twice := tensors.keys() & file.header.entries.keys():
            raise CheckpointError(f"{file.path}: holds {min(twice)}, as another shard does: fetch them again")
        tensors |= file.tensors()
    return tensors


def open_shards(index: Path) -> Files:
    """The shards of one network: index.json maps each tensor's name to its file."""
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(name, str) for name in places.values()):
        raise CheckpointError(f"{index}: no weight_map in it, expected names of tensors and of their files")
    names = sorted(set(places.values()))
    if outside := [name for name in names if Path(name).name != name]:
        raise CheckpointError(f"{index}: names {outside[0]}, expected files of its own folder")
    if missing := [name for name in names if not (index.parent / name).exists()]:
        raise CheckpointError(f"{index}: {len(missing)} of {len(names)} shards are not there ({some(missing)})")
    files = tuple(open_file(index.parent / name) for name in names)
    held = {name: file.path.name for file in files for name in file.header.entries}
    if wrong := [name for name, place in places.items() if held.get(name) != place]:
        raise CheckpointError(f"{index}: says that {wrong[0]} lies in {places[wrong[0]]}, and it does not: fetch again")
    return files


def weights_in(folder: Path, name: str) -> Path:
    """A network's weights: full precision, then fp16, bf16, other variants; a file before shards; never a pickle."""
    stem = name.removesuffix(".safetensors")
    present = sorted(entry.name for entry in folder.iterdir())
    for end in (".safetensors", INDEX_SUFFIX):
        variants = [entry for entry in present if re.fullmatch(rf"{re.escape(stem)}(\.[\w-]+)?{re.escape(end)}", entry)]
        variants = [entry for entry in variants if not re.search(r"-\d{5}-of-\d{5}", entry)]
        for variant in ("", ".fp16", ".bf16", ".non_ema"):
            if f"{stem}{variant}{end}" in variants:
                return folder / f"{stem}{variant}{end}"
        if len(variants) == 1:
            return folder / variants[0]
        if variants:
            raise CheckpointError(f"{folder}: which of {some(variants)}? Keep one of them, or name it {name}")
    if pickles := [entry for entry in present if entry.endswith(PICKLE_SUFFIXES)]:
        raise CheckpointError(
            f"{folder}: only pickled weights ({some(pickles)}), never read here since they can run code; get {name}"
        )
    raise CheckpointError(f"{folder}: no {name} and no variant of it (it has {some(present) or 'nothing'})")


def single_network(path: Path) -> Path | None:
    """The weights in the folder of one network, unet/ itself for instance; None where it is a folder of folders."""
    refuse_other_folders(path)
    refuse_other_classes(path, read_json(path / "config.json"))
    present = [entry.name for entry in path.iterdir()]
    if not present:
        raise CheckpointError(f"{path}: an empty folder: fetch the model into it again")
    if any(FOLDERS[part] in present for part in PARTS):
        return None
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        stem = name.removesuffix(".safetensors")
        if any(entry.startswith(stem) and entry.endswith((".safetensors", INDEX_SUFFIX)) for entry in present):
            return weights_in(path, name)
    weights = [name for name in sorted(present) if name.endswith(".safetensors")]
    advice = f"; give one of its files: {some(weights)}" if weights else ""
    raise CheckpointError(
        f"{path}: none of unet/, vae/, text_encoder/ in this folder (it has {some(sorted(present))}){advice}"
    )


def networks_of(path: Path) -> Mapping[str, Files]:
    """ "clip", "vae", "unet", and "unet_ema" where both sets of the U-Net's weights are there -> files."""
    files: dict[str, Files] = {}
    for part in PARTS:
        folder = path / FOLDERS[part]
        if folder.is_dir():
            refuse_other_classes(folder, read_json(folder / "config.json"))
            files[part] = open_files(weights_in(folder, WEIGHT_FILES[part]))
    # Two published ways to keep both sets: a second file in unet/, or the training scripts' unet_ema/ beside it.
    if "unet" in files and files["unet"][0].path.name != NON_EMA_FILE and (path / "unet" / NON_EMA_FILE).exists():
        files["unet"], files["unet_ema"] = open_files(path / "unet" / NON_EMA_FILE), files["unet"]
    elif "unet" in files and (path / "unet_ema").is_dir():
        files["unet_ema"] = open_files(weights_in(path / "unet_ema", WEIGHT_FILES["unet"]))
    return files


def some(names: Iterable[str], limit: int = 4) -> str:
    """The first few names, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
