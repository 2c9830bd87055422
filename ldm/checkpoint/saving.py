"""From networks, or from another file, to a file or folder that other programs read too.

A conversion there and back gives the same bytes. Three things make it so: tensors that the folder layout has no place
for go into a file of their own; a header that this writer would not have written itself (another order of tensors,
other metadata, as in the published single file) travels along as text; dtypes change only when asked to.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from ldm.checkpoint import config_json, layouts, scheduler_json, settings
from ldm.checkpoint.adapters import adapted
from ldm.checkpoint.container import CheckpointError, Header, LazyTensor, write_tensors
from ldm.checkpoint.folders import NON_EMA_FILE, WEIGHT_FILES
from ldm.checkpoint.identification import (
    BLOCKS_KEY,
    CONFIG_KEY,
    EXTRAS_FILE,
    HEADER_KEY,
    VAE_NAMES_KEY,
    WORDS_KEY,
    Checkpoint,
    WeightSet,
    identify,
)
from ldm.checkpoint.layouts import FOLDERS, PARTS
from ldm.checkpoint.loading import examine
from ldm.checkpoint.quantised import FLOAT8
from ldm.checkpoint.report import require_fit
from ldm.checkpoint.settings import PartConfig
from ldm.checkpoint.vocabulary import Vocabulary, added_to_metadata, write_vocabulary
from ldm.config import SD15_DIFFUSION, DiffusionConfig
from ldm.unet import STANDARD_BLOCKS

Tensors = Mapping[str, LazyTensor]
VaeNames = Literal["new", "old"]
CLIP_PIECES = {("!", 0), ("a</w>", 320), ("<|startoftext|>", 49406), ("<|endoftext|>", 49407)}  # some of CLIP's
PLAIN_METADATA = {"format": "pt"}  # what every published file has: the tensors come from PyTorch


@dataclass(frozen=True)
class Content:
    """What is written, whatever the layout.

    parts: "clip", "vae", "unet", "unet_ema", or some of them -> our names -> tensors.  extras: a single file's other
    tensors.  headers: "single" or a part -> the header that its file had, for files that were there before.
    metadata: the user's own, text -> text.  always_tell_config: also where it shows in the shapes.
    words: added to the text encoder's vocabulary -> their ids.  diffusion: what the U-Net predicts, and its schedule.
    """

    parts: Mapping[str, Tensors]
    configs: Mapping[str, PartConfig]
    extras: tuple[LazyTensor, ...] = ()
    headers: Mapping[str, Header] = field(default_factory=dict)
    vae_names: VaeNames = "new"
    metadata: Mapping[str, str] = field(default_factory=dict)
    always_tell_config: bool = False
    words: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    diffusion: DiffusionConfig = SD15_DIFFUSION


def save(
    path: str | Path,
    parts: Mapping[str, nn.Module],
    *,
    layout: Literal["single", "folder"] = "single",
    dtype: torch.dtype | None = None,
    vae_names: VaeNames = "new",
    metadata: Mapping[str, str] | None = None,
    diffusion: DiffusionConfig = SD15_DIFFUSION,
    overwrite: bool = False,
) -> list[Path]:
    """Write networks as a checkpoint that `load_parts` and other programs read.

    Args:    path: the file, or the folder.  parts: "clip", "vae", "unet", or some of them -> network; "unet_ema" too,
             when "unet" is the plain one of two sets.
             dtype: what floating-point weights are stored in; None keeps each as it is.
             vae_names: "old" for programs that read folders as they were before diffusers 0.18.
             metadata: text -> text, put into each file's header.  diffusion: what the U-Net predicts, its schedule.
             overwrite: replace what is there.
    Returns: the files written, each under a temporary name first.
    Raises:  CheckpointError: when the path is taken, or a part is none of the four.
    """
    if unknown := set(parts) - {*PARTS, "unet_ema"}:
        raise CheckpointError(f"parts: {sorted(unknown)}, expected some of {[*PARTS, 'unet_ema']}")
    tensors = {
        part: {name: LazyTensor.of(name, tensor).cast(dtype) for name, tensor in network.state_dict().items()}
        for part, network in parts.items()
    }
    configs: dict[str, Any] = {part: network.config for part, network in parts.items() if part in PARTS}
    metadata = dict(metadata or {})
    if changes := getattr(parts.get("unet"), "blocks", STANDARD_BLOCKS).changes():
        metadata[BLOCKS_KEY] = changes
    content = Content(
        tensors, configs, vae_names=vae_names, metadata=metadata, always_tell_config=True, diffusion=diffusion
    )
    return _write(Path(path), content, layout, overwrite)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    layout: Literal["single", "folder"],
    dtype: torch.dtype | None = None,
    vae_names: VaeNames | None = None,
    ema: WeightSet | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    embeddings: Sequence[str | Path] = (),
    vocabulary: Vocabulary | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write a checkpoint in another layout or dtype, one tensor at a time.

    Args:    dtype: for weights; None keeps each as it is. Schedule buffers are never converted.
             vae_names: None keeps what the source has, or had before it became a single file.
             ema: keep one set of U-Net weights where there are two; None keeps both.
             loras, embeddings: merged and added, see `ldm.checkpoint.adapters`.
             vocabulary: CLIP's, as of `ldm.tokenizer.clip_vocabulary`: a folder has a tokenizer then.
    Returns: the files written. Without dtype, vae_names and ema, converting back gives the same bytes; of a folder the
             weights only, not its tokenizer, scheduler or safety checker.
    Raises:  CheckpointError: as `load_parts`, or when the target is taken.
    """
    checkpoint = identify(source)
    extras = checkpoint.extras  # before a choice: the set that is not chosen becomes one
    if ema is not None:
        checkpoint = checkpoint.choose(ema)
    checkpoint = adapted(checkpoint, loras, embeddings)
    examined = examine(checkpoint)
    require_fit(checkpoint, examined.report)
    if (own := checkpoint.vocabulary.ids) and not CLIP_PIECES.issubset(own.items()):
        raise CheckpointError(
            f"{source}: its tokenizer has a vocabulary of its own, {len(own)} pieces, which neither layout written "
            "here has a place for: keep the folder as it is"
        )
    if dtype == torch.float16:
        _refuse_overflow(checkpoint)
    content = Content(
        parts={
            part: {name: tensor.cast(dtype) for name, tensor in tensors.items()}
            for part, tensors in checkpoint.parts.items()
        },
        configs=examined.configs,
        extras=extras,
        headers=checkpoint.headers,
        vae_names=vae_names or checkpoint.vae_names,
        metadata={BLOCKS_KEY: checkpoint.blocks} if checkpoint.blocks else {},
        words=checkpoint.vocabulary.added,
        diffusion=checkpoint.diffusion,
    )
    written = _write(Path(target), content, layout, overwrite)
    if layout == "folder" and vocabulary is not None and "clip" in checkpoint.parts:
        words = checkpoint.vocabulary
        words = words if words.ids else replace(words, ids=vocabulary.ids, merges=vocabulary.merges)
        written += write_vocabulary(Path(target) / "tokenizer", words)
    return written


