"""The options that `generate` and `traverse` share."""

import argparse
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch

import ldm
from ldm import fast, pipeline
from ldm.checkpoint import identify
from ldm.samplers import SAMPLERS
from ldm.samplers.names import meaning
from ldm.schedule import ENDS, SPACINGS
from ldm.unet import STANDARD_BLOCKS, UNetBlocks

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_model(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, where it runs, in which precision."""
    parser.add_argument(
        "--weights",
        type=Path,
        default=pipeline.PHANTOM_WEIGHTS,
        help="SD1.5 single file, diffusers folder, or a file of ours (default: the shipped phantom model)",
    )
    parser.add_argument("--base", type=Path, help="a whole model to lay a U-Net-only --weights over")
    parser.add_argument("--ema", choices=("ema", "plain"), help="which U-Net weights, where a file holds both sets")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1 ... (default: cuda where there is one)")
    parser.add_argument(
        "--dtype",
        choices=("auto", *DTYPES),
        default="auto",
        help="of CLIP and U-Net; the autoencoder stays in float32 (default: float32 on the CPU, float16 on a GPU)",
    )
    parser.add_argument(
        "--blocks",
        metavar="FILE.py:NAME",
        help="a UNetBlocks of your own, whose U-Net this is; into a standard one, its new branches come as zeros",
    )
    parser.add_argument(
        "--backend",
        choices=get_args(fast.Backend),
        default="auto",
        help="fused kernels on GPUs that have them (auto), never (torch), or an error where there are none (triton); "
        "openvino: the U-Net by OpenVINO on a CPU, see ldm/fast/README.md (default: %(default)s)",
    )


def add_adapters(parser: argparse.ArgumentParser) -> None:
    """What is merged into a checkpoint, and the words that are added to it."""
    parser.add_argument(
        "--lora",
        dest="loras",
        action="append",
        default=[],
        metavar="FILE[:WEIGHT]",
        help="merge a LoRA of kohya's, diffusers' or PEFT's, such as style.safetensors:0.8; repeat for several",
    )
    parser.add_argument(
        "--embedding",
        dest="embeddings",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="add the word of a textual inversion: its file's name, or the one inside; repeat for several",
    )


def own_blocks(args: argparse.Namespace, file: Path) -> tuple[UNetBlocks, UNetBlocks]:
    """What --blocks names, and the blocks of the file: those, where it was saved with them, else the standard ones."""
    if not args.blocks:
        return STANDARD_BLOCKS, STANDARD_BLOCKS
    from ldm_tools import own_code  # read where it is needed: every command imports this file

    wanted = own_code.load(args.blocks, "--blocks", UNetBlocks)
    return wanted, STANDARD_BLOCKS if not identify(file).blocks else wanted


def lora_files(args: argparse.Namespace) -> list[tuple[str | Path, float]]:
    """What --lora was given: files and weights. Raises ValueError for a weight that is no number."""
    files: list[tuple[str | Path, float]] = []
    for text in args.loras:
        file, colon, weight = text.rpartition(":")
        if not colon or Path(text).exists():
            files.append((Path(text), 1.0))
            continue
        try:
            value = float(weight)
        except ValueError as error:
            raise ValueError(f"--lora: got {text!r}, expected FILE or FILE:WEIGHT such as {file}:0.8") from error
        if not math.isfinite(value):
            raise ValueError(f"--lora: got weight {weight}, expected a number")
        files.append((Path(file), value))
    return files


def load_model(args: argparse.Namespace) -> pipeline.StableDiffusion:
    """The model that the options of `add_model` name, with --max-batch and --cuda-graph where the command has them."""
    limit = max_batch(args)
    device = device_of(args)
    dtype = dtype_of(args, device)
    if dtype == torch.float32:
        no_tf32()
    wanted, blocks = own_blocks(args, args.weights)
    sd = ldm.load(
        args.weights,
        device,
        dtype,
        ema=args.ema,
        base=args.base,
        backend=args.backend,
        loras=lora_files(args) if hasattr(args, "loras") else (),
        embeddings=getattr(args, "embeddings", ()),
        blocks=blocks,
    )
    if wanted is not blocks:
        from ldm.probe import surgery  # read where it is needed: every command imports this file

        unet, transplant = surgery.rebuild(sd.unet, blocks=wanted)
        logger.info("--blocks: the U-Net with %s\n%s", wanted.changes() or "standard blocks", transplant)
        fast.install(unet, kernels=args.backend)
        sd = replace(sd, unet=unet)
    if wants_cuda_graph(args, device):
        fast.install(sd.unet, kernels=args.backend, cuda_graph=True)
    return replace(sd, max_batch=limit)


def device_of(args: argparse.Namespace) -> torch.device:
    """What --device names. Raises ValueError where torch cannot use it."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if args.device == "auto" else args.device
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()  # is it really there?
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"--device: torch cannot use {name!r} here; expected cpu, cuda or cuda:N") from error
    return device


