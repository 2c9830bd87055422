"""What a path holds, told from names and headers alone: parts, the names of their tensors, and what is left over."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from ldm.checkpoint import config_json, layouts, settings
from ldm.checkpoint.container import CheckpointError, Header, LazyTensor, TensorFile, naming
from ldm.checkpoint.dialects import sort_tensors
from ldm.checkpoint.folders import Files, networks_of, open_file, open_files, single_network, stored
from ldm.checkpoint.foreign import read_json, refuse_other_classes
from ldm.checkpoint.layouts import FOLDERS, PARTS
from ldm.checkpoint.quantised import FLOAT8
from ldm.checkpoint.scheduler_json import diffusion_of_file, read_scheduler
from ldm.checkpoint.vocabulary import Vocabulary, added_from_metadata, read_vocabulary, with_rows
from ldm.config import SD15_DIFFUSION, DiffusionConfig

Layout = Literal["single", "folder", "part"]
WeightSet = Literal["ema", "plain"]

PART_NAMES = {"clip": "text encoder", "vae": "autoencoder", "unet": "U-Net", "unet_ema": "U-Net's moving average"}
EXTRAS_FILE = "single_file_extras.safetensors"  # ours: what a single file holds and a folder has no place for

# Keys of the metadata in files of ours.
CONFIG_KEY = "ldm.config"
HEADER_KEY = "ldm.header."
VAE_NAMES_KEY = "ldm.vae_names"
WORDS_KEY = "ldm.added_words"
BLOCKS_KEY = "ldm.unet_blocks"  # classes that are not the standard ones, by name


@dataclass(frozen=True)
class Checkpoint:
    """One file or folder of weights, unread.

    parts: "clip", "vae", "unet", and "unet_ema" where both sets of the U-Net's weights are there ("unet" is then the
    plain one) -> our names -> tensors; names that are not SD1.5's are among them where they lie in a network's own
    file.
    extras: known tensors that are no network's.  unexpected: stored names that nothing explains.
    hidden: part -> settings that shapes do not show.  headers: "single" or a part -> the header of a file that was
    read, or that a conversion carried along.
    single_names: whether a network alone has CompVis names.  ema_only: whether the U-Net is a moving average without
    the trained weights.  scales: stored names of what quantised weights are multiplied with.
    config_files: part -> the config.json beside its weights.  vocabulary: of the text encoder.  diffusion: what the
    U-Net predicts, and its schedule.
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
    single_names: bool = False
    ema_only: bool = False
    scales: tuple[str, ...] = ()
    config_files: Mapping[str, Path] = field(default_factory=dict)
    vocabulary: Vocabulary = field(default_factory=Vocabulary)
    diffusion: DiffusionConfig = SD15_DIFFUSION

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
        if self.layout == "part" and self.single_names:
            kind = "CompVis-layout file"
        if any(CONFIG_KEY in header.metadata for header in self.headers.values()):
            kind += " written by ldm"
        if self.layout == "folder" and "vae" in self.parts:
            kind += f" ({self.vae_names} autoencoder names)"
        if self.missing_parts:
            kind += ", only " + " and ".join(PART_NAMES[part] for part in PARTS if part in self.parts)
        return kind + (", with plain and EMA weights" if "unet_ema" in self.parts else "") + self._manner()

    def _manner(self) -> str:
        """What else its weights are."""
        in_float8 = any(dtype in FLOAT8 for file in self.files for dtype, *_ in file.header.entries.values())
        scaled = "with scales, read as float32" if self.scales else "read as float16"
        predicts = f", predicts {self.diffusion.prediction}" if self.diffusion.prediction != "eps" else ""
        ema = ", EMA weights only" if self.ema_only else ""
        return ema + (f", in float8 {scaled}" if in_float8 else "") + predicts

    def choose(self, ema: WeightSet | None) -> "Checkpoint":
        """The same with one set of U-Net weights; the tensors of the other become extras.

        Raises: CheckpointError when there are two sets and ema is None, or when the set asked for is not there.
        """
        if ema not in (None, "ema", "plain"):
            raise CheckpointError(f"ema: {ema!r}, expected 'ema', 'plain' or None")
        if "unet_ema" not in self.parts:
            if ema == "ema" and not self.ema_only:
                raise CheckpointError(
                    f"{self.path}: has one set of U-Net weights, not marked as EMA or plain: leave ema (--ema) out"
                )
            if ema == "plain" and self.ema_only:
                raise CheckpointError(f"{self.path}: has the U-Net's moving average only: leave ema (--ema) out")
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
            config_files={
                **{part: file for part, file in base.config_files.items() if part in taken},
                **self.config_files,
            },
            vocabulary=base.vocabulary if "clip" in taken else self.vocabulary,
            diffusion=base.diffusion if "unet" in taken else self.diffusion,
            scales=self.scales + base.scales,
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
        network = single_network(path)
        return _identify_folder(path) if network is None else identify(network)
    return _identify_file(path)


