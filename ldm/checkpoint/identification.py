"""What a path holds, told from names and headers alone: parts, the names of their tensors, and what is left over."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ldm.checkpoint import layouts, settings
from ldm.checkpoint.container import CheckpointError, Header, LazyTensor, TensorFile, naming
from ldm.checkpoint.foreign import PICKLE_SUFFIXES, refuse_other_folders, refuse_other_formats, refuse_other_models
from ldm.checkpoint.layouts import FOLDERS, PARTS, SINGLE_PREFIXES

Layout = Literal["single", "folder", "part"]
WeightSet = Literal["ema", "plain"]

PART_NAMES = {"clip": "text encoder", "vae": "autoencoder", "unet": "U-Net", "unet_ema": "U-Net's moving average"}
WEIGHT_FILES = {"clip": "model.safetensors", "vae": "diffusion_pytorch_model.safetensors"}
WEIGHT_FILES["unet"] = WEIGHT_FILES["vae"]
NON_EMA_FILE = "diffusion_pytorch_model.non_ema.safetensors"
EXTRAS_FILE = "single_file_extras.safetensors"  # ours: what a single file holds and a folder has no place for

# Keys of the metadata in files of ours.
CONFIG_KEY = "ldm.config"
HEADER_KEY = "ldm.header."
VAE_NAMES_KEY = "ldm.vae_names"
BLOCKS_KEY = "ldm.unet_blocks"  # classes that are not the standard ones, by name

# A file that holds one network in our names, told by the names that it begins with.
_PART_MARKS = {
    "unet": ("down_blocks.", "mid_block.", "up_blocks.", "time_embedding."),
    "vae": ("encoder.down_blocks.", "decoder.up_blocks.", "encoder.mid_block.", "decoder.mid_block."),
    "clip": ("text_model.",),
}


@dataclass(frozen=True)
class Checkpoint:
    """One file or folder of weights, unread.

    parts: "clip", "vae", "unet", and "unet_ema" where both sets of the U-Net's weights are there ("unet" is then the
    plain one) -> our names -> tensors; names that are not SD1.5's are among them where they lie in a network's own
    file.
    extras: known tensors that are no network's.  unexpected: stored names that nothing explains.
    hidden: part -> settings that shapes do not show.  headers: "single" or a part -> the header of a file that was
    read, or that a conversion carried along.
    """

    path: Path
    layout: Layout
    files: tuple[TensorFile, ...]
    parts: Mapping[str, Mapping[str, LazyTensor]]
    extras: tuple[LazyTensor, ...] = ()
    unexpected: tuple[str, ...] = ()
    hidden: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    headers: Mapping[str, Header] = field(default_factory=dict)
    vae_names: Literal["new", "old"] = "new"

    @property
    def blocks(self) -> str:
        """The names of the classes that its U-Net has in place of the standard ones; empty where it has none."""
        return next((h.metadata[BLOCKS_KEY] for h in self.headers.values() if BLOCKS_KEY in h.metadata), "")

    @property
    def missing_parts(self) -> tuple[str, ...]:
        return tuple(part for part in PARTS if part not in self.parts)

    def describe(self) -> str:
        """What it is, in a few words."""
        kinds = {"single": "SD1.5 single file", "folder": "diffusers folder", "part": "diffusers-layout file"}
        kind = kinds[self.layout]
        if any(CONFIG_KEY in header.metadata for header in self.headers.values()):
            kind += " written by ldm"
        if self.layout == "folder" and "vae" in self.parts:
            kind += f" ({self.vae_names} autoencoder names)"
        if self.missing_parts:
            kind += ", only " + " and ".join(PART_NAMES[part] for part in PARTS if part in self.parts)
        return kind + (", with plain and EMA weights" if "unet_ema" in self.parts else "")

    def choose(self, ema: WeightSet | None) -> "Checkpoint":
        """The same with one set of U-Net weights; the tensors of the other become extras.

        Raises: CheckpointError when there are two sets and ema is None, or when the set asked for is not there.
        """
        if ema not in (None, "ema", "plain"):
            raise CheckpointError(f"ema: {ema!r}, expected 'ema', 'plain' or None")
        if "unet_ema" not in self.parts:
            if ema == "ema":
                raise CheckpointError(
                    f"{self.path}: has one set of U-Net weights, not marked as EMA or plain: leave ema (--ema) out"
                )
            return self
        if ema is None:
            raise CheckpointError(
                f"{self.path}: has the U-Net's trained weights and their moving average (EMA, which samples better): "
                "choose with ema='ema' or ema='plain' (--ema ema, --ema plain)"
            )
        dropped = self.parts["unet" if ema == "ema" else "unet_ema"]
        kept = self.parts["unet_ema" if ema == "ema" else "unet"]
        parts = {part: tensors for part, tensors in self.parts.items() if part != "unet_ema"}
        return replace(self, parts={**parts, "unet": kept}, extras=(*self.extras, *dropped.values()))

    def over(self, base: "Checkpoint") -> "Checkpoint":
        """This one's parts, and for those that it lacks the base's. Of the base's files only those of such parts.

        Raises: CheckpointError when this one lacks nothing: there is nothing that the base is for.
        """
        if not self.missing_parts:
            raise CheckpointError(f"{self.path}: a whole model; a base ({base.path}) is for a network alone")
        taken = [part for part in base.parts if part.removesuffix("_ema") in self.missing_parts]
        left = [tensor for part in base.parts if part not in taken for tensor in base.parts[part].values()]
        taken_keys = {tensor.key for part in taken for tensor in base.parts[part].values()}
        hidden_parts = {part: base.hidden[part] for part in taken if part in base.hidden}
        return replace(
            self,
            files=(*self.files, *(file for file in base.files if not taken_keys.isdisjoint(file.header.entries))),
            parts={**self.parts, **{part: base.parts[part] for part in taken}},
            extras=(*self.extras, *base.extras, *left),
            unexpected=self.unexpected + base.unexpected,
            hidden={**self.hidden, **hidden_parts},
        )

    def require_complete(self) -> None:
        """Raises CheckpointError, naming what is missing, unless all three networks are there."""
        if missing := self.missing_parts:
            here = " and ".join(PART_NAMES[part] for part in self.parts) or "no network"
            lacks = " and ".join(PART_NAMES[part] for part in missing)
            where = f" (no {', '.join(FOLDERS[part] + '/' for part in missing)})" if self.layout == "folder" else ""
            raise CheckpointError(
                f"{self.path}: holds {here}, but no {lacks}{where}: give a whole model to lay it over (base=.., --base)"
            )


def identify(path: str | Path) -> Checkpoint:
    """Tell what a file or folder holds, from its headers.

    Raises: CheckpointError, in one line that says what it is and what to do, when it is no SD1.5 model or part of one.
    """
    path = Path(path)
    if path.is_dir():
        return _identify_folder(path)
    file = _open(path)
    if any(name.startswith(tuple(SINGLE_PREFIXES.values())) for name in file.header.entries):
        return _identify_single(file)
    for part, marks in _PART_MARKS.items():
        if any(name.startswith(marks) for name in file.header.entries):
            return _from_part_files(path, "part", {part: file})
    first = next(iter(file.header.entries), "none")
    raise CheckpointError(f"{path}: none of its {len(file.header.entries)} tensors is SD1.5's (the first: {first})")


def _open(path: Path) -> TensorFile:
    refuse_other_formats(path)
    file = TensorFile(path)
    refuse_other_models(path, {name: tensor.shape for name, tensor in file.tensors().items()})
    return file


def _identify_single(file: TensorFile) -> Checkpoint:
    """Sort a single file's tensors into parts, extras and unexpected ones."""
    tensors, parts = file.tensors(), {}
    for part, prefix in SINGLE_PREFIXES.items():
        stored = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        renamed = layouts.from_single(part, stored)
        parts[part] = {ours: _as_ours(ours, stored[single]) for single, ours in renamed.items() if ours is not None}
    ema_keys = {name: layouts.ema_key(tensor.key) for name, tensor in parts["unet"].items()}
    parts["unet_ema"] = {name: tensors[key] for name, key in ema_keys.items() if key in tensors}
    placed = {tensor.key for part in parts.values() for tensor in part.values()}
    extras, unexpected = _sort_extras(tensor for name, tensor in tensors.items() if name not in placed)
    return Checkpoint(
        path=file.path,
        layout="single",
        files=(file,),
        parts={part: tensors for part, tensors in parts.items() if tensors},
        extras=extras,
        unexpected=unexpected,
        hidden=_hidden_from_metadata(file),
        headers={"single": file.header, **_carried_headers(file)},
        vae_names="old" if file.header.metadata.get(VAE_NAMES_KEY) == "old" else "new",
    )


