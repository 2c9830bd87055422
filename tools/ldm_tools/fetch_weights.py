"""`ldm fetch-weights`: download the published files that this project knows, and check them by SHA-256.

ldm fetch-weights                     v1-5-pruned-emaonly.safetensors, into weights/
ldm fetch-weights --check FILE        is this file what it says?
"""

import argparse
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from ldm.checkpoint import CheckpointError, sha256
from ldm.pipeline import PACKAGE, WEIGHTS


@dataclass(frozen=True)
class Known:
    """A published file. sha256: its hash, or how it begins; None where no published one is known."""

    file: str
    what: str
    page: str  # where a person gets it
    sha256: str | None
    folder: Callable[[], Path]  # where programs look for it
    download: Callable[["Known", Path], Path]  # into a folder -> the file there


def _from_hub(known: Known, folder: Path) -> Path:
    from huggingface_hub import hf_hub_download  # slow to import, and needed here only

    owner, name = known.page.removeprefix("https://huggingface.co/").split("/")
    return Path(hf_hub_download(f"{owner}/{name}", known.file, local_dir=folder))


def _from_url(known: Known, folder: Path) -> Path:
    from torch.hub import download_url_to_file

    download_url_to_file(known.page, str(folder / known.file))
    return folder / known.file


def _weights_folder() -> Path:
    """The checkout's weights/; where the package is installed, weights/ of the current folder, not of site-packages."""
    return Path("weights") if WEIGHTS.parent == PACKAGE else WEIGHTS


def _torch_hub_folder() -> Path:
    from torch.hub import get_dir

    return Path(get_dir()) / "checkpoints"


SD15_PAGE = "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5"

KNOWN = {
    "v1-5-pruned-emaonly": Known(
        "v1-5-pruned-emaonly.safetensors",
        "SD1.5, EMA weights: what to sample with (4.3 GB, CreativeML Open RAIL-M)",
        SD15_PAGE,
        "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
        _weights_folder,
        _from_hub,
    ),
    "v1-5-pruned": Known(
        "v1-5-pruned.safetensors",
        "SD1.5, plain and EMA weights: what to fine-tune from (7.7 GB, CreativeML Open RAIL-M)",
        SD15_PAGE,
        None,
        _weights_folder,
        _from_hub,
    ),
    "lpips-alexnet": Known(
        "alexnet-owt-7be5be79.pth",
        "the AlexNet under LPIPS, which torchvision loads (244 MB)",
        "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
        "7be5be79",
        _torch_hub_folder,
        _from_url,
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command to `parser`."""
    parser.description = "Download known weights, checked by SHA-256 before they are put in their place."
    default = next(iter(KNOWN))
    parser.add_argument("name", nargs="?", default=default, metavar="NAME", help=f"which one (default {default})")
    parser.add_argument(
        "--to",
        type=Path,
        metavar="FOLDER",
        help="where to (default: SD1.5 into the checkout's weights/, or ./weights where there is no checkout; "
        "AlexNet to where torchvision looks for it)",
    )
    parser.add_argument("--list", action="store_true", help="list the known files, and which are here")
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="compare a file that is here with what was published"
    )


def run(args: argparse.Namespace) -> None:
    """Fetch, list or check. Raises CheckpointError when a file cannot be fetched, or is not what was published."""
    if args.list:
        for name, known in KNOWN.items():
            path = (args.to or known.folder()) / known.file
            print(f"{name:20} {known.what}\n{'':20} {path}: {'here' if path.exists() else 'not here'}")
        return
    if args.check is not None:
        print(check(args.check))
        return
    if args.name not in KNOWN:
        raise CheckpointError(f"NAME: {args.name!r}, expected one of {', '.join(KNOWN)}")
    known = KNOWN[args.name]
    print(fetch(known, args.to or known.folder()))


def check(path: Path) -> str:
    """Compare a file with the published one of the same name; returns one line.

    Raises: CheckpointError when no known file has this name, or when the hash is another.
    """
    known = next((known for known in KNOWN.values() if known.file == path.name), None)
    if known is None:
        names = ", ".join(known.file for known in KNOWN.values())
        raise CheckpointError(f"{path}: no hash is known for a file of this name (known: {names})")
    size = path.stat().st_size
    with tqdm(total=size, unit="B", unit_scale=True, disable=None, leave=False, desc="SHA-256") as bar:
        digest = sha256(path, bar.update)
    if known.sha256 is None:
        return f"{path}: SHA-256 {digest}; no published one is known here, compare it with the one on {known.page}"
    if not digest.startswith(known.sha256):
        raise CheckpointError(
            f"{path}: SHA-256 {digest}, expected {known.sha256}: it is cut short or another file; fetch it again"
        )
    return f"{path}: as published, SHA-256 {digest}"


def fetch(known: Known, folder: Path) -> str:
    """Download one file beside its place, check it, move it there; returns one line.

    Raises: CheckpointError when it cannot be reached, saying which file to put where, or when its hash is another.
    """
    target = folder / known.file
    if target.exists():
        return check(target)
    unfinished = folder / f"{known.file}.partial"  # a folder: the hub's client keeps what it needs to go on in there
    unfinished.mkdir(parents=True, exist_ok=True)
    try:
        downloaded = known.download(known, unfinished)
    except Exception as error:  # each client has errors of its own, and of the HTTP library below it
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"{known.file} cannot be fetched ({type(error).__name__}: {reason}): get it from {known.page}, put it at "
            f"{target} and run `ldm fetch-weights --check {target}`"
        ) from error
    try:
        line = check(downloaded)
    except CheckpointError:
        shutil.rmtree(unfinished)
        raise
    os.replace(downloaded, target)
    shutil.rmtree(unfinished)
    return line.replace(str(downloaded), str(target))
