"""From a path to the three networks, filled.

    identify -> lay over a base -> choose a set of weights -> infer the configuration -> explain every key -> fill

The networks are built on the meta device, without memory, and take the checkpoint's tensors as their parameters: at
most one tensor exists twice at a time.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from ldm.checkpoint import config_json, settings
from ldm.checkpoint.container import CheckpointError, LazyTensor
from ldm.checkpoint.identification import PART_NAMES, Checkpoint, WeightSet, identify
from ldm.checkpoint.layouts import PARTS
from ldm.checkpoint.report import KeyReport, explain, require_fit
from ldm.checkpoint.settings import PartConfig
from ldm.checkpoint.vocabulary import Vocabulary
from ldm.clip import CLIPTextEncoder
from ldm.config import CLIPConfig, Config, DiffusionConfig, UNetConfig, VAEConfig
from ldm.unet import STANDARD_BLOCKS, UNet, UNetBlocks
from ldm.vae import AutoencoderKL

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Examined:
    """A checkpoint with its configuration and report; no weight is read yet.

    configs, networks: for each of "clip", "vae", "unet" that is there. The networks are on the meta device.
    """

    checkpoint: Checkpoint
    configs: dict[str, PartConfig]
    networks: dict[str, nn.Module]
    report: KeyReport


@dataclass(frozen=True)
class Loaded:
    """The three networks in evaluation mode, and where they come from.

    mapped: whether parameters are views of the mapped files rather than copies: nothing is read before it is used, and
    writing into a parameter copies the page, never changes the file. The files may be replaced meanwhile (as `save`
    does), but not rewritten in place.
    weight_set: which U-Net weights these are where the checkpoint has both sets; None where it has one.
    vocabulary: what the tokenizer must know, words that were added included.
    diffusion: what the U-Net predicts, and its schedule.
    adapters: a line for each LoRA and embedding: its SHA-256, its file's name, its weight.
    """

    config: Config
    clip: CLIPTextEncoder
    vae: AutoencoderKL
    unet: UNet
    report: KeyReport
    description: str
    files: tuple[Path, ...]
    mapped: bool
    weight_set: WeightSet | None
    vocabulary: Vocabulary
    diffusion: DiffusionConfig
    adapters: tuple[str, ...]


class _LeaveUninitialised(TorchFunctionMode):
    """Skips torch.nn.init: the meta device has no memory to fill, and its normal_ costs two seconds of imports."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        initialises = getattr(func, "__module__", None) == nn.init.__name__
        return kwargs["tensor"] if initialises else func(*args, **kwargs)


def build(config: PartConfig, blocks: UNetBlocks = STANDARD_BLOCKS) -> nn.Module:
    """The network of a configuration, on the meta device: shapes and no memory; blocks: of a U-Net."""
    with torch.device("meta"), _LeaveUninitialised():
        if isinstance(config, CLIPConfig):
            return CLIPTextEncoder(config)
        if isinstance(config, VAEConfig):
            return AutoencoderKL(config)
        return UNet(config, blocks)


def examine(checkpoint: Checkpoint, blocks: UNetBlocks = STANDARD_BLOCKS) -> Examined:
    """Infer the configuration of each network there and explain every key; reads headers only."""
    configs, networks, expected = {}, {}, {}
    for part in PARTS:
        if part not in checkpoint.parts:
            continue
        shapes = {name: tensor.shape for name, tensor in checkpoint.parts[part].items()}
        try:
            configs[part] = settings.infer_config(part, shapes, checkpoint.hidden.get(part))
            networks[part] = build(configs[part], blocks)
        except (ValueError, ZeroDivisionError) as error:
            what = f"{PART_NAMES[part]}{_channels(configs.get(part))}"
            raise CheckpointError(
                f"{checkpoint.path}: {checkpoint.describe()}, but no {what} has these shapes ({error}); numbers of "
                "heads and of groups do not show in them, and are SD1.5's unless config.json or our own metadata tells "
                "them: expected a file that has them, such as the whole model"
            ) from error
        expected[part] = {name: tuple(tensor.shape) for name, tensor in networks[part].state_dict().items()}
    report = explain(checkpoint, expected)
    for part, path in checkpoint.config_files.items():
        if report.ok and part in configs:
            config_json.require_agreement(path, configs[part])
    return Examined(checkpoint, configs, networks, report)


def _channels(config: PartConfig | None) -> str:
    """ " of 16 latent channels", the first that one wants to know of an autoencoder or U-Net."""
    return f" of {config.latent_channels} latent channels" if isinstance(config, VAEConfig | UNetConfig) else ""