def _sort_extras(tensors: Iterable[LazyTensor]) -> tuple[tuple[LazyTensor, ...], tuple[str, ...]]:
    """What no network holds: known tensors, and the names of those that nothing explains."""
    extras, unexpected = [], []
    for tensor in tensors:
        if layouts.UNNEEDED.fullmatch(tensor.key):
            extras.append(tensor)
        else:
            unexpected.append(tensor.key)
    return tuple(extras), tuple(unexpected)


def _as_ours(name: str, tensor: LazyTensor) -> LazyTensor:
    """The autoencoder's attention weights as matrices: (C, C, 1, 1) -> (C, C)."""
    if layouts.is_vae_attention_weight(name) and tensor.shape[2:] == (1, 1):
        return tensor.reshaped(tensor.shape[:2])
    return tensor


def _hidden_from_metadata(file: TensorFile) -> dict[str, dict[str, Any]]:
    with naming(file.path):
        return settings.hidden_from_metadata(file.header.metadata, CONFIG_KEY)


def _carried_headers(file: TensorFile) -> dict[str, Header]:
    """The headers of former files that a conversion put into this one's metadata."""
    metadata = file.header.metadata
    carried = {key.removeprefix(HEADER_KEY): text for key, text in metadata.items() if key.startswith(HEADER_KEY)}
    with naming(file.path):
        return {role: Header.parse(text.encode()) for role, text in carried.items()}


