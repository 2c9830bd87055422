"""What going on with a run needs, in one safetensors file: no pickle.

Tensors are a learner's weights, AdamW's moments and moving average; the metadata holds the step, the settings, how many
steps AdamW took, and the scale of the loss. With the settings and the step this fixes all that follows, since a step
draws its images and noise from (seed, step) alone. It does not tell how many processes there were; any may go on.
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm.checkpoint.container import LazyTensor, write_tensors
from ldm.files import complete
from ldm.train.learner import Learner

log = logging.getLogger(__name__)


def write_state(
    path: Path,
    learner: Learner,
    step: int,
    settings: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Tensor] | None = None,
) -> None:
    """Write what a run needs after so many steps. Args: tensors: the learner's, where they are at hand already."""
    metadata = {"step": step, "settings": settings or {}, "counters": learner.counters()}
    lazy = {name: LazyTensor.of(name, tensor) for name, tensor in (tensors or dict(learner.tensors())).items()}
    with complete(path, on_disk=True) as unfinished:
        write_tensors(unfinished, lazy, {name: json.dumps(value, sort_keys=True) for name, value in metadata.items()})


def read_metadata(path: Path) -> dict[str, Any]:
    """The step, settings and counters of a state. Raises ValueError for a damaged file."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = {name: json.loads(text) for name, text in file.metadata().items()}
    except (SafetensorError, AttributeError, ValueError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove it to go on without it") from error
    if missing := [name for name in ("step", "settings", "counters") if name not in metadata]:
        raise ValueError(f"{path}: has no {missing[0]}, so another version wrote it; remove it to go on without it")
    return metadata


def put_back(path: Path, learner: Learner) -> int:
    """Make a learner what it was when the state was written. Returns the steps done. Raises ValueError: see above."""
    metadata = read_metadata(path)
    with safe_open(path, framework="pt") as file:
        learner.restore(file.get_tensor, metadata["counters"])
    log.info("%s: going on from step %d", path, metadata["step"])
    return int(metadata["step"])
