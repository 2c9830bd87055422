"""CheXpert (Irvin et al. 2019): train.csv and valid.csv of the small set and of the full download.

A path in a label file is CheXpert-v1.0[-small]/train/patient00001/study1/view1_frontal.jpg. The images lie

    [CheXpert-v1.0[-small]/]train/patient00001/...                         "tree"
    CheXpert-v1.0 batch 2 (train 1)/patient00001/... and batches 3, 4      "batches": the full download, unpacked
    CheXpert-v1.0 batch 1 (validate & csv)/{train.csv, valid.csv, valid/}
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm.data import captions, radiography, tables
from ldm.data.labelled import LabelledImages, attribute_name
from ldm.data.places import there

logger = logging.getLogger(__name__)

# fmt: off
OBSERVATIONS = (
    "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly", "Lung Opacity", "Lung Lesion", "Edema",
    "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax", "Pleural Effusion", "Pleural Other", "Fracture",
    "Support Devices",
)
# fmt: on
ATTRIBUTES = {attribute_name(name): name for name in OBSERVATIONS}
DEFAULT_ATTRIBUTES = ("pleural_effusion", "support_devices")

PREFIXES = ("CheXpert-v1.0-small", "CheXpert-v1.0")
FIRST_BATCH = "CheXpert-v1.0 batch 1 (validate & csv)"
BATCHES = (
    "CheXpert-v1.0 batch 2 (train 1)",
    "CheXpert-v1.0 batch 3 (train 2)",
    "CheXpert-v1.0 batch 4 (train 3)",
)
BATCH_LIMITS = (21_514, 43_018, 64_541)  # a training patient is in the first batch whose limit exceeds its number
PATH = re.compile(
    r"^(?:CheXpert-v1\.0(?:-small)?/)?((train|valid|test)/(patient\d{5})/study\d+/view\d+_(frontal|lateral)\.)(?:jpe?g|png|tiff?|webp|dcm)$",
    re.MULTILINE | re.IGNORECASE,
)
LAYOUTS = ("auto", "tree", "batches")


def read(
    root: Path | str,
    *,
    csv: str = "train.csv",
    frontal_only: bool = True,
    uncertain: str = "ones",
    empty: str = "zero",
    attributes: Sequence[str] = DEFAULT_ATTRIBUTES,
    layout: str = "auto",
) -> LabelledImages:
    """Read a label file; the images may be absent.

    Args:    root: the folder that holds the label file, or the folder around it.  csv: its name.
             uncertain: what -1 means: "ones", "zeros", or "ignore" (NaN, masked).
             empty: what an observation that the report does not mention means: "zero" or "mask" (NaN).
             attributes: the K labels, such as "pleural_effusion".  layout: "auto", or as above.
    Returns: rows in file order; groups are patients.
    Raises:  ValueError: for a file that is no such table, an unknown option, or no row left.
    """
    for argument, value, known in (
        ("uncertain", uncertain, radiography.UNCERTAIN),
        ("empty", empty, radiography.EMPTY),
        ("layout", layout, LAYOUTS),
    ):
        tables.one_of(argument, value, known)
    path = find(Path(root), csv)
    frame = tables.read(path, ("Path", *OBSERVATIONS))
    places = _places(path, frame["Path"])
    values = tables.whole(path, frame, OBSERVATIONS, "1, 0, -1 or empty", -1, 1)
    frontal = _frontal(path, frame, places["view"])
    if frontal_only:
        frame, places, values = frame[frontal], places[frontal], values[frontal]
        if frame.empty:
            raise ValueError(f"{path}: {len(frontal)} rows and no frontal view among them")
    images = radiography.assemble(
        name="chexpert",
        root=Path(root),
        frame=frame,
        files=_files(Path(root), path, places, layout),
        observations=radiography.decided(values, uncertain, empty),
        patients=tables.strings(places["patient"]),
        keys=tables.strings(places["key"]),
        words={name: name for name in captions.CHEXPERT_CAPTION_LABELS},
        columns=ATTRIBUTES,
        attributes=attributes,
    )
    return replace(images, in_paper=frontal[frontal] if frontal_only else frontal)


def find(root: Path, csv: str = "train.csv") -> Path:
    """The label file in `root` or in a download's folder in it. Raises ValueError when there is none or several."""
    folders = (root, *(root / name for name in (*PREFIXES, FIRST_BATCH)))
    files = [folder / csv for folder in folders if (folder / csv).is_file()]
    if not files:
        others = sorted({path.name for folder in folders for path in folder.glob("*.csv")})
        hint = tables.expected(csv, others) if others else "; there is no csv file"
        raise ValueError(f"csv: no {csv!r} in {root}{hint}")
    if len(files) > 1 and files[0].parent != root:
        raise ValueError(f"root: {root} holds several data sets, {files[0]} and {files[1]}; name the folder of one")
    return files[0]