def _identify_folder(path: Path) -> Checkpoint:
    refuse_other_folders(path)
    present = sorted(entry.name for entry in path.iterdir())
    if not present:
        raise CheckpointError(f"{path}: an empty folder: fetch the model into it again")
    if WEIGHT_FILES["unet"] in present or "diffusion_pytorch_model.fp16.safetensors" in present:
        # The folder of one network: unet/ itself, for instance.
        return identify(path / _pick(path, WEIGHT_FILES["unet"]))
    if not any(FOLDERS[part] in present for part in PARTS):
        weights = [name for name in present if name.endswith(".safetensors")]
        advice = f"; give one of its files: {_some(weights)}" if weights else ""
        raise CheckpointError(
            f"{path}: none of unet/, vae/, text_encoder/ in this folder (it has {_some(present)}){advice}"
        )

    files = {}
    for part in PARTS:
        folder = path / FOLDERS[part]
        if folder.is_dir():
            name = _pick(folder, WEIGHT_FILES[part])
            files[part] = _open(folder / name)
    # Two published ways to keep both sets: a second file in unet/, or the training scripts' unet_ema/ beside it.
    if "unet" in files and (path / "unet" / NON_EMA_FILE).exists():
        files["unet"], files["unet_ema"] = _open(path / "unet" / NON_EMA_FILE), files["unet"]
    elif "unet" in files and (path / "unet_ema").is_dir():
        files["unet_ema"] = _open(path / "unet_ema" / _pick(path / "unet_ema", WEIGHT_FILES["unet"]))
    checkpoint = _from_part_files(path, "folder", files)
    if not (path / EXTRAS_FILE).exists():
        return checkpoint
    file = _open(path / EXTRAS_FILE)
    extras, unexpected = _sort_extras(file.tensors().values())
    return replace(
        checkpoint,
        files=(*checkpoint.files, file),
        extras=extras,
        unexpected=unexpected,
        headers={**checkpoint.headers, **_carried_headers(file)},
    )


def _pick(folder: Path, name: str) -> str:
    """The weights in one network's folder: full precision before the fp16 variant, never a pickle."""
    fp16_name = name.replace(".safetensors", ".fp16.safetensors")
    for candidate in (name, fp16_name):
        if (folder / candidate).exists():
            return candidate
    present = sorted(entry.name for entry in folder.iterdir())
    if pickles := [entry for entry in present if entry.endswith(PICKLE_SUFFIXES)]:
        raise CheckpointError(
            f"{folder}: only pickled weights ({_some(pickles)}), never read here since they can run code; get {name}"
        )
    raise CheckpointError(f"{folder}: no {name} and no {fp16_name} in it (it has {_some(present) or 'nothing'})")


def _some(names: Iterable[str], limit: int = 4) -> str:
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def _from_part_files(path: Path, layout: Layout, files: Mapping[str, TensorFile]) -> Checkpoint:
    """One file a network, in our names or, for the autoencoder, in those before diffusers 0.18."""
    parts, hidden = {}, {}
    to_new, has_old_names = dict(layouts.OLD_VAE_NAMES), False
    for part, file in files.items():
        tensors = file.tensors()
        if part == "vae":
            ours = {name: layouts.rename(name, to_new) or name for name in tensors}
            has_old_names = any(name != new for name, new in ours.items())
            tensors = {new: _as_ours(new, tensors[name]) for name, new in ours.items()}
        parts[part] = tensors
        if part in PARTS:
            from_json = settings.hidden_from_json(file.path.with_name("config.json"), part)
            hidden[part] = {**from_json, **_hidden_from_metadata(file).get(part, {})}
    return Checkpoint(
        path=path,
        layout=layout,
        files=tuple(files.values()),
        parts=parts,
        hidden=hidden,
        headers={part: file.header for part, file in files.items()},
        vae_names="old" if has_old_names else "new",
    )
