"""`ldm fetch-weights`: download the published files that this project knows, and check them by SHA-256.

ldm fetch-weights                     v1-5-pruned-emaonly.safetensors, into weights/
ldm fetch-weights --check FILE        is this file what it says?
"""

import argparse
import os
import shutil
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

from tqdm import tqdm

from ldm.checkpoint import CheckpointError, sha256
from ldm.pipeline import PACKAGE, WEIGHTS

CHUNK_BYTES = 1 << 20
SILENCE_S = 30  # a server that says nothing for so long is taken to be gone
TRIES = 5  # in a row without a byte more


@dataclass(frozen=True)
class Known:
    """A published file. sha256: its hash, or how it begins; None where no published one is known."""

    file: str
    what: str
    page: str  # where a person gets it
    url: str  # where a program does
    sha256: str | None
    folder: Callable[[], Path]  # where programs look for it


def _weights_folder() -> Path:
    """The checkout's weights/; where the package is installed, weights/ of the current folder, not of site-packages."""
    return Path("weights") if WEIGHTS.parent == PACKAGE else WEIGHTS


def _torch_hub_folder() -> Path:
    from torch.hub import get_dir

    return Path(get_dir()) / "checkpoints"


SD15_PAGE = "https://huggingface.co/stable-diffusion-v1-5/stable-diffusion-v1-5"
ALEXNET = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"

KNOWN = {
    "v1-5-pruned-emaonly": Known(
        "v1-5-pruned-emaonly.safetensors",
        "SD1.5, EMA weights: what to sample with (4.3 GB, CreativeML Open RAIL-M)",
        SD15_PAGE,
        f"{SD15_PAGE}/resolve/main/v1-5-pruned-emaonly.safetensors",
        "6ce0161689b3853acaa03779ec93eafe75a02f4ced659bee03f50797806fa2fa",
        _weights_folder,
    ),
    "v1-5-pruned": Known(
        "v1-5-pruned.safetensors",
        "SD1.5, plain and EMA weights: what to fine-tune from (7.7 GB, CreativeML Open RAIL-M)",
        SD15_PAGE,
        f"{SD15_PAGE}/resolve/main/v1-5-pruned.safetensors",
        None,
        _weights_folder,
    ),
    "lpips-alexnet": Known(
        "alexnet-owt-7be5be79.pth",
        "the AlexNet under LPIPS, which torchvision loads (244 MB)",
        ALEXNET,
        ALEXNET,
        "7be5be79",
        _torch_hub_folder,
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
    return verified(path, path, known)


def verified(path: Path, name: Path, known: Known) -> str:
    """One line that says what a file's hash is. name: what to call it. Raises CheckpointError for another hash."""
    with tqdm(total=path.stat().st_size, unit="B", unit_scale=True, disable=None, leave=False, desc="SHA-256") as bar:
        digest = sha256(path, bar.update)
    if known.sha256 is None:
        return f"{name}: SHA-256 {digest}; no published one is known here, compare it with the one on {known.page}"
    if not digest.startswith(known.sha256):
        raise CheckpointError(
            f"{name}: SHA-256 {digest}, expected {known.sha256}: it is cut short or another file; fetch it again"
        )
    return f"{name}: as published, SHA-256 {digest}"


def fetch(known: Known, folder: Path) -> str:
    """Download one file into NAME.partial, check it, give it its name; returns one line.

    What a call that was cut off left in NAME.partial is kept, and the next goes on behind it.

    Raises: CheckpointError when it cannot be reached, saying which file to put where, or when its hash is another.
    """
    target = folder / known.file
    if target.exists():
        return check(target)
    unfinished = folder / f"{known.file}.partial"
    if unfinished.is_dir():  # of versions before, which could not go on with it
        shutil.rmtree(unfinished)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        download(known.url, unfinished)
    except (OSError, HTTPException, ValueError) as error:  # urllib's errors are OSErrors, an impossible address is not
        reason = " ".join(str(error).split())[:200]
        kept = unfinished.stat().st_size if unfinished.exists() else 0
        here = f"; {unfinished} has {kept:,} bytes, and a second call goes on behind them" if kept else ""
        raise CheckpointError(
            f"{known.file} cannot be fetched ({type(error).__name__}: {reason}): get it from {known.page}, put it at "
            f"{target} and run `ldm fetch-weights --check {target}`{here}"
        ) from error
    try:
        line = verified(unfinished, target, known)
    except CheckpointError:
        unfinished.unlink()
        raise
    os.replace(unfinished, target)
    return line


def download(url: str, path: Path) -> None:
    """Append to a file what it lacks of an address's content; a connection that breaks is taken up again.

    Raises: OSError, HTTPException when the server cannot be reached, refuses, or breaks off five times in a row
            without a byte more.
    """
    fruitless = 0
    while True:
        before = path.stat().st_size if path.exists() else 0
        try:
            if _append(url, path, before):
                return
            error: Exception = OSError("the connection was closed before the end")
        except urllib.error.HTTPError:
            raise
        except (OSError, HTTPException) as broken:
            error = broken
        after = path.stat().st_size if path.exists() else 0
        fruitless = 0 if after > before else fruitless + 1
        if fruitless == TRIES or not after:
            raise error
        time.sleep(min(1.0, 0.1 * 2**fruitless))


def _append(url: str, path: Path, have: int) -> bool:
    """Ask for the bytes from `have` on and append them; whether the file is whole then."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-", "User-Agent": "ldm fetch-weights"})
    try:
        answer = urllib.request.urlopen(request, timeout=SILENCE_S)
    except urllib.error.HTTPError as error:
        if error.code == 416 and have:  # nothing lies behind what is here: the hash says whether it is whole
            return True
        raise
    with answer:
        goes_on = answer.status == 206
        start = have if goes_on else 0
        total = start + int(answer.headers.get("Content-Length", 0))
        bar = tqdm(total=total, initial=start, unit="B", unit_scale=True, disable=None, leave=False, desc=path.stem)
        with bar, path.open("ab" if goes_on else "wb") as file:
            while chunk := answer.read(CHUNK_BYTES):
                file.write(chunk)
                bar.update(len(chunk))
    return path.stat().st_size >= total