def load_parts(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    vae_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    ema: WeightSet | None = None,
    base: str | Path | None = None,
    loras: Sequence[tuple[str | Path, float]] = (),
    embeddings: Sequence[str | Path] = (),
    blocks: UNetBlocks = STANDARD_BLOCKS,
) -> Loaded:
    """Read a model: any of the layouts, its configuration told from its tensors.

    Args:    path: SD1.5 single file, diffusers folder, a file of ours; or one network of these, with `base`.
             dtype: what the weights are converted to, tensor by tensor; None keeps each as it is stored.
             vae_dtype: another one for the autoencoder; None: `dtype` too.
             ema: which U-Net weights, where the file has both: "ema" or "plain".
             base: a whole model, from which the networks come that `path` lacks.
             loras, embeddings: see `ldm.checkpoint.adapters`; files, of LoRA with their weights.
             blocks: that the file's U-Net was saved with.
    Returns: the networks, their configuration and the report. On the CPU and in the stored dtype, parameters are views
             of the mapped file (`mapped`); otherwise copies. Peak memory: the weights and one tensor.
    Raises:  CheckpointError: when the path is not such a model, or any key is missing, unexpected or of wrong shape.
    """
    checkpoint = identify(path)
    if base is not None:
        checkpoint = checkpoint.over(identify(base))
    checkpoint.require_complete()
    if checkpoint.blocks != blocks.changes():
        raise CheckpointError(
            f"{path}: its U-Net is built from the blocks ({checkpoint.blocks or 'standard'}), whose code is not in the "
            f"file; got ({blocks.changes() or 'standard'}): give those classes, as blocks=UNetBlocks(...) or --blocks"
        )
    weight_set = ema if "unet_ema" in checkpoint.parts else None
    checkpoint = checkpoint.choose(ema)
    lines: tuple[str, ...] = ()
    if loras or embeddings:
        from ldm.checkpoint.adapters import adapted, adapter_lines  # read only where there are any

        checkpoint, lines = adapted(checkpoint, loras, embeddings), adapter_lines(loras, embeddings)
    examined = examine(checkpoint, blocks)
    require_fit(checkpoint, examined.report)
    config = _whole(examined.configs, checkpoint)

    mapped = torch.device(device).type == "cpu"
    for part, network in examined.networks.items():
        part_dtype = vae_dtype or dtype if part == "vae" else dtype
        tensors = {name: tensor.cast(part_dtype) for name, tensor in checkpoint.parts[part].items()}
        mapped = mapped and all(tensor.mapped for tensor in tensors.values())
        fill(network, tensors, device)
        if part_dtype == torch.float16:
            warn_of_overflow(checkpoint, part, network)
    clip, vae, unet = (examined.networks[part] for part in PARTS)
    assert isinstance(clip, CLIPTextEncoder)
    assert isinstance(vae, AutoencoderKL)
    assert isinstance(unet, UNet)
    files = tuple(file.path for file in checkpoint.files)
    return Loaded(
        config=config,
        clip=clip,
        vae=vae,
        unet=unet,
        report=examined.report,
        description=checkpoint.describe(),
        files=files,
        mapped=mapped,
        weight_set=weight_set,
        vocabulary=checkpoint.vocabulary,
        diffusion=checkpoint.diffusion,
        adapters=lines,
    )


def fill(network: nn.Module, tensors: Mapping[str, LazyTensor], device: torch.device | str) -> None:
    """Make the tensors the parameters of a network that was built on the meta device, and set it to evaluation."""
    copy = torch.device(device).type != "cpu"  # pages of a mapped file would stay in memory after the transfer
    state = {name: tensors[name].fetch(copy).to(device) for name in network.state_dict()}
    network.load_state_dict(state, assign=True)
    network.eval()


def warn_of_overflow(checkpoint: Checkpoint, part: str, network: nn.Module) -> None:
    """Say which tensors are Inf in float16 that are none in the file."""
    bad = [name for name, tensor in network.state_dict().items() if not tensor.isfinite().all()]
    if lost := [name for name in bad if checkpoint.parts[part][name].values().isfinite().all()]:
        logger.warning(
            "%s: %d tensors are beyond float16's 65504, the first %s.%s: use float32 or bfloat16 (--dtype)",
            checkpoint.path,
            len(lost),
            part,
            lost[0],
        )


def _whole(configs: dict[str, PartConfig], checkpoint: Checkpoint) -> Config:
    clip, vae, unet = (configs[part] for part in PARTS)
    assert isinstance(clip, CLIPConfig)
    assert isinstance(vae, VAEConfig)
    assert isinstance(unet, UNetConfig)
    if unet.context_width != clip.width or unet.latent_channels != vae.latent_channels:
        raise CheckpointError(
            f"{checkpoint.path}: its networks do not go together: the text encoder gives contexts of width "
            f"{clip.width}, the U-Net takes {unet.context_width}; the autoencoder gives {vae.latent_channels} latent "
            f"channels, the U-Net takes {unet.latent_channels}"
        )
    return Config(clip, vae, unet)
