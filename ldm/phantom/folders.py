"""Phantoms on disk, in the file formats of CheXpert and of ISIC 2019, so that the readers of the real data read them.

OUT/CheXpert-v1.0-small/{train.csv, valid.csv, train/patient00001/study1/view1_frontal.jpg, valid/...}
OUT/{ISIC_2019_Training_GroundTruth.csv, ISIC_2019_Training_Metadata.csv, isic_inferred_wocarcinoma.csv,
     ISIC_2019_Training_Input/ISIC_0000001.jpg}
and beside them the ground truth that real data lack:
OUT/phantom.csv                          path, seed, attributes, anatomy of every image
OUT/masks/KEY_ATTRIBUTE.png              the pixels that the attribute may change
OUT/counterfactuals/KEY_base.png         on request: the image without JPEG's losses, ...
OUT/counterfactuals/KEY_ATTRIBUTE.png    ... and with one attribute toggled
OUT/run.json                             the arguments
"""

import csv
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.phantom import EXTRAS, render, sample_attributes
from ldm.phantom.draw import stream

# fmt: off
CHEXPERT_COLUMNS = (
    "Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", "No Finding", "Enlarged Cardiomediastinum", "Cardiomegaly",
    "Lung Opacity", "Lung Lesion", "Edema", "Consolidation", "Pneumonia", "Atelectasis", "Pneumothorax",
    "Pleural Effusion", "Pleural Other", "Fracture", "Support Devices",
)
CHEXPERT_ATTRIBUTES = {
    "Pleural Effusion": "pleural_effusion", "Support Devices": "support_devices", "Cardiomegaly": "cardiomegaly",
}
# How often a report that does not affirm the label denies it, counted on the real train.csv: 0.0 / (0.0 + empty)
CHEXPERT_DENIED = {
    "Pleural Effusion": 35_396 / (35_396 + 90_203), "Support Devices": 6_137 / (6_137 + 100_197),
    "Cardiomegaly": 11_116 / (11_116 + 177_211),
}
CHEXPERT_FIRST_VALID_PATIENT = 64_541

ISIC_TRUTH_COLUMNS = ("image", "MEL", "NV", "BCC", "AK", "BKL", "DF", "VASC", "SCC", "UNK")
ISIC_METADATA_COLUMNS = ("image", "age_approx", "anatom_site_general", "lesion_id", "sex")
ISIC_ARTIFACT_COLUMNS = (
    "", "image", "dark_corner", "hair", "gel_border", "gel_bubble", "ruler", "ink", "patches", "vasc", "label",
    "label_string",
)
ISIC_PROBABILITIES = ISIC_ARTIFACT_COLUMNS[2:10]
ISIC_SITES = ("anterior torso", "head/neck", "lower extremity", "palms/soles", "posterior torso", "upper extremity")
# Shares of the 25,331 real rows
ISIC_MISSING = {"age_approx": 437 / 25_331, "anatom_site_general": 2_631 / 25_331, "lesion_id": 2_084 / 25_331,
                "sex": 384 / 25_331}
ISIC_DOWNSAMPLED = 2_074 / 25_331
# fmt: on


@dataclass(frozen=True)
class Item:
    """One image to be rendered: what it shows and where it goes."""

    domain: str
    seed: int
    attributes: Mapping[str, bool]
    path: str  # of the JPEG, relative to the output folder
    key: str  # names the masks and counterfactuals
    group: int  # the patient or the lesion, counted from 0: images of one group share their anatomy
    index: int  # within the group


