"""The models that ship with the package: what each was taught, what judges its images, whom to credit."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from ldm.phantom import prompts
from ldm.phantom.prompts import Cell
from ldm.pipeline import PHANTOM_WEIGHTS, WEIGHTS
from ldm.study.classifier import PHANTOM_CLASSIFIERS

CREDIT = (
    "The model of real skin learned dermoscopic images of ISIC 2018 task 1-2 (CC0, ISIC Archive), whose artifacts "
    "Bissoto, Valle and Avila (2020) labelled by hand; what it draws is no patient, and not for clinical use."
)


@dataclass(frozen=True)
class Shipped:
    """One model in weights/. The names of `cells` name folders and rows of tables."""

    weights: Path
    cells: Mapping[str, Cell]
    classifiers: Mapping[str, Path]  # of each cell
    note: str
    guidance: float  # at which the prompts show most often what they ask for: see the cards in weights/


def _real(cell: Cell) -> Cell:
    return replace(cell, name=f"real_{cell.name}", title=f"{cell.title}, real", domain=None)


_SKIN = ("melanoma", "nevus")

PHANTOM = Shipped(
    weights=PHANTOM_WEIGHTS,
    cells=prompts.CELLS,
    classifiers={"chest": PHANTOM_CLASSIFIERS["chest"], **dict.fromkeys(_SKIN, PHANTOM_CLASSIFIERS["skin"])},
    note="Phantoms are drawings, and so is all that the model of phantoms draws: nothing in them is a patient.",
    guidance=prompts.GUIDANCE,
)
REAL = Shipped(
    weights=WEIGHTS / "real.safetensors",
    cells={f"real_{name}": _real(prompts.CELLS[name]) for name in _SKIN},
    classifiers=dict.fromkeys((f"real_{name}" for name in _SKIN), WEIGHTS / "real_skin_classifier.safetensors"),
    note=CREDIT,
    guidance=5.0,
)
MODELS = (PHANTOM, REAL)
CELLS = {name: cell for model in MODELS for name, cell in model.cells.items()}


def model_of(cell: str) -> Shipped:
    """The model that a cell belongs to."""
    return next(model for model in MODELS if cell in model.cells)
