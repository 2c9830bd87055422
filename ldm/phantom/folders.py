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

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ldm.files import write_text
from ldm.phantom import attribute_names, render
from ldm.phantom.items import Item, Order
from ldm.phantom.label_files import chexpert_items, isic_items, write_chexpert_labels, write_csv, write_isic_labels

FORMATS = {"chest": (chexpert_items, write_chexpert_labels), "skin": (isic_items, write_isic_labels)}


def write(domain: str, out: Path | str, order: Order, workers: int = 1) -> Path:
    """Write chest phantoms as a CheXpert-v1.0-small folder, skin phantoms as an ISIC 2019 folder.

    Args:    out: a folder that does not exist or is empty.  workers: processes; they do not change the result.
    Returns: out.
    Raises:  ValueError: when out holds files already, for an unknown domain, or a number out of range.
    """
    attribute_names(domain)  # raises for an unknown one
    order.check(domain)
    if workers < 1:
        raise ValueError(f"workers: got {workers}, expected >= 1")
    items_of, write_labels = FORMATS[domain]
    items = items_of(order)
    with _published(Path(out)) as folder:
        _write_images(folder, items, order, workers)
        write_labels(folder, items)
        run = {
            "command": "phantom",
            "domain": domain,
            "n": order.n,
            "seed": order.seed0,
            "size": order.size,
            "confounded": order.confounded,
            "counterfactuals": order.counterfactuals,
            "tied": order.tied,
            **({"extras": list(order.extras)} if order.extras else {}),
        }
        write_text(folder / "run.json", json.dumps(run, indent=2) + "\n")
    return Path(out)


def _write_images(folder: Path, items: Sequence[Item], order: Order, workers: int) -> None:
    """Render and save all images, and phantom.csv. The result does not depend on the number of workers."""
    for path in {(folder / item.path).parent for item in items} | {folder / "masks"}:
        path.mkdir(parents=True, exist_ok=True)
    if order.counterfactuals:
        (folder / "counterfactuals").mkdir()
    work = partial(_write_image, folder=folder, order=order)
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
    write_csv(folder / "phantom.csv", ["path", "seed", *names, *anatomies[0]], rows)


def _write_image(item: Item, folder: Path, order: Order) -> Mapping[str, float]:
    """One image with its masks; on request its counterfactuals, and the masks of absent attributes too."""
    grey = item.domain == "chest"

    def picture(image: np.ndarray) -> Image.Image:
        return Image.fromarray(image[..., 0] if grey else image)

    phantom = render(item.domain, item.seed, item.attributes, order.size, order.tied)
    masks = dict(phantom.masks)
    picture(phantom.to_uint8()).save(folder / item.path, quality=95, subsampling=0)
    if order.counterfactuals:
        picture(phantom.to_uint8()).save(folder / "counterfactuals" / f"{item.key}_base.png")
        for name, present in item.attributes.items():
            twin = render(item.domain, item.seed, {**item.attributes, name: not present}, order.size, order.tied)
            picture(twin.to_uint8()).save(folder / "counterfactuals" / f"{item.key}_{name}.png")
            masks = {**twin.masks, **masks}
    for name, mask in masks.items():
        Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(folder / "masks" / f"{item.key}_{name}.png")
    return phantom.anatomy


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