def write_chexpert(
    out: Path | str,
    n: int,
    seed0: int = 0,
    size: int = 128,
    confounded: bool = False,
    counterfactuals: bool = False,
    tied: bool = True,
    workers: int = 1,
    extras: Sequence[str] = (),
) -> Path:
    """Write n chest phantoms as a CheXpert-v1.0-small folder; the last tenth are its validation set.

    Patient p has the anatomy of seed0 + p. A quarter of the patients have a second or third study, which shows the
    same anatomy in another state. Reports are drawn too: No Finding for half of the images without effusion, absent
    attributes left empty as often as in the real files, other findings never mentioned; valid.csv is fully 0 / 1.

    Args:    out: a folder that does not exist or is empty.  confounded, tied: see `ldm.phantom`.
             counterfactuals: also write every image with each attribute toggled.  workers: processes.
             extras: some of `EXTRAS` of the domain, drawn like the other attributes, which they do not change.
    Returns: out.
    Raises:  ValueError: when out holds files already, or a number is out of range.
    """
    if n >= CHEXPERT_FIRST_VALID_PATIENT:
        raise ValueError(f"n: got {n}, expected < {CHEXPERT_FIRST_VALID_PATIENT} (the validation patients start there)")
    _check("chest", n, seed0, size, workers, extras)
    train = n - n // 10
    items: list[Item] = []
    for item in _plan("chest", n, seed0, confounded, extras, starts=(0, train)):
        part = "train" if len(items) < train else "valid"
        first = 1 if part == "train" else CHEXPERT_FIRST_VALID_PATIENT
        key = f"patient{first + item.group:05d}_study{item.index + 1}"
        path = f"CheXpert-v1.0-small/{part}/{key.replace('_', '/')}/view1_frontal.jpg"
        items.append(Item(item.domain, item.seed, item.attributes, path, key, item.group, item.index))
    with _published(Path(out)) as folder:
        _write_images(folder, items, size, tied, counterfactuals, workers)
        root = folder / "CheXpert-v1.0-small"
        _write_csv(root / "train.csv", CHEXPERT_COLUMNS, (_chexpert_row(item, False) for item in items[:train]))
        _write_csv(root / "valid.csv", CHEXPERT_COLUMNS, (_chexpert_row(item, True) for item in items[train:]))
        _write_run(folder, "chest", n, seed0, size, confounded, counterfactuals, tied, extras)
    return Path(out)


def write_isic(
    out: Path | str,
    n: int,
    seed0: int = 0,
    size: int = 128,
    confounded: bool = False,
    counterfactuals: bool = False,
    tied: bool = True,
    workers: int = 1,
    extras: Sequence[str] = (),
) -> Path:
    """Write n skin phantoms as an ISIC 2019 folder with the inferred artifact annotations.

    Lesion l has the anatomy of seed0 + l. A quarter of the lesions have a second or third image: the same lesion and
    diagnosis under other artifacts. Annotations are probabilities: >= 0.9 where the artifact is present, < 0.5 where
    not. Arguments, result and errors are those of `write_chexpert`.
    """
    _check("skin", n, seed0, size, workers, extras)
    items: list[Item] = []
    for i, item in enumerate(_plan("skin", n, seed0, confounded, extras, starts=(0,), fixed=("melanoma",))):
        key = f"ISIC_{i + 1:07d}"
        name = key + ("_downsampled" if _draw(item, "downsampled") < ISIC_DOWNSAMPLED else "")
        path = f"ISIC_2019_Training_Input/{name}.jpg"
        items.append(Item(item.domain, item.seed, item.attributes, path, key, item.group, item.index))
    several = {item.group for item in items if item.index > 0}
    with _published(Path(out)) as folder:
        _write_images(folder, items, size, tied, counterfactuals, workers)
        truth, metadata = "ISIC_2019_Training_GroundTruth.csv", "ISIC_2019_Training_Metadata.csv"
        _write_csv(folder / truth, ISIC_TRUTH_COLUMNS, map(_isic_truth_row, items))
        rows = (_isic_metadata_row(item, item.group in several) for item in items)
        _write_csv(folder / metadata, ISIC_METADATA_COLUMNS, rows)
        annotations = (_isic_artifact_row(i, item) for i, item in enumerate(items))
        _write_csv(folder / "isic_inferred_wocarcinoma.csv", ISIC_ARTIFACT_COLUMNS, annotations)
        _write_run(folder, "skin", n, seed0, size, confounded, counterfactuals, tied, extras)
    return Path(out)


WRITERS: dict[str, Callable[..., Path]] = {"chest": write_chexpert, "skin": write_isic}


# ---------------------------------------------------------------- what to render


