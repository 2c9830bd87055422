"""Splits: the paper's recipe and its counts, groups that stay together, files that are read back."""

import lookalikes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from lookalikes import chexpert, isic, many_radiographs, radiograph
from sklearn.model_selection import train_test_split

from ldm.data import chexpert as chexpert_reader
from ldm.data import isic as isic_reader
from ldm.data import splits
from ldm.data.labelled import LabelledImages


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> LabelledImages:
    """120 images of 40 patients."""
    return chexpert_reader.read(chexpert(tmp_path_factory.mktemp("chest"), many_radiographs(40)))


def lengths(split: splits.Split) -> list[int]:
    return [len(rows) for rows in split.parts().values()]


# ---------------------------------------------------------------- the paper's


@pytest.mark.parametrize(
    ("count", "expected"),
    [(191_027, [138_016, 24_356, 28_655]), (16_616, [12_004, 2_119, 2_493])],
)
def test_the_counts_of_table_3(count, expected):
    """The frontal rows of CheXpert, and the annotated MEL and NV of ISIC 2019."""
    rest, test = splits._held_out(np.arange(count))
    train, validation = splits._held_out(rest)
    assert [len(train), len(validation), len(test)] == expected


def test_the_paper_split_is_two_shuffled_splits_of_scikit_learn(images):
    """Held against an implementation that is not ours; the second draw shuffles the rest in its permuted order."""
    split = splits.paper(images)
    rest, test = train_test_split(np.arange(len(images)), test_size=0.15, random_state=42)
    train, validation = train_test_split(rest, test_size=0.15, random_state=42)
    assert split.test.tolist() == sorted(test)
    assert split.validation.tolist() == sorted(validation)
    assert split.train.tolist() == sorted(train)


def test_the_paper_split_by_hand():
    """RandomState(42).permutation(10) is 8 1 5 0 7 2 9 4 3 6; the last eight of it are permuted
    by permutation(8), which is 1 5 0 7 2 4 3 6."""
    rest, test = splits._held_out(np.arange(10))
    assert test.tolist() == [8, 1]
    train, validation = splits._held_out(rest)
    assert validation.tolist() == [0, 4]
    assert train.tolist() == [5, 6, 7, 9, 2, 3]


def test_the_paper_split_ignores_what_the_paper_did_not_use(tmp_path):
    """Laterals, and images without annotation, are in no part and change no other row's part."""
    rows = many_radiographs(12)
    lateral = radiograph("CheXpert-v1.0-small/train/patient00001/study1/view2_lateral.jpg")
    frontal = chexpert_reader.read(chexpert(tmp_path / "a", rows))
    both = chexpert_reader.read(chexpert(tmp_path / "b", [lateral, *rows]), frontal_only=False)
    expected, found = splits.paper(frontal), splits.paper(both)
    assert [(rows + 1).tolist() for rows in expected.parts().values()] == [r.tolist() for r in found.parts().values()]

    diagnoses = {f"ISIC_{i:07d}": "MEL" if i % 3 else "NV" for i in range(40)}
    inferred = {name: {} for i, name in enumerate(diagnoses) if i % 4}
    lesions = isic_reader.read(isic(tmp_path / "c", diagnoses, None, inferred))
    used = np.concatenate(list(splits.paper(lesions).parts().values()))
    assert sorted(used) == [i for i in range(40) if i % 4]


def test_the_paper_split_leaks_and_the_share_is_measured(images):
    split = splits.paper(images)
    train = {images.groups[i] for i in split.train}
    expected = sum(images.groups[i] in train for i in split.test) / len(split.test)
    assert splits.leakage(images, split) == expected
    assert expected > 0.5  # three images a patient: a random split keeps few of them together


def test_the_paper_split_without_annotations_is_refused(tmp_path):
    images = isic_reader.read(isic(tmp_path, {f"ISIC_{i:07d}": "MEL" for i in range(9)}))
    with pytest.raises(ValueError, match=r"MEL and NV images with artifact annotations, of which .* gave 0"):
        splits.paper(images)


# ---------------------------------------------------------------- by group


def test_no_patient_is_in_two_parts(images):
    split = splits.grouped(images)
    parts = [set(images.groups[rows]) for rows in split.parts().values()]
    assert sum(map(len, parts)) == len(set(images.groups))
    assert sorted(np.concatenate(list(split.parts().values()))) == list(range(len(images)))
    assert splits.leakage(images, split) == 0
    assert lengths(split) == [84, 18, 18]  # whole patients of three; asked for are 86.7, 15.3, 18


def test_the_seed_decides(images):
    one, again, other = splits.grouped(images, 1), splits.grouped(images, 1), splits.grouped(images, 2)
    assert one.test.tolist() == again.test.tolist()
    assert one.test.tolist() != other.test.tolist()


def test_groups_of_unequal_size_come_near_the_fractions(tmp_path):
    """Patients of one to seven studies."""
    study = "train/patient{:05d}/study{}/view1_frontal.jpg"
    rows = [radiograph(study.format(patient, i)) for patient in range(200) for i in range(1 + patient % 7)]
    images = chexpert_reader.read(chexpert(tmp_path, rows))
    split = splits.grouped(images, fractions=(0.5, 0.25, 0.25))
    for rows_of_part, fraction in zip(split.parts().values(), (0.5, 0.25, 0.25), strict=True):
        assert abs(len(rows_of_part) - fraction * len(images)) <= 7  # the size of the largest group


def test_a_part_may_be_left_out(images):
    assert lengths(splits.grouped(images, fractions=(0.8, 0.2, 0.0))) == [96, 24, 0]