def dtype_of(args: argparse.Namespace, device: torch.device) -> torch.dtype:
    """What --dtype names; "auto": float16 on a GPU, else float32."""
    return DTYPES.get(args.dtype, torch.float16 if device.type == "cuda" else torch.float32)


def wants_cuda_graph(args: argparse.Namespace, device: torch.device) -> bool:
    """What --cuda-graph or --no-cuda-graph says; without either, whether this is a GPU. Never for other commands."""
    chosen = getattr(args, "cuda_graph", False)
    return device.type == "cuda" if chosen is None else chosen


def no_tf32() -> None:
    """float32 means float32: by default cuDNN rounds what convolutions read to TF32's ten bits."""
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def named_prompts(styles: list[str]) -> dict[str, str]:
    """What --style was given, NAME=PROMPT each: name -> prompt. Raises ValueError for anything else."""
    prompts = dict(style.split("=", 1) for style in styles if "=" in style)
    if len(prompts) != len(styles):
        raise ValueError(f"--style: got {styles}, expected NAME=PROMPT with a different NAME each")
    return prompts


def add_own_prompts(parser: argparse.ArgumentParser, instead_of: str) -> None:
    """A neutral prompt and styles of one's own; see `own_prompts`."""
    parser.add_argument("--neutral", help=f"the prompt of the unedited image (default: {instead_of})")
    parser.add_argument("--style", action="append", default=[], metavar="NAME=PROMPT", help="repeat for each style")


def own_prompts(args: argparse.Namespace) -> dict[str, str]:
    """Name -> prompt of --style; empty where neither it nor --neutral was given. Raises ValueError for one of them."""
    if bool(args.neutral) != bool(args.style):
        raise ValueError("--neutral, --style: expected both or neither")
    return named_prompts(args.style)


def add_cuda_graph(parser: argparse.ArgumentParser) -> None:
    """How the U-Net's steps are launched."""
    parser.add_argument(
        "--cuda-graph",
        action=argparse.BooleanOptionalAction,
        help="launch each sampling step's U-Net as one CUDA graph, which changes results in the last bits at most (the "
        "default on a GPU). Each is held against the network when it is recorded; where there can be none, or it gives "
        "something else, say so once and go on without",
    )