def _plan(
    domain: str,
    n: int,
    seed0: int,
    confounded: bool,
    extras: Sequence[str],
    starts: Sequence[int],
    fixed: Sequence[str] = (),
) -> Iterator[Item]:
    """n images in groups of one seed; a new group, numbered from 0 again, begins at each of `starts`.

    The first image of a group has the attributes of `sample_attributes`; further ones are drawn in the same way, drawn
    anew if they repeat a state, and keep the attributes named in `fixed`.
    """
    seed, group, count = seed0 - 1, -1, 0
    states: list[dict[str, bool]] = []
    for i in range(n):
        if i in starts:
            group, count = -1, 0
        if len(states) >= count or count == 0:
            seed, group, states = seed + 1, group + 1, []
            chance = stream(seed, f"{domain} group").random()
            count = 1 if chance < 0.75 else 2 if chance < 0.92 else 3
        states.append(_next_state(domain, seed, states, confounded, extras, fixed))
        yield Item(domain, seed, states[-1], "", "", group, len(states) - 1)


def _next_state(
    domain: str,
    seed: int,
    states: Sequence[dict[str, bool]],
    confounded: bool,
    extras: Sequence[str],
    fixed: Sequence[str],
) -> dict[str, bool]:
    if not states:
        return sample_attributes(domain, seed, confounded, extras)
    seeds = stream(seed, f"{domain} state {len(states)}")
    while True:
        state = sample_attributes(domain, int(seeds.integers(2**62)), confounded, extras)
        state |= {name: states[0][name] for name in fixed}
        if state not in states:
            return state


def _draw(item: Item, what: str) -> float:
    """Uniform in [0, 1), one number for each image and purpose."""
    return float(stream(item.seed, f"report {item.index} {what}").random())


# ---------------------------------------------------------------- rows


def _chexpert_row(item: Item, definite: bool) -> list[object]:
    """One row of train.csv, or with `definite` of valid.csv, where no label is left empty."""
    person = stream(item.seed, "person")
    row: dict[str, object] = dict.fromkeys(CHEXPERT_COLUMNS, "0.0" if definite else "")
    row["Path"], row["Frontal/Lateral"] = item.path, "Frontal"
    row["Sex"], row["Age"] = "Male" if person.random() < 0.55 else "Female", int(person.integers(18, 91))
    row["AP/PA"] = "AP" if _draw(item, "AP/PA") < 0.85 else "PA"
    for column, name in CHEXPERT_ATTRIBUTES.items():
        if name not in item.attributes:
            continue
        if item.attributes[name]:
            row[column] = "1.0"
        elif _draw(item, column) < CHEXPERT_DENIED[column]:
            row[column] = "0.0"
    # A device is no finding in the sense of this column
    findings = item.attributes["pleural_effusion"] or item.attributes.get("cardiomegaly", False)
    if not findings and (definite or _draw(item, "No Finding") < 0.5):
        row["No Finding"] = "1.0"
    return list(row.values())


def _isic_truth_row(item: Item) -> list[object]:
    diagnosis = "MEL" if item.attributes["melanoma"] else "NV"
    return [Path(item.path).stem, *("1.0" if column == diagnosis else "0.0" for column in ISIC_TRUTH_COLUMNS[1:])]


def _isic_metadata_row(item: Item, several: bool) -> list[object]:
    """`several`: other images show this lesion too, so that its id must not be missing."""
    person = stream(item.seed, "person")
    row: dict[str, object] = {
        "age_approx": f"{5.0 * person.integers(3, 18)}",
        "anatom_site_general": ISIC_SITES[person.integers(len(ISIC_SITES))],
        "lesion_id": f"PHA_{item.group + 1:07d}",
        "sex": "male" if person.random() < 0.53 else "female",
    }
    for column, share in ISIC_MISSING.items():
        if _draw(item, column) < share and not (several and column == "lesion_id"):
            row[column] = ""
    return [Path(item.path).stem, *row.values()]


def _isic_artifact_row(i: int, item: Item) -> list[object]:
    row: list[object] = [i, item.key]
    for column in ISIC_PROBABILITIES:
        chance = _draw(item, column)
        probability = 0.9 + 0.0999 * chance if item.attributes.get(column, False) else 0.49 * chance**3
        row.append(f"{probability:.6f}")
    return [*row, int(item.attributes["melanoma"]), "malignant"]  # the real file says "malignant" in every row


