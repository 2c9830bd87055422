"""Weights in and out: what a path holds, every key explained, three networks filled; and back to a file.

Reading order: container (the format), layouts (the two names of every weight), identification and foreign (what is
it?), settings (its configuration), report (every key), loading, saving.
"""

from ldm.checkpoint.container import CheckpointError, sha256
from ldm.checkpoint.identification import Checkpoint, WeightSet, identify
from ldm.checkpoint.loading import Examined, Loaded, examine, load_parts
from ldm.checkpoint.report import KeyReport, KeysDoNotFit
from ldm.checkpoint.saving import convert, save
from ldm.checkpoint.settings import infer_config

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Examined",
    "KeyReport",
    "KeysDoNotFit",
    "Loaded",
    "WeightSet",
    "convert",
    "examine",
    "identify",
    "infer_config",
    "load_parts",
    "save",
    "sha256",
]
