"""What is evaluated: cells. A cell is one neutral prompt and the attributes that are swapped into it.

The paper has three: healthy chests, melanomas, nevi. Here they are phantoms; a cell can also be made of the folder of
any traversal.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ldm.data import captions
from ldm.traversal.plan import Traversal
from ldm.traversal.run_folder import read_record

TITLES = {
    "pleural_effusion": "Pleural effusion",
    "support_devices": "Support devices",
    "melanoma": "Melanoma",
    "hair": "Hair",
    "gel_bubble": "Gel bubbles",
    "ruler": "Ruler",
    "ink": "Ink",
}
CLASS_HEAD = "melanoma"  # the classifier's head that tells MEL from NV; an edit of an artifact must not move it


@dataclass(frozen=True)
class Cell:
    """A neutral prompt and its styles. The names of the styles are the classifier's names of the attributes."""

    name: str  # names a folder and a row of the tables
    title: str
    neutral: str
    styles: Mapping[str, str]
    domain: str | None = None  # of phantoms: where ground truth comes from; None: there is none
    base: Mapping[str, bool] = field(default_factory=dict)  # attributes of the neutral phantom

    def title_of(self, attribute: str) -> str:
        """An attribute's name as tables and figures show it."""
        return TITLES.get(attribute, attribute.replace("_", " ").capitalize())


def _skin(name: str, title: str, diagnosis: str) -> Cell:
    styles = {artifact: captions.isic_style(diagnosis, artifact) for artifact in captions.ISIC_CAPTION_ARTIFACTS}
    return Cell(name, title, captions.ISIC_NEUTRAL[diagnosis], styles, "skin", {"melanoma": diagnosis == "MEL"})


PHANTOM_CELLS = {
    "chest": Cell(
        "chest",
        "Chest X-ray",
        captions.CHEXPERT_NEUTRAL,
        {
            "pleural_effusion": captions.chexpert({"Pleural Effusion": 1.0}),
            "support_devices": captions.chexpert({"Support Devices": 1.0}),
        },
        "chest",
    ),
    "melanoma": _skin("melanoma", "Melanoma", "MEL"),
    "nevus": _skin("nevus", "Melanocytic nevus", "NV"),
}


def cell_of_run(folder: Path) -> tuple[Cell, Traversal]:
    """The cell and the plan of a finished traversal's folder.

    Raises:  ValueError: the folder holds no finished traversal, saying what is missing.
    """
    record: dict[str, Any] = read_record(folder)
    if not (folder / "latents.safetensors").exists() or "styles" not in record:
        partial = folder / "partial"
        found = "one that was cut off: run the same `ldm traverse` again to finish it" if partial.exists() else "none"
        raise ValueError(f"{folder}: expected a finished traversal (run.json and latents.safetensors), found {found}")
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
        latent_size=tuple(record["latent_size"]),
        neutral=record["neutral"],
        styles=record["styles"],
        swap_steps=tuple(record["swap_steps"]),
        indexing=record["indexing"],
        bezier_points=record["bezier_points"],
    )
