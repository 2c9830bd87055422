"""Weights in and out: what a path holds, every key explained, three networks filled; and back to a file.

Reading order: container (the format), layouts (the two names of every weight), dialects (whose names are these?),
folders, identification and foreign (what is it?), settings and config_json (its configuration), vocabulary (its words),
report (every key), loading, saving, adapters. README.md says what becomes of each origin.
"""

from typing import TYPE_CHECKING, Any

from ldm.checkpoint.container import CheckpointError, naming, sha256
from ldm.checkpoint.identification import Checkpoint, WeightSet, identify
from ldm.checkpoint.loading import Examined, Loaded, examine, load_parts
from ldm.checkpoint.report import KeyReport, KeysDoNotFit
from ldm.checkpoint.settings import infer_config

if TYPE_CHECKING:
    from ldm.checkpoint.adapters import adapted as adapted
    from ldm.checkpoint.saving import convert as convert
    from ldm.checkpoint.saving import save as save

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Examined",
    "KeyReport",
    "KeysDoNotFit",
    "Loaded",
    "WeightSet",
    "examine",
    "identify",
    "infer_config",
    "load_parts",
    "naming",
    "sha256",
]


def __getattr__(name: str) -> Any:
    """What loading has no need of, read when it is first asked for."""
    if name == "adapted":
        from ldm.checkpoint import adapters

        return adapters.adapted
    if name in ("convert", "save"):
        from ldm.checkpoint import saving

        return getattr(saving, name)
    raise AttributeError(f"module 'ldm.checkpoint' has no attribute {name!r}")
