"""The explorer: trajectories as one HTML file that opens from disk and needs nothing else.

    write(Explorer(title, command, note, domains), Path("index.html"))

The page is explorer.html with two holes, the title and a block of JSON. Every trajectory's images travel as one sprite
sheet, a WebP of equal tiles (the frames, then the true counterfactual where there is one), so that dragging never
waits; what changed between two images is computed in the browser.

Letters: S swap steps, K heads of the classifier, H W of an image.
"""

import base64
import html
import io
import json
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ldm.files import write_bytes

log = logging.getLogger(__name__)

Pixels = NDArray[np.uint8]
Json = dict[str, Any]

THUMBNAIL_PX = 64


@dataclass(frozen=True)
class Frame:
    """One image on the way from neutral to the strongest edit."""

    label: str  # "neutral", "s = 45", "u = 0.33"
    kind: Literal["neutral", "swap", "curve"]
    position: float  # 0..1 along the trajectory, ascending
    image: Pixels  # (H, W, 3)
    probabilities: tuple[float, ...]  # one per head of the domain; () where there is no classifier
    lpips: float | None  # both against the neutral image
    ssim: float | None


@dataclass(frozen=True)
class Trajectory:
    """One attribute of one patient."""

    attribute: str
    title: str  # also names the classifier's head that looks for the attribute
    prompt: str
    frames: tuple[Frame, ...]  # neutral first, strongest edit last
    truth: Pixels | None  # the true counterfactual of a rendered patient
    swap_steps: tuple[int, ...]
    cosines: NDArray[np.floating] | None  # (S, S), in the order of swap_steps; NaN: undefined
    head: str | None = None  # title of the head that looks for the attribute, where it has another

    def __post_init__(self) -> None:
        where = f"trajectory {self.attribute!r}"
        kinds = [frame.kind for frame in self.frames]
        if len(kinds) < 2 or kinds[0] != "neutral" or not set(kinds[1:]) <= {"swap", "curve"}:
            raise ValueError(f"{where}: frames must be one neutral, then swaps and points of a curve, got {kinds}")
        if any(later.position < frame.position for frame, later in zip(self.frames, self.frames[1:], strict=False)):
            raise ValueError(f"{where}: positions must ascend, got {[frame.position for frame in self.frames]}")
        for image in (*(frame.image for frame in self.frames), *_maybe(self.truth)):
            if image.dtype != np.uint8 or image.ndim != 3 or image.shape != (*self.size, 3):
                raise ValueError(f"{where}: images must be uint8 {(*self.size, 3)}, got {image.dtype} {image.shape}")
        expected = (len(self.swap_steps), len(self.swap_steps))
        if self.cosines is not None and self.cosines.shape != expected:
            raise ValueError(f"{where}: cosines must be {expected} for these swap steps, got {self.cosines.shape}")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of every image."""
        height, width = self.frames[0].image.shape[:2]
        return height, width


@dataclass(frozen=True)
class PatientView:
    """One seed: drawn by the model ("generated"), or a phantom that was encoded and edited ("rendered")."""

    seed: int
    kind: Literal["generated", "rendered"]
    title: str
    trajectories: tuple[Trajectory, ...]


@dataclass(frozen=True)
class MapPoint:
    """One latent in the t-SNE map."""

    seed: int | None  # index into the domain's patients; None: a seed that the page does not show
    attribute: str  # "neutral" for the neutral latent
    swap_step: int | None
    x: float
    y: float


@dataclass(frozen=True)
class Domain:
    """Patients of one kind of image."""

    name: str
    title: str
    neutral_prompt: str
    heads: tuple[str, ...]  # titles of the classifier's heads; () where there is no classifier
    patients: tuple[PatientView, ...]
    map: tuple[MapPoint, ...] = ()
    summary: Sequence[tuple[str, Mapping[str, str]]] = ()  # attribute's title, metric -> text
    note: str = ""  # what these images are, whom to credit

    def __post_init__(self) -> None:
        where = f"domain {self.name!r}"
        if not self.patients or not all(patient.trajectories for patient in self.patients):
            raise ValueError(f"{where}: expected at least one patient, each with at least one trajectory")
        _require_distinct([(patient.kind, patient.seed) for patient in self.patients], f"{where}: patients")
        for patient in self.patients:
            _require_distinct([t.attribute for t in patient.trajectories], f"{where}, seed {patient.seed}: attributes")
            for trajectory in patient.trajectories:
                given = {len(frame.probabilities) for frame in trajectory.frames} - {0, len(self.heads)}
                if given:
                    raise ValueError(
                        f"{where}, seed {patient.seed}, {trajectory.attribute!r}: {max(given)} probabilities in a "
                        f"frame, expected {len(self.heads)}, one per head, or none"
                    )
        for point in self.map:
            if point.seed is not None and not 0 <= point.seed < len(self.patients):
                raise ValueError(f"{where}: a map point has seed {point.seed}, expected an index into the patients")


@dataclass(frozen=True)
class Explorer:
    """The whole page."""

    title: str
    command: str  # exactly what made it
    note: str
    domains: tuple[Domain, ...]

    def __post_init__(self) -> None:
        if not self.domains:
            raise ValueError("domains: got none, expected at least one")
        _require_distinct([domain.name for domain in self.domains], "domains")


@dataclass(frozen=True)
class Compression:
    """How much of the images is kept."""

    quality: int  # of WebP, 0..100
    scale: float  # of height and width


LADDER = (
    *(Compression(quality, 1.0) for quality in (90, 80, 70, 60)),
    *(Compression(60, scale) for scale in (0.75, 0.5, 0.375, 0.25)),
)


def write(explorer: Explorer, path: Path, limit_mib: float = 15.0) -> None:
    """Write the page, with images as good as the limit allows; the same explorer gives the same bytes.

    Raises: ValueError: the page is larger than `limit_mib` even with its images at the lowest quality.
    """
    limit = int(limit_mib * 2**20)
    sheets = [*_sheets(explorer)]
    page = next(filter(None, (_page(explorer, sheets, compression, limit) for compression in LADDER)), None)
    if page is None:
        raise ValueError(
            f"limit_mib: {len(sheets)} trajectories do not fit into {limit_mib:g} MiB even at WebP quality "
            f"{LADDER[-1].quality} and {LADDER[-1].scale:g} of their size; leave out seeds or points of the curves"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, page)


def _page(explorer: Explorer, sheets: list[list[Pixels]], compression: Compression, limit: int) -> bytes | None:
    """The page with its images compressed; None as soon as it is larger than `limit` bytes."""
    head, tail = _template(explorer.title)
    document = _describe(explorer)
    budget = limit - len(head) - len(tail) - len(_encode(document))
    for tiles in sheets:
        sprite = _sprite(tiles, compression)
        budget -= len(_encode(sprite)) + 1  # and a comma
        if budget < 0:
            return None
        document["sprites"].append(sprite)
    log.info("images at WebP quality %d, scale %g", compression.quality, compression.scale)
    return head + _encode(document) + tail


def _template(title: str) -> tuple[bytes, bytes]:
    """What comes before and after the data."""
    template = resources.files("ldm.study.report").joinpath("explorer.html").read_text(encoding="utf-8")
    head, _, tail = template.partition("{{data}}")
    return head.replace("{{title}}", html.escape(title)).encode(), tail.encode()


def _encode(document: Json) -> bytes:
    """JSON that can stand inside <script>: pure ASCII, and nothing in it opens or closes a tag."""
    text = json.dumps(document, allow_nan=False, separators=(",", ":"))
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e").encode("ascii")


def _describe(explorer: Explorer) -> Json:
    """Everything but the images, which follow in "sprites": one per trajectory, in order."""
    return {
        "title": explorer.title,
        "command": explorer.command,
        "note": explorer.note,
        "domains": [_describe_domain(domain) for domain in explorer.domains],
        "sprites": [],
    }


def _describe_domain(domain: Domain) -> Json:
    neutrals = [patient.trajectories[0].frames[0].image for patient in domain.patients]
    return {
        "name": domain.name,
        "title": domain.title,
        "neutralPrompt": domain.neutral_prompt,
        "note": domain.note,
        "heads": domain.heads,
        "patients": [
            {
                "seed": patient.seed,
                "kind": patient.kind,
                "title": patient.title,
                "thumbnail": _thumbnail(neutral),
                "trajectories": [_describe_trajectory(trajectory, domain.heads) for trajectory in patient.trajectories],
            }
            for patient, neutral in zip(domain.patients, neutrals, strict=True)
        ],
        "map": [
            [point.seed, point.attribute, point.swap_step, _number(point.x), _number(point.y)] for point in domain.map
        ],
        "summary": [[title, dict(metrics)] for title, metrics in domain.summary],
    }


def _describe_trajectory(trajectory: Trajectory, heads: Sequence[str]) -> Json:
    cosines = [] if trajectory.cosines is None else trajectory.cosines.tolist()
    return {
        "attribute": trajectory.attribute,
        "title": trajectory.title,
        "prompt": trajectory.prompt,
        "target": _target(trajectory, heads),
        "hasTruth": trajectory.truth is not None,
        "swapSteps": trajectory.swap_steps,
        "cosines": [[_number(value) for value in row] for row in cosines],
        "frames": [
            {
                "label": frame.label,
                "kind": frame.kind,
                "position": _number(frame.position),
                "probabilities": [_number(p) for p in frame.probabilities],
                "lpips": _number(frame.lpips),
                "ssim": _number(frame.ssim),
            }
            for frame in trajectory.frames
        ],
    }


def _target(trajectory: Trajectory, heads: Sequence[str]) -> int | None:
    """Index of the head that looks for this trajectory's attribute: the one named, or of the same title or name."""
    own = {trajectory.title.casefold(), trajectory.attribute.replace("_", " ").casefold()}
    names = own if trajectory.head is None else {trajectory.head.casefold()}
    return next((i for i, head in enumerate(heads) if head.casefold() in names), None)