@pytest.mark.parametrize("fractions", [(0.5, 0.5), (0.5, 0.6, -0.1), (0.8, 0.1, 0.2), (0.0, 0.5, 0.5)])
def test_fractions_that_are_none(images, fractions):
    with pytest.raises(ValueError, match=r"fractions: got .* add up to 1"):
        splits.grouped(images, fractions=fractions)


def test_too_few_groups(images):
    with pytest.raises(ValueError, match="2 groups are too few"):
        splits.grouped(images.select(np.arange(6)))


@pytest.mark.parametrize("groups", range(3, 12))
def test_three_groups_are_enough(images, groups):
    """One image a group: test takes ceil(.15 n), validation ceil(.1275 n)."""
    some = images.select(np.arange(groups) * 3)
    test, validation = -(-15 * groups // 100), -(-1275 * groups // 10_000)
    assert lengths(splits.grouped(some)) == [groups - test - validation, validation, test]


# ---------------------------------------------------------------- by group and by label


def test_a_rare_label_is_in_every_part(tmp_path):
    """Eight patients of 120 have all the positives: by chance alone most of them fall into train."""
    study = "train/patient{:05d}/study{}/view1_frontal.jpg"
    rows = [
        radiograph(study.format(patient, i), support_devices=float(patient % 15 == 0), pleural_effusion=float(i % 2))
        for patient in range(120)
        for i in range(1 + patient % 4)
    ]
    images = chexpert_reader.read(chexpert(tmp_path, rows))
    plain, even = splits.grouped(images, seed=0), splits.stratified(images, seed=0)
    assert splits.leakage(images, even) == 0
    assert sorted(np.concatenate(list(even.parts().values()))) == list(range(len(images)))
    total = images.counts()
    for rows_of_part, fraction in zip(even.parts().values(), splits.PAPER_FRACTIONS, strict=True):
        counts = images.counts(rows_of_part)
        assert abs(counts["Support Devices"] - fraction * total["Support Devices"]) <= 4  # the largest group
        assert abs(counts["Pleural Effusion"] - fraction * total["Pleural Effusion"]) <= 4
        assert abs(len(rows_of_part) - fraction * len(images)) <= 4
    assert splits.uneven(images, even) == []
    assert splits.stratified(images, seed=0).test.tolist() == even.test.tolist()
    assert splits.stratified(images, seed=1).test.tolist() != even.test.tolist()
    assert plain.test.tolist() != even.test.tolist()


def test_an_uneven_split_is_said(images):
    devices = np.flatnonzero(images.labels[:, 1] == 1)
    others = np.flatnonzero(images.labels[:, 1] == 0)
    split = splits.Split(np.sort(np.concatenate([devices, others[:40]])), others[40:60], others[60:])
    (sentence,) = splits.uneven(images, split)
    assert sentence.startswith(
        "support_devices is uneven: of 40 images that show it 40 in train (27 would be its share)"
    )
    assert sentence.endswith("try --split stratified")


def test_stratified_parts_may_be_left_out_and_groups_too_few(images):
    assert len(splits.stratified(images, fractions=(0.8, 0.2, 0.0)).test) == 0
    with pytest.raises(ValueError, match="groups are too few"):
        splits.stratified(images.select(np.arange(6)))


# ---------------------------------------------------------------- files


@settings(max_examples=15)
@given(st.lists(st.sampled_from(["train", "validation", "test", ""]), min_size=120, max_size=120).filter(any))
def test_a_split_is_read_back(images, tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("split") / "split.csv"
    split = splits.Split(*(np.flatnonzero(np.array(parts) == name) for name in splits.PARTS))
    split.save(path, images)
    again = splits.load(path, images)
    assert {k: v.tolist() for k, v in again.parts().items()} == {k: v.tolist() for k, v in split.parts().items()}


def test_the_file_names_images_groups_and_parts(images, tmp_path):
    split = splits.grouped(images)
    split.save(tmp_path / "split.csv", images)
    rows = lookalikes.read_rows(tmp_path / "split.csv")
    assert len(rows) == len(images)
    assert rows[0]["image"] == "train/patient00001/study1/view1_frontal.jpg"
    assert rows[0]["group"] == "patient00001"
    assert rows[0]["split"] == next(name for name, r in split.parts().items() if 0 in r)
    assert [path.name for path in tmp_path.iterdir()] == ["split.csv"]


def test_a_split_of_the_small_set_fits_the_full_one(images, tmp_path):
    """And images that it does not name are in no part."""
    split = splits.grouped(images)
    split.save(tmp_path / "split.csv", images)
    extra = radiograph("train/patient00000/study1/view1_frontal.jpg")
    renamed = [row | {"Path": str(row["Path"]).replace("-small", "")} for row in many_radiographs(40)]
    full = chexpert_reader.read(chexpert(tmp_path, [extra, *renamed]))
    assert splits.load(tmp_path / "split.csv", full).test.tolist() == (split.test + 1).tolist()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("image,split\nnobody.jpg,train\n", "1 of its 1 images are not among the 120 of .* 'nobody.jpg'"),
        ("image,split\n{0},train\n{0},test\n", "line 3: .* for the second time"),
        ("image,split\n{0},tset\n", "got 'tset'; did you mean 'test'"),
        ("image,part\n{0},test\n", "no column 'split'"),
    ],
)
def test_files_that_do_not_fit(images, tmp_path, content, complaint):
    path = tmp_path / "split.csv"
    path.write_text(content.format(images.keys[0]))
    with pytest.raises(ValueError, match=complaint):
        splits.load(path, images)
