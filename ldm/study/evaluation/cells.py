"""What is evaluated: cells of phantoms, see `ldm.phantom.prompts`, or the folder of any traversal as a cell."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ldm.phantom.prompts import Cell
from ldm.traversal.plan import Traversal
from ldm.traversal.run_folder import read_record

CLASS_HEAD = "melanoma"  # the classifier's head that tells MEL from NV; an edit of an artifact must not move it


def cell_of_run(folder: Path) -> tuple[Cell, Traversal]:
    """The cell and the plan of a finished traversal's folder.

    Raises:  ValueError: the folder holds no finished traversal, saying what is missing.
    """
    record: dict[str, Any] = read_record(folder)
    if not (folder / "latents.safetensors").exists() or "styles" not in record:
        partial = folder / "partial"
        what = "one that was cut off: run the same `ldm traverse` again to finish it" if partial.exists() else "none"
        raise ValueError(f"{folder}: expected a finished traversal (run.json and latents.safetensors), found {what}")
    try:
        plan = _plan_of(record)
    except KeyError as missing:
        raise ValueError(f"{folder / 'run.json'}: has no {missing}; let `ldm traverse` write the folder anew") from None
    return Cell(folder.name, folder.name, plan.neutral, plan.styles), plan


def _plan_of(record: Mapping[str, Any]) -> Traversal:
    return Traversal(
        seeds=tuple(record["seeds"]),
        steps=record["steps"],
        guidance=record["guidance"],
        negative=record["negative"],
        eta=record["eta"],
        sampler=record.get("sampler", "ddim"),
        spacing=record.get("spacing", "leading"),
        end=record.get("end"),
        latent_size=tuple(record["latent_size"]),
        neutral=record["neutral"],
        styles=record["styles"],
        swap_steps=tuple(record["swap_steps"]),
        indexing=record["indexing"],
        bezier_points=record["bezier_points"],
        fast=record.get("fast") is True,
    )