def add_sampling(parser: argparse.ArgumentParser, guidance: float = 7.5) -> None:
    """Steps, guidance, seeds, size, memory, launches, output."""
    parser.add_argument("--seeds", default="0", help="such as 0-15 or 0,3,8 (default %(default)s); a seed is an image")
    parser.add_argument("--steps", type=int, default=50, help="sampling steps (default 50)")
    parser.add_argument(
        "--sampler",
        default="ddim",
        help=f"one of {', '.join(SAMPLERS)}; a name known elsewhere, such as dpmpp_2m_sde_karras; or your own, "
        "FILE.py:NAME, as ldm/samplers/README.md shows (default: ddim)",
    )
    add_spacing(parser)
    parser.add_argument(
        "--end",
        choices=ENDS,
        help="of the steps: sigma_min, a trace of noise, or zero, as k-diffusion has it (default: the model's own)",
    )
    parser.add_argument(
        "--guidance", type=float, default=guidance, help="classifier-free guidance scale (default %(default)s)"
    )
    parser.add_argument("--negative", default="", help="the prompt that guidance pushes away from (default: empty)")
    add_long_prompts(parser)
    parser.add_argument("--eta", type=float, default=0.0, help="of ddim; 0: deterministic (default), 1: noisy as DDPM")
    parser.add_argument("--size", help="of the images in pixels, WIDTHxHEIGHT or one number (default: as trained)")
    parser.add_argument(
        "--max-batch",
        type=int,
        help="most rows in one U-Net call, to bound memory; guidance makes two of a latent (default: 8 at 512 x 512, "
        "and on a GPU up to 64, as its free memory allows)",
    )
    add_cuda_graph(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder to write; continues a run cut off there")


def add_spacing(parser: argparse.ArgumentParser) -> None:
    """Which timesteps a run visits."""
    parser.add_argument(
        "--spacing",
        help=f"of the steps: one of {', '.join(SPACINGS)}, or your own, FILE.py:NAME, or a FILE.json that "
        "`ldm bench samplers --optimise spacing` wrote (default: the model's own, leading in SD1.5)",
    )


def take_own(args: argparse.Namespace) -> dict[str, dict[str, str]]:
    """Load what --sampler and --spacing name by a file, and leave its name in args: option -> file, sha256.

    A sampler's name from elsewhere becomes ours, and what was said is in args.sampler_named.
    """
    from ldm_tools import own_code  # read where it is needed: every command imports this file

    sources: dict[str, dict[str, str]] = {}
    if getattr(args, "sampler", None):
        args.sampler, sources["sampler"] = own_code.sampler(args.sampler)
        args.sampler_named = None
        if args.sampler not in SAMPLERS:
            args.sampler_named = args.sampler
            args.sampler, args.spacing = meaning(args.sampler, args.spacing, SAMPLERS)
            logger.info("--sampler %s: %s, spacing %s", args.sampler_named, args.sampler, args.spacing or "as usual")
    if args.spacing:
        args.spacing, sources["spacing"] = own_code.spacing(args.spacing)
    return {option: source for option, source in sources.items() if source}


def add_long_prompts(parser: argparse.ArgumentParser) -> None:
    """How prompts of more than 75 tokens, and brackets in prompts, are read."""
    parser.add_argument(
        "--long-prompts",
        action="store_true",
        help="read prompts of more than 75 tokens whole: 75 at a time, their contexts joined (default: cut off, and "
        "what is lost is said)",
    )
    parser.add_argument(
        "--prompt-weights",
        action="store_true",
        help="read (word:1.3), (word), [word] and \\( as AUTOMATIC1111 does: token vectors times the weight, the mean "
        "restored; run.json says what was read (default: brackets are text)",
    )


def ready_for(
    args: argparse.Namespace, sd: pipeline.StableDiffusion, prompts: Sequence[str]
) -> pipeline.StableDiffusion:
    """The model with room for these prompts where --long-prompts asks for it; what is read otherwise is said."""
    weighted = [text for text in prompts if re.search(r"\([^()]+:\d*\.?\d+\)", text)]
    if args.prompt_weights:
        sd = replace(sd, tokenizer=sd.tokenizer.reading_weights())
    elif weighted:
        logger.warning(
            "weights of words have no meaning here without --prompt-weights, all of it is read as text: %r",
            weighted[0][:80],
        )
    if args.guidance == 1 and args.negative:
        logger.warning("--negative: it has no effect at --guidance 1, which pushes away from nothing")
    return replace(sd, prompt_chunks=sd.tokenizer.chunks_for(prompts)) if args.long_prompts else sd


def max_batch(args: argparse.Namespace) -> int | None:
    """--max-batch, seen to be a number of rows; None without."""
    limit = getattr(args, "max_batch", None)
    if limit is not None and limit < 1:
        raise ValueError(f"--max-batch: got {limit}, expected 1 or more")
    return limit


def latent_size(text: str | None, sd: pipeline.StableDiffusion) -> tuple[int, int] | None:
    """ "640x512" pixels -> (64, 80), height and width of the latent; None for None.

    Raises ValueError for other text, or a side that the networks cannot halve often enough.
    """
    if text is None:
        return None
    downscale = sd.config.vae.downscale
    multiple = downscale * 2 ** (len(sd.config.unet.widths) - 1)
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not match or min(width, height) < multiple or width % multiple or height % multiple:
        nearest = [_nearest_multiples(side, multiple) for side in dict.fromkeys((width, height)) if side % multiple]
        hint = f"; the nearest are {' and '.join(nearest)}" if nearest else ""
        raise ValueError(
            f"--size: got {text!r}, expected WIDTHxHEIGHT or one number, multiples of {multiple} pixels{hint}"
        )
    return height // downscale, width // downscale


def _nearest_multiples(side: int, multiple: int) -> str:
    """ "448 or 512 for 500": the two sizes around a side that is no multiple."""
    below = side // multiple * multiple
    return f"{below} or {below + multiple} for {side}" if below else f"{multiple} for {side}"