def _number(value: float | None) -> float | None:
    """Rounded to what a chart can show; None (null in JSON) for what is no number."""
    return None if value is None or not math.isfinite(value) else round(float(value), 5)


# ---- images -----------------------------------------------------------------------------------------


def _sheets(explorer: Explorer) -> Iterator[list[Pixels]]:
    """The tiles of every trajectory's sprite sheet."""
    for domain in explorer.domains:
        for patient in domain.patients:
            for trajectory in patient.trajectories:
                yield [*(frame.image for frame in trajectory.frames), *_maybe(trajectory.truth)]


def _sprite(tiles: Sequence[Pixels], compression: Compression) -> Json:
    """Equal tiles, row by row, on a sheet that is about square."""
    height, width = (max(1, round(side * compression.scale)) for side in tiles[0].shape[:2])
    columns = math.ceil(math.sqrt(len(tiles)))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(tiles) / columns) * height))
    for i, tile in enumerate(tiles):
        sheet.paste(_resized(tile, width, height), (i % columns * width, i // columns * height))
    return {"width": width, "height": height, "columns": columns, "source": _webp(sheet, compression.quality)}


def _thumbnail(image: Pixels) -> str:
    height, width = image.shape[:2]
    scale = min(1.0, THUMBNAIL_PX / min(height, width))
    return _webp(_resized(image, round(width * scale), round(height * scale)), quality=80)


def _resized(image: Pixels, width: int, height: int) -> Image.Image:
    picture = Image.fromarray(image)
    return picture if picture.size == (width, height) else picture.resize((width, height), Image.Resampling.LANCZOS)


def _webp(picture: Image.Image, quality: int) -> str:
    """A data URI."""
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=quality, method=2)  # 4 takes twice as long for 2 % of the size
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _maybe(image: Pixels | None) -> tuple[Pixels, ...]:
    return () if image is None else (image,)


def _require_distinct(keys: Sequence[object], name: str) -> None:
    if len(set(keys)) < len(keys):
        raise ValueError(f"{name}: expected each once, got {list(keys)}")