# ---------------------------------------------------------------- files


def _write_images(folder: Path, items: Sequence[Item], size: int, tied: bool, twins: bool, workers: int) -> None:
    """Render and save all images, and phantom.csv. The result does not depend on the number of workers."""
    for path in {(folder / item.path).parent for item in items} | {folder / "masks"}:
        path.mkdir(parents=True, exist_ok=True)
    if twins:
        (folder / "counterfactuals").mkdir()
    work = partial(_write_image, folder=folder, size=size, tied=tied, twins=twins)
    progress = partial(tqdm, total=len(items), desc="phantoms", unit="image")
    if workers == 1:
        anatomies = list(progress(map(work, items)))
    else:
        with ProcessPoolExecutor(workers) as pool:
            anatomies = list(progress(pool.map(work, items, chunksize=8)))
    names = list(items[0].attributes)
    rows = (
        [item.path, item.seed, *(int(item.attributes[name]) for name in names), *(f"{v:.6g}" for v in anatomy.values())]
        for item, anatomy in zip(items, anatomies, strict=True)
    )
    _write_csv(folder / "phantom.csv", ["path", "seed", *names, *anatomies[0]], rows)


def _write_image(item: Item, folder: Path, size: int, tied: bool, twins: bool) -> Mapping[str, float]:
    """One image with its masks; with `twins` its counterfactuals, and the masks of absent attributes too."""
    grey = item.domain == "chest"

    def picture(image: np.ndarray) -> Image.Image:
        return Image.fromarray(image[..., 0] if grey else image)

    phantom = render(item.domain, item.seed, item.attributes, size, tied)
    masks = dict(phantom.masks)
    picture(phantom.to_uint8()).save(folder / item.path, quality=95, subsampling=0)
    if twins:
        picture(phantom.to_uint8()).save(folder / "counterfactuals" / f"{item.key}_base.png")
        for name, present in item.attributes.items():
            twin = render(item.domain, item.seed, {**item.attributes, name: not present}, size, tied)
            picture(twin.to_uint8()).save(folder / "counterfactuals" / f"{item.key}_{name}.png")
            masks = {**twin.masks, **masks}
    for name, mask in masks.items():
        Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(folder / "masks" / f"{item.key}_{name}.png")
    return phantom.anatomy


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def _write_run(
    folder: Path,
    domain: str,
    n: int,
    seed0: int,
    size: int,
    confounded: bool,
    counterfactuals: bool,
    tied: bool,
    extras: Sequence[str],
) -> None:
    run = {
        "command": "phantom",
        "domain": domain,
        "n": n,
        "seed": seed0,
        "size": size,
        "confounded": confounded,
        "counterfactuals": counterfactuals,
        "tied": tied,
        **({"extras": list(extras)} if extras else {}),
    }
    (folder / "run.json").write_text(json.dumps(run, indent=2) + "\n")


@contextmanager
def _published(out: Path) -> Iterator[Path]:
    """A folder under a temporary name, renamed to `out` when all is written and removed when anything fails."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: {out} exists and is not an empty folder; choose another or remove it")
    out = out.resolve()
    partial_folder = out.with_name(out.name + ".partial")
    if partial_folder.exists():
        raise ValueError(f"out: {partial_folder} exists, left by a run that was killed or is still writing; remove it")
    partial_folder.mkdir(parents=True)
    try:
        yield partial_folder
        if out.exists():
            out.rmdir()
        partial_folder.rename(out)
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise


def _check(domain: str, n: int, seed0: int, size: int, workers: int, extras: Sequence[str]) -> None:
    if unknown := sorted(set(extras) - set(EXTRAS[domain])):
        raise ValueError(f"extras: {unknown} unknown for domain {domain!r}, expected some of {list(EXTRAS[domain])}")
    for name, value, least in (("n", n, 1), ("seed0", seed0, 0), ("size", size, 32), ("workers", workers, 1)):
        if value < least:
            raise ValueError(f"{name}: got {value}, expected >= {least}")
