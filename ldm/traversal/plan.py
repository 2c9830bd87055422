"""What to sample: prompts, seeds, steps, guidance; checked before a network is at hand.

The defaults are the paper's.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ldm.conditioning import Indexing, neutral_steps
from ldm.samplers import SAMPLERS, Sampler
from ldm.schedule import ENDS, EVEN_SPACINGS, SPACINGS, TRAIN_STEPS
from ldm.traversal.prompt_tree import KEEPABLE

SWAP_STEPS = tuple(range(5, 50, 5))


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample, whatever the prompts."""

    seeds: tuple[int, ...]
    steps: int = 50
    guidance: float = 7.5
    negative: str = ""
    sampler: str = "ddim"  # one of ldm.samplers.SAMPLERS
    spacing: str = "leading"  # one of ldm.schedule.SPACINGS
    sampler_named: str | None = None  # by the user, where that is another name
    end: str | None = None  # one of ldm.schedule.ENDS; None: the model's own
    eta: float = 0.0  # of ddim
    latent_size: tuple[int, int] | None = None  # height, width; None: the size that the model was trained at
    keep: tuple[str, ...] = ()  # quantities of every step to save, out of x_t, x0_pred, eps
    own_code: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # "sampler", "spacing" -> file, sha256

    def settings(self) -> dict[str, Any]:
        """All that latents depend on; what is unusual only where it is so, so that older folders can be grown."""
        entries = asdict(self)
        del entries["sampler_named"]
        for unusual in ("own_code", "end", "fast"):
            if not entries.get(unusual, True):
                del entries[unusual]
        return entries

    def __post_init__(self) -> None:
        """Everything that can be wrong before a network is at hand."""
        if not 1 <= self.steps <= TRAIN_STEPS:
            raise ValueError(f"steps: expected 1..{TRAIN_STEPS}, got {self.steps}")
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or not all(0 <= s < 2**32 for s in self.seeds):
            raise ValueError(f"seeds: expected one or more in 0..2^32-1, each once, got {list(self.seeds)}")
        if not math.isfinite(self.guidance):
            raise ValueError(f"guidance: expected a finite number, got {self.guidance}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta: expected 0..1, got {self.eta}")
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler: expected one of {', '.join(SAMPLERS)} or FILE.py:NAME, got {self.sampler!r}")
        if self.spacing not in SPACINGS:
            raise ValueError(
                f"spacing: expected one of {', '.join(SPACINGS)}, FILE.py:NAME or FILE.json, got {self.spacing!r}"
            )
        if SAMPLERS[self.sampler].even and self.spacing not in EVEN_SPACINGS:
            raise ValueError(f"spacing: {self.sampler} expects one of {', '.join(EVEN_SPACINGS)}, got {self.spacing!r}")
        if self.end not in (None, *ENDS):
            raise ValueError(f"end: expected one of {', '.join(ENDS)}, got {self.end!r}")
        if SAMPLERS[self.sampler].uncond and not 0 <= self.guidance <= 1:
            raise ValueError(f"guidance: {self.sampler} expects 0..1, such as 0.6, got {self.guidance:g}")
        if self.eta and SAMPLERS[self.sampler].eta is None:
            raise ValueError(f"eta: it belongs to ddim, got {self.eta} with sampler {self.sampler!r}")
        if set(self.keep) - set(KEEPABLE) or len(set(self.keep)) != len(self.keep):
            raise ValueError(f"keep: expected some of {list(KEEPABLE)}, each once, got {list(self.keep)}")

    @property
    def run_sampler(self) -> Sampler:
        """What `sampler` names."""
        return SAMPLERS[self.sampler]


@dataclass(frozen=True, kw_only=True)
class Generation(Sampling):
    """One prompt."""

    prompt: str

    @property
    def prompts(self) -> list[str]:
        """All that are encoded."""
        return [self.prompt, self.negative]


@dataclass(frozen=True, kw_only=True)
class Traversal(Sampling):
    """A neutral prompt, and styles that are swapped in at many steps. The defaults are the paper's."""

    neutral: str
    styles: Mapping[str, str]  # name -> prompt; the name becomes a folder
    swap_steps: tuple[int, ...] = SWAP_STEPS
    indexing: Indexing = "steps"
    bezier_points: int = 50  # 0: no curves
    fast: bool = False  # branches ask the network seldom, see `ldm.traversal.following`

    @property
    def prompts(self) -> list[str]:
        """All that are encoded."""
        return [self.neutral, *self.styles.values(), self.negative]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.styles:
            raise ValueError("styles: none given, expected at least one, as name=prompt")
        if bad := [name for name in self.styles if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name)]:
            raise ValueError(f"styles: {bad[0]!r} names a folder, expected letters, digits, '_' and '-'")
        if len({name.casefold() for name in self.styles}) != len(self.styles):  # one folder on many file systems
            raise ValueError(f"styles: {list(self.styles)} differ in case only, choose other names")
        if "neutral" in self.styles:
            raise ValueError("styles: 'neutral' is taken by the neutral prompt, choose another name")
        if not self.swap_steps or len(set(self.swap_steps)) != len(self.swap_steps):
            raise ValueError(f"swap steps: expected one or more, each once, got {list(self.swap_steps)}")
        for swap_step in self.swap_steps:
            neutral_steps(swap_step, self.steps, self.indexing)  # raises where it lies outside
        if self.fast and (self.sampler != "ddim" or self.eta):
            got = f"eta {self.eta:g}" if self.eta else f"sampler {self.sampler!r}"
            raise ValueError(f"fast: it takes the steps of ddim without eta, got {got}")
        if self.bezier_points not in (0, *range(2, 10_001)):
            raise ValueError(f"bezier points: expected 0 (no curve) or 2..10000, got {self.bezier_points}")


def parse_integers(text: str, name: str) -> tuple[int, ...]:
    """ "0-3,8" -> (0, 1, 2, 3, 8). Raises ValueError, naming the option, for anything else."""
    numbers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, -1)
        if not first <= last < first + 1_000_000:
            raise ValueError(f"{name}: got {text!r}, expected numbers and ranges such as 0-15 or 0,3,8")
        numbers += range(first, last + 1)
    return tuple(numbers)