def _identify_file(path: Path) -> Checkpoint:
    """One file, or the shards of one: a whole model, or networks alone."""
    files = open_files(path)
    with naming(path):
        found = sort_tensors(stored(files))
        hidden = settings.hidden_from_metadata(files[0].header.metadata, CONFIG_KEY)
    if not found.parts:
        names = [name for file in files for name in file.header.entries]
        raise CheckpointError(f"{path}: none of its {len(names)} tensors is SD1.5's (the first: {(*names, 'none')[0]})")
    part = next(iter(found.parts))
    config_file = path.with_name("config.json")
    extras, unexpected = _sort_extras(found.rest)
    checkpoint = Checkpoint(
        path=path,
        layout="single" if found.several else "part",
        files=files,
        parts=found.parts,
        extras=extras,
        unexpected=unexpected,
        hidden=hidden,
        headers=_headers("single" if found.several else part, files),
        vae_names="old" if found.old_vae_names or files[0].header.metadata.get(VAE_NAMES_KEY) == "old" else "new",
        single_names=found.single_names,
        ema_only=found.ema_only,
        scales=found.scales,
        vocabulary=_vocabulary(_tokenizer_beside(path), files) if "clip" in found.parts else Vocabulary(),
        diffusion=_diffusion(path.parent.parent if path.parent.name == FOLDERS["unet"] else None, files),
    )
    return checkpoint if found.several else _with_config_json(checkpoint, part, config_file)


def _identify_folder(path: Path) -> Checkpoint:
    """A folder with a folder for each network."""
    files = networks_of(path)
    found = {}
    for part, part_files in files.items():
        with naming(part_files[0].path):
            network = part.removesuffix("_ema")
            found[part] = sort_tensors(stored(part_files), network)
    extras, unexpected = _sort_extras({name: t for one in found.values() for name, t in one.rest.items()})
    checkpoint = Checkpoint(
        path=path,
        layout="folder",
        extras=extras,
        unexpected=unexpected,
        files=tuple(file for part_files in files.values() for file in part_files),
        parts={part: one.parts.get(part.removesuffix("_ema"), {}) for part, one in found.items()},
        hidden={
            part: _hidden_from_metadata(part_files[0]).get(part, {})
            for part, part_files in files.items()
            if part in PARTS
        },
        headers={part: header for part in files for header in _headers(part, files[part]).values()},
        vae_names="old" if "vae" in found and found["vae"].old_vae_names else "new",
        single_names=any(one.single_names for one in found.values()),
        scales=tuple(scale for one in found.values() for scale in one.scales),
        vocabulary=_vocabulary(path / "tokenizer", files["clip"]) if "clip" in files else Vocabulary(),
        diffusion=_diffusion(path, files.get("unet", ())),
    )
    for part in PARTS:
        if part in files:
            checkpoint = _with_config_json(checkpoint, part, path / FOLDERS[part] / "config.json")
    if not (path / EXTRAS_FILE).exists():
        return checkpoint
    file = open_file(path / EXTRAS_FILE)
    extras, unexpected = _sort_extras(file.tensors())
    return replace(
        checkpoint,
        files=(*checkpoint.files, file),
        extras=(*checkpoint.extras, *extras),
        unexpected=checkpoint.unexpected + unexpected,
        headers={**checkpoint.headers, **_carried_headers(file)},
    )


def _tokenizer_beside(file: Path) -> Path | None:
    """The folder of the tokenizer of a file within a folder of networks."""
    return file.parent.parent / "tokenizer" if file.parent.name == FOLDERS["clip"] else None


def _vocabulary(folder: Path | None, files: Files) -> Vocabulary:
    """The words of a text encoder: its tokenizer's, or those that our metadata tell."""
    with naming(files[0].path):
        told = added_from_metadata(files[0].header.metadata, WORDS_KEY)
    if folder is None or not folder.is_dir():
        return Vocabulary(added=told)
    words = read_vocabulary(folder)
    return replace(words, added=with_rows(words.added, told))


def _diffusion(folder: Path | None, files: Files) -> DiffusionConfig:
    """What a U-Net predicts: as the scheduler's settings in its folder tell, or its file."""
    told = read_scheduler(folder / "scheduler" / "scheduler_config.json") if folder else None
    if told is not None or not files:
        return told or SD15_DIFFUSION
    with naming(files[0].path):
        return diffusion_of_file(files[0].header.metadata, (name for file in files for name in file.header.entries))


def _with_config_json(checkpoint: Checkpoint, part: str, path: Path) -> Checkpoint:
    """With what a config.json beside a network's weights tells; a checkpoint without one stays as it is."""
    if not path.exists():
        return checkpoint
    refuse_other_classes(path, read_json(path))
    from_json = config_json.settings_in(path, part)
    from_metadata = checkpoint.hidden.get(part, {})
    config_json.require_one_meaning(path, from_json, from_metadata)
    return replace(
        checkpoint,
        hidden={**checkpoint.hidden, part: {**from_json, **from_metadata}},
        config_files={**checkpoint.config_files, part: path},
    )


def _sort_extras(tensors: Mapping[str, LazyTensor]) -> tuple[tuple[LazyTensor, ...], tuple[str, ...]]:
    """What no network holds: known tensors, under their names without wrappers; and names that nothing explains."""
    known = [replace(tensor, key=name) for name, tensor in tensors.items() if layouts.UNNEEDED.fullmatch(name)]
    return tuple(known), tuple(t.key for name, t in tensors.items() if not layouts.UNNEEDED.fullmatch(name))


def _hidden_from_metadata(file: TensorFile) -> dict[str, dict[str, Any]]:
    with naming(file.path):
        return settings.hidden_from_metadata(file.header.metadata, CONFIG_KEY)


def _headers(role: str, files: Files) -> dict[str, Header]:
    """The header of one file, and those that it carries; none of shards, which are written back as one file."""
    return {role: files[0].header, **_carried_headers(files[0])} if len(files) == 1 else {}


def _carried_headers(file: TensorFile) -> dict[str, Header]:
    """The headers of former files that a conversion put into this one's metadata."""
    metadata = file.header.metadata
    carried = {key.removeprefix(HEADER_KEY): text for key, text in metadata.items() if key.startswith(HEADER_KEY)}
    with naming(file.path):
        return {role: Header.parse(text.encode()) for role, text in carried.items()}
