"""The views of labelled folders: positions, captions, chances."""

import numpy as np
import pytest
from lookalikes import chexpert, isic, picture, radiograph, write_csv

from ldm.data import captions, folders
from ldm.data import isic as isic_reader
from ldm.train import folder_set

SIZE = 32


@pytest.fixture
def skin(tmp_path):
    """Six dermoscopies, labelled by hand: clean, hair, hair and ruler; the last one MEL."""
    names = [f"ISIC_{i:07d}" for i in range(6)]
    root = isic(tmp_path / "skin", {name: "MEL" if i == 5 else "NV" for i, name in enumerate(names)})
    shown = [(), ("hair",), ("hair",), ("hair",), ("hair", "ruler"), ("ink",)]
    columns = ("image", "dark_corner", "hair", "gel_border", "gel_bubble", "ruler", "ink", "patches")
    rows = [
        dict.fromkeys(columns[1:], 0) | {"image": f"{image}.png"} | dict.fromkeys(present, 1)
        for image, present in zip(names, shown, strict=True)
    ]
    by_hand = write_csv(root / "isic_bias.csv", columns, rows, separator=";")
    for i, name in enumerate(names):
        picture(root / isic_reader.IMAGES / f"{name}.jpg", (SIZE, SIZE), 40 * i)
    return folders.read(root, artifacts=by_hand)


@pytest.fixture
def chest(tmp_path):
    rows = [
        radiograph("CheXpert-v1.0-small/train/patient00001/study1/view1_frontal.jpg", no_finding=1.0),
        radiograph("CheXpert-v1.0-small/train/patient00002/study1/view1_frontal.jpg", pneumonia=1.0),
    ]
    root = chexpert(tmp_path / "CheXpert-v1.0-small", rows)
    for row in rows:
        picture(root.parent / str(row["Path"]), (SIZE, SIZE), 120)
    return folders.read(root)


def test_every_wording_of_the_experiment_is_a_caption(skin, chest):
    clean, hair, *_, both, ink = folder_set.phrasings(skin)
    nevus, melanoma = captions.ISIC_NEUTRAL["NV"], captions.ISIC_NEUTRAL["MEL"]
    assert clean == (f"{nevus} with no visible artifacts", nevus)
    assert hair == (f"{nevus} showing hair", captions.isic_style("NV", "hair"))
    assert both == (f"{nevus} showing hair, ruler",)
    assert ink == (f"{melanoma} showing ink",)
    healthy, ill = folder_set.phrasings(chest)
    assert healthy == (
        "Chest X-ray of a subject with No Finding",
        "Chest X-ray showing No Finding",
        captions.CHEXPERT_NEUTRAL,
    )
    assert ill == ("Chest X-ray of a subject with Pneumonia", "Chest X-ray showing Pneumonia")


def test_skin_is_turned_and_chests_are_not(skin, chest, tmp_path):
    data = folder_set.build([skin, chest], SIZE, tmp_path / "train.npy", turned=True)
    assert len(data) == 6 * 8 + 2
    assert (data.position[data.domains[data.image] == "chest"] == 0).all()
    for image in np.flatnonzero(data.domains == "skin"):
        assert sorted(data.position[data.image == image]) == list(range(8))
    assert data.captions[0] == data.texts[data.image[0]]
    plain = folder_set.build([skin, chest], SIZE, tmp_path / "held.npy", turned=False)
    assert sorted(plain.image) == list(range(8))
    assert (plain.position == 0).all()


def test_the_positions_are_the_eight_of_a_square():
    pixels = np.arange(2 * 2 * 3, dtype=np.uint8).reshape(2, 2, 3)
    turned = {folder_set.turn(pixels, k).tobytes() for k in range(8)}
    assert len(turned) == 8
    assert np.array_equal(folder_set.turn(pixels, 0), pixels)
    assert np.array_equal(folder_set.turn(pixels, 4), pixels[:, ::-1])


def test_a_batch_is_what_the_files_hold(skin, tmp_path):
    data = folder_set.build([skin], SIZE, tmp_path / "train.npy", turned=True)
    batch = data.batch([3, 7])
    assert batch.shape == (2, 3, SIZE, SIZE)
    for row, view in zip(batch, (3, 7), strict=True):
        pixels = folder_set.turn(data.pixels[data.image[view]], data.position[view])
        assert np.array_equal(((row + 1) * 127.5).round().byte().permute(1, 2, 0).numpy(), pixels)


def test_decoded_images_are_taken_from_disk(skin, tmp_path, monkeypatch):
    first = folder_set.build([skin], SIZE, tmp_path / "train.npy", turned=True)
    monkeypatch.setattr(folder_set.images, "load_image", None)
    again = folder_set.build([skin], SIZE, tmp_path / "train.npy", turned=True)
    assert np.array_equal(first.pixels, again.pixels)
    with pytest.raises(TypeError):  # another size is another file
        folder_set.build([skin], 2 * SIZE, tmp_path / "train.npy", turned=True)


def test_chances_follow_shares_balance_and_boosts(skin, chest, tmp_path):
    data = folder_set.build([skin, chest], SIZE, tmp_path / "train.npy", turned=True)
    domain, text = data.domains[data.image], np.array([texts[0] for texts in data.captions])

    def share(chances, piece):
        return chances[[piece in one for one in text]].sum()

    plain = data.chances({"skin": 3, "chest": 1})
    assert plain.sum() == pytest.approx(1)
    assert plain[domain == "skin"].sum() == pytest.approx(0.75)
    assert share(plain, "no visible artifacts") == pytest.approx(0.75 / 6)
    even = data.chances({"skin": 3, "chest": 1}, balance=0.0)
    assert share(even, "no visible artifacts") == pytest.approx(0.75 / 4)
    boosted = data.chances({"skin": 3, "chest": 1}, 0.0, {"no visible artifacts": 3.0})
    assert share(boosted, "no visible artifacts") == pytest.approx(0.75 * 3 / 6)


def test_views_are_drawn_from_seed_and_step(skin, tmp_path):
    data = folder_set.build([skin], SIZE, tmp_path / "train.npy", turned=True)
    chances = data.chances({"skin": 1})
    one, again = (folder_set.draw_views(chances, 0, 5, 16) for _ in range(2))
    assert np.array_equal(one, again)
    assert not np.array_equal(one, folder_set.draw_views(chances, 0, 6, 16))
    assert not np.array_equal(one, folder_set.draw_views(chances, 1, 5, 16))