def _places(path: Path, paths: pd.Series) -> pd.DataFrame:
    """key, part, patient, view of every path."""
    names = tables.names(paths).tolist()
    parts = PATH.findall("\n".join(names))  # in one call: a tenth of the time of a match for each row
    if len(parts) != len(names):
        wrong = [row for row, name in enumerate(names) if not PATH.fullmatch(name)]
        raise ValueError(
            f"{path}, line {tables.line(wrong[0])}: Path is {names[wrong[0]]!r}, expected "
            f"[CheXpert-v1.0[-small]/]train/patient00001/study1/view1_frontal.jpg ({len(wrong)} such rows)"
        )
    parts = [(f"{key}jpg", *rest) for key, *rest in parts]  # the key of a copy in another format, too
    places = pd.DataFrame(parts, columns=["key", "part", "patient", "view"], index=paths.index)
    tables.unique(path, places["key"])
    return places


def _frontal(path: Path, frame: pd.DataFrame, views: pd.Series) -> NDArray[np.bool_]:
    """By the column Frontal/Lateral, or where a copy lacks it by the file's name."""
    named = (views == "frontal").to_numpy()
    if "Frontal/Lateral" not in frame:
        return named
    told = (frame["Frontal/Lateral"] == "Frontal").to_numpy()
    if (differs := told != named).any():
        row = tables.line(np.argmax(differs))
        logger.warning(
            "%s: in %d rows the file is named after the other view, first in line %d", path, differs.sum(), row
        )
    return told


def _files(root: Path, path: Path, places: pd.DataFrame, layout: str) -> NDArray[np.str_]:
    """Where each image lies. Where none is found, where it would lie beside the label file."""
    parts = places["part"].unique()
    trees = dict.fromkeys((path.parent, root, *(root / name for name in PREFIXES)))
    tree = next((folder for folder in trees if all((folder / part).is_dir() for part in parts)), None)
    homes = (root, path.parent.parent)
    home = next((folder for folder in homes if any((folder / name).is_dir() for name in BATCHES)), None)
    if layout == "batches" or (layout == "auto" and tree is None and home is not None):
        return there(_in_batches(path, home or root, places))
    return there(tables.strings(str(tree or path.parent) + "/" + places["key"]))


def _in_batches(path: Path, home: Path, places: pd.DataFrame) -> NDArray[np.str_]:
    """The full download: the patient's number selects the folder."""
    numbers = places["patient"].str.removeprefix("patient").astype(int)
    batch = np.searchsorted(BATCH_LIMITS, numbers, side="right")
    train = (places["part"] == "train").to_numpy()
    if (wrong := train & (batch == len(BATCHES))).any():
        patient = places["patient"].iloc[int(np.argmax(wrong))]
        raise ValueError(
            f"{path}: training patient {patient} is in no batch, expected a number below {BATCH_LIMITS[-1]}"
        )
    folders = np.array([f"{home / name}/" for name in (*BATCHES, FIRST_BATCH)], dtype=object)
    start = pd.Series(folders[np.where(train, batch, len(BATCHES))], index=places.index)
    return tables.strings(start + places["key"].str.removeprefix("train/"))