def _refuse_overflow(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError when a weight is finite and beyond float16; before anything is written."""
    lost = []
    for part, tensors in checkpoint.parts.items():
        for name, tensor in tensors.items():
            if tensor.dtype.is_floating_point and tensor.dtype not in (torch.float16, *FLOAT8):
                values = tensor.values()
                if bool((values.isfinite() & ~values.half().isfinite()).any()):
                    lost.append(f"{part}.{name}")
    if lost:
        raise CheckpointError(
            f"{checkpoint.path}: {len(lost)} tensors are beyond float16's 65504 and would be Inf, the first {lost[0]}: "
            "convert to bf16 or fp32 (--dtype)"
        )


def _write(path: Path, content: Content, layout: str, overwrite: bool) -> list[Path]:
    if layout not in ("single", "folder"):
        raise CheckpointError(f"layout: {layout!r}, expected 'single' or 'folder'")
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path}: exists already; choose another path, or overwrite it (overwrite=True, --force)")
    if path.exists() and path.is_dir() != (layout == "folder"):
        kind = "a folder" if path.is_dir() else "a file"
        raise CheckpointError(f"{path}: is {kind}, which a {layout} layout cannot replace; choose another path")
    return _write_folder(path, content) if layout == "folder" else _write_single(path, content)


# --- the single file -------------------------------------------------------------------------------------------------


def _single_tensors(content: Content) -> dict[str, LazyTensor]:
    """All tensors under their names in the single file."""
    tensors = {tensor.key: tensor for tensor in content.extras}
    for part, named in content.parts.items():
        network = part.removesuffix("_ema")
        depth = layouts.depth_of(content.configs[network])
        singles = layouts.to_single(network, named, depth)
        for name, tensor in named.items():
            if layouts.is_vae_attention_weight(name):
                tensor = tensor.reshaped((*tensor.shape, 1, 1))
            tensors[layouts.ema_key(singles[name]) if part == "unet_ema" else singles[name]] = tensor
    return tensors


def _single_metadata(content: Content) -> dict[str, str]:
    """The metadata of a single file, from which a folder can be written again as it was."""
    metadata = {**PLAIN_METADATA, **content.metadata}
    if any(_tells_config(content, part) for part in content.configs):
        metadata[CONFIG_KEY] = settings.config_to_metadata(content.configs)
    if content.vae_names == "old":
        metadata[VAE_NAMES_KEY] = "old"
    if content.words:
        metadata[WORDS_KEY] = added_to_metadata(content.words)
    if content.diffusion != SD15_DIFFUSION:
        metadata |= scheduler_json.to_metadata(content.diffusion)
    for part in content.parts:
        header, tensors = content.headers.get(part), _part_tensors(content, part)
        if header and _must_carry(header, tensors, _part_metadata(content, part)):
            metadata[HEADER_KEY + part] = header.text.decode()
    return metadata


def _tells_config(content: Content, part: str) -> bool:
    """Whether a file must say a network's configuration, since a reader would infer another one from the shapes."""
    if content.always_tell_config:
        return True
    shapes = {name: tensor.shape for name, tensor in content.parts[part].items()}
    try:
        return settings.infer_config(part, shapes) != content.configs[part]
    except ValueError:
        return True


def _must_carry(header: Header, tensors: Tensors, metadata: Mapping[str, str]) -> bool:
    """Whether these tensors' former header is still right, and not the one that would be written anyway."""
    return header.describes(tensors) and header.text != Header.build(tensors, metadata).text


def _write_single(path: Path, content: Content) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = content.headers.get("single")
    metadata = _single_metadata(content)
    metadata = {**_users_metadata(header), **metadata}
    header = _still_true(header, metadata, content.diffusion)
    write_tensors(path, _single_tensors(content), metadata, header)
    return [path]


def _still_true(header: Header | None, metadata: Mapping[str, str], diffusion: DiffusionConfig | None) -> Header | None:
    """A former header, where the words and the schedule that it tells are those of new metadata; None where not."""
    if header is None or header.metadata.get(WORDS_KEY) != metadata.get(WORDS_KEY):
        return None
    told = scheduler_json.diffusion_of_file(header.metadata, header.entries)
    return header if diffusion in (None, told) else None


def _users_metadata(header: Header | None) -> dict[str, str]:
    """What stays of a former header's metadata when its tensors change; what we put there is put there anew."""
    metadata = header.metadata if header else {}
    ours = ("ldm.", scheduler_json.MODELSPEC_KEY)
    return {key: value for key, value in metadata.items() if not key.startswith(ours)}


# --- the folder ------------------------------------------------------------------------------------------------------


def _part_tensors(content: Content, part: str) -> dict[str, LazyTensor]:
    """One network's tensors under their names in the folder."""
    if part != "vae" or content.vae_names == "new":
        return dict(content.parts[part])
    to_old = {new: old for old, new in layouts.OLD_VAE_NAMES}
    return {layouts.rename(name, to_old) or name: tensor for name, tensor in content.parts[part].items()}


def _part_metadata(content: Content, part: str) -> dict[str, str]:
    metadata = {**PLAIN_METADATA, **content.metadata}
    if part in PARTS and _tells_config(content, part):
        metadata[CONFIG_KEY] = settings.config_to_metadata({part: content.configs[part]})
    if part == "clip" and content.words:
        metadata[WORDS_KEY] = added_to_metadata(content.words)
    return metadata


def _part_path(folder: Path, part: str, both_sets: bool) -> Path:
    """Where one network's weights go. Of two sets the moving average has the plain name, as on the hub."""
    if part == "unet" and both_sets:
        return folder / "unet" / NON_EMA_FILE
    network = part.removesuffix("_ema")
    return folder / FOLDERS[network] / WEIGHT_FILES[network]


def _write_folder(folder: Path, content: Content) -> list[Path]:
    both_sets = "unet_ema" in content.parts
    written = []
    for part in content.parts:
        path = _part_path(folder, part, both_sets)
        path.parent.mkdir(parents=True, exist_ok=True)
        header = content.headers.get(part)
        metadata = {**_users_metadata(header), **_part_metadata(content, part)}
        header = _still_true(header, metadata, None)  # a folder tells its schedule in a file of its own
        write_tensors(path, _part_tensors(content, part), metadata, header)
        written.append(path)
    for network, config in content.configs.items():
        path = folder / FOLDERS[network] / "config.json"
        path.write_text(config_json.to_json(config))
        written.append(path)

    path = folder / "scheduler" / "scheduler_config.json"
    if "unet" in content.configs and (content.diffusion != SD15_DIFFUSION or path.exists()):
        path.parent.mkdir(exist_ok=True)
        path.write_text(scheduler_json.to_json(content.diffusion))
        written.append(path)

    extras = {tensor.key: tensor for tensor in content.extras}
    header, carried = content.headers.get("single"), {}
    if header and _must_carry(header, _single_tensors(content), _single_metadata(content)):
        carried = {HEADER_KEY + "single": header.text.decode()}
    if extras or carried:
        write_tensors(folder / EXTRAS_FILE, extras, {**PLAIN_METADATA, **carried})
        written.append(folder / EXTRAS_FILE)
    _remove_older_weights(folder, content, written)
    return written


def _remove_older_weights(folder: Path, content: Content, written: list[Path]) -> None:
    """Remove weights of these networks that an overwritten folder had under other names: a reader would mix them in."""
    older = [folder / EXTRAS_FILE]
    for network in content.configs:
        path = folder / FOLDERS[network] / WEIGHT_FILES[network]
        older += [path, path.with_suffix(".fp16.safetensors")]
    if "unet" in content.configs:
        older += [folder / "unet" / NON_EMA_FILE, folder / "unet_ema" / WEIGHT_FILES["unet"]]
    for path in older:
        if path not in written:
            path.unlink(missing_ok=True)
