"""CheXpert: where labels and images are found, what each cell means under each policy, and what is refused."""

import math
from pathlib import Path

import lookalikes
import numpy as np
import pytest
from lookalikes import CHEXPERT_COLUMNS, chexpert, picture, radiograph

from ldm.data import chexpert as reader
from ldm.phantom.folders import write as write_phantoms
from ldm.phantom.items import Order

FRONTAL = "train/patient00001/study1/view1_frontal.jpg"
LATERAL = "train/patient00001/study1/view2_lateral.jpg"
OTHER = "train/patient00002/study91/view3_frontal.jpg"


# ---------------------------------------------------------------- where things are


@pytest.mark.parametrize("prefix", ["CheXpert-v1.0-small", "CheXpert-v1.0"])
@pytest.mark.parametrize(("labels", "given"), [("inside", "around"), ("inside", "folder"), ("beside", "around")])
def test_the_folder_of_a_download_is_found(tmp_path, prefix, labels, given):
    """The label file in the download's folder or beside it; the root is either."""
    inside = tmp_path / prefix
    picture(inside / FRONTAL)
    chexpert(inside if labels == "inside" else tmp_path, [radiograph(f"{prefix}/{FRONTAL}")])
    images = reader.read(inside if given == "folder" else tmp_path)
    assert images.files.tolist() == [str(inside / FRONTAL)]
    assert images.keys.tolist() == [FRONTAL]
    assert images.groups.tolist() == ["patient00001"]


@pytest.mark.parametrize("prefix", ["", "CheXpert-v1.0-small/", "CheXpert-v1.0/"])
def test_a_folder_may_have_any_name(tmp_path, prefix):
    picture(tmp_path / "chest" / FRONTAL)
    chexpert(tmp_path / "chest", [radiograph(prefix + FRONTAL)])
    assert reader.read(tmp_path / "chest").files.tolist() == [str(tmp_path / "chest" / FRONTAL)]


def test_images_need_not_exist(tmp_path):
    chexpert(tmp_path / "CheXpert-v1.0-small", [radiograph(f"CheXpert-v1.0-small/{FRONTAL}")])
    assert reader.read(tmp_path).files.tolist() == [str(tmp_path / "CheXpert-v1.0-small" / FRONTAL)]


@pytest.mark.parametrize("inside", [False, True])
def test_batches_of_the_full_download(tmp_path, inside):
    """The patient's number selects the batch, at the limits too; the validation set lies in the first."""
    first = tmp_path / "CheXpert-v1.0 batch 1 (validate & csv)"
    batch = {"00001": "2 (train 1)", "21513": "2 (train 1)", "21514": "3 (train 2)", "43017": "3 (train 2)"}
    batch |= {"43018": "4 (train 3)", "64540": "4 (train 3)"}
    path = "patient{}/study1/view1_frontal.jpg"
    files = [picture(tmp_path / f"CheXpert-v1.0 batch {name}" / path.format(p)) for p, name in batch.items()]
    chexpert(first, [radiograph(f"CheXpert-v1.0/train/{path.format(p)}") for p in batch])
    images = reader.read(first if inside else tmp_path)
    assert images.files.tolist() == [str(file) for file in files]

    valid = picture(first / "valid" / path.format("64541"))
    chexpert(first, [radiograph(f"CheXpert-v1.0/valid/{path.format('64541')}")], "valid.csv")
    for layout in ("auto", "batches"):
        assert reader.read(tmp_path, csv="valid.csv", layout=layout).files.tolist() == [str(valid)]


def test_a_training_patient_beyond_the_batches_is_refused(tmp_path):
    chexpert(tmp_path, [radiograph("train/patient64541/study1/view1_frontal.jpg")])
    with pytest.raises(ValueError, match=r"patient64541 is in no batch.*64541"):
        reader.read(tmp_path, layout="batches")


# ---------------------------------------------------------------- rows


def test_lateral_views_are_left_out_unless_asked_for(tmp_path):
    chexpert(tmp_path, [radiograph(FRONTAL), radiograph(LATERAL), radiograph(OTHER)])
    images = reader.read(tmp_path)
    assert images.keys.tolist() == [FRONTAL, OTHER]
    assert images.frame.index.tolist() == [0, 2]  # the row in the file
    assert images.in_paper.all()
    everything = reader.read(tmp_path, frontal_only=False)
    assert everything.keys.tolist() == [FRONTAL, LATERAL, OTHER]
    assert everything.in_paper.tolist() == [True, False, True]


def test_views_are_told_by_the_name_where_there_is_no_column(tmp_path):
    columns = [name for name in CHEXPERT_COLUMNS if name not in ("Frontal/Lateral", "AP/PA", "Sex", "Age")]
    rows = [{name: row.get(name, "") for name in columns} for row in (radiograph(FRONTAL), radiograph(LATERAL))]
    chexpert(tmp_path, rows, columns=columns)
    assert reader.read(tmp_path).keys.tolist() == [FRONTAL]


def test_odd_ages_sexes_and_projections_are_read(tmp_path):
    odd = [radiograph(FRONTAL, Sex="Unknown", Age=0), radiograph(OTHER, **{"AP/PA": "LL"})]
    images = reader.read(chexpert(tmp_path, odd))
    assert len(images) == 2
    assert images.frame["Sex"].tolist() == ["Unknown", "Female"]
    assert images.frame["AP/PA"].tolist() == ["AP", "LL"]


@pytest.mark.parametrize("eol", ["\n", "\r\n"])
@pytest.mark.parametrize("bom", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("one", ["1.0", "1"])
def test_line_ends_and_codings(tmp_path, eol, bom, one):
    rows = [radiograph(FRONTAL, pleural_effusion=one, edema=f"-{one}"), radiograph(OTHER)]
    path = lookalikes.write_csv(tmp_path / "train.csv", [*CHEXPERT_COLUMNS[::-1], "note"], rows, eol)
    path.write_bytes(bom + path.read_bytes())
    images = reader.read(tmp_path, attributes=("edema", "pleural_effusion"))
    assert images.labels.tolist() == [[1, 1], [0, 0]]


# ---------------------------------------------------------------- policies


@pytest.mark.parametrize(("uncertain", "of_minus_one"), [("ones", 1.0), ("zeros", 0.0), ("ignore", math.nan)])
@pytest.mark.parametrize(("empty", "of_empty"), [("zero", 0.0), ("mask", math.nan)])
def test_policies(tmp_path, uncertain, of_minus_one, empty, of_empty):
    cells = [1.0, 0.0, -1.0, ""]
    rows = [
        radiograph(f"train/patient{i:05d}/study1/view1_frontal.jpg", pleural_effusion=cell)
        for i, cell in enumerate(cells)
    ]
    images = reader.read(chexpert(tmp_path, rows), uncertain=uncertain, empty=empty)
    expected = np.array([1.0, 0.0, of_minus_one, of_empty], dtype=np.float32)
    np.testing.assert_array_equal(images.labels[:, 0], expected)
    assert images.labels.dtype == np.float32
    assert images.counts() == {"Pleural Effusion": int((expected == 1).sum()), "Support Devices": 0}
    assert images.frame["Pleural Effusion"].fillna(9).tolist() == [1, 0, -1, 9]  # the file's own cells


def test_captions_follow_the_policy(tmp_path):
    folder = chexpert(tmp_path, [radiograph(FRONTAL, pleural_effusion=-1.0, support_devices=1.0)])
    both = "Chest X-ray of a subject with Pleural Effusion, Support Devices"
    assert reader.read(folder).captions().tolist() == [both]
    assert reader.read(folder, uncertain="ignore").captions("code").tolist() == ["Chest X-ray showing Support Devices"]


def test_any_observation_is_an_attribute(tmp_path):
    folder = chexpert(tmp_path, [radiograph(FRONTAL, lung_opacity=1.0)])
    images = reader.read(folder, attributes=("lung_opacity", "No Finding"))
    assert images.attributes == ("lung_opacity", "no_finding")
    assert images.labels.tolist() == [[1, 0]]


def test_select_keeps_everything_together(tmp_path):
    rows = [radiograph(FRONTAL, support_devices=1.0), radiograph(LATERAL), radiograph(OTHER, pleural_effusion=1.0)]
    images = reader.read(chexpert(tmp_path, rows), frontal_only=False)
    for some in (images.select(np.array([2, 0])), images.select([False, False, True]).select([0])):
        assert some.keys[0] == OTHER
        assert some.labels[0].tolist() == [1, 0]
        assert some.groups[0] == "patient00002"
        assert some.files[0].endswith(OTHER)
        assert some.captions()[0].endswith("Pleural Effusion")
        assert some.frame["Path"].iloc[0] == OTHER
    assert len(images.select([])) == 0
    with pytest.raises(ValueError, match="mask of 2 for 3"):
        images.select(np.array([True, False]))


# ---------------------------------------------------------------- phantoms


def test_phantoms_read_back(tmp_path):
    """Every label that was drawn comes back, for both files, and every image lies where it is said to."""
    write_phantoms("chest", tmp_path / "chest", Order(n=24, seed0=5, size=32))
    truth = {row["path"]: row for row in lookalikes.read_rows(tmp_path / "chest/phantom.csv")}
    for csv, count in (("train.csv", 22), ("valid.csv", 2)):
        images = reader.read(tmp_path / "chest", csv=csv)
        assert len(images) == count
        for file, labels in zip(images.files, images.labels, strict=True):
            drawn = truth[Path(file).relative_to(tmp_path / "chest").as_posix()]
            assert labels.tolist() == [float(drawn[name]) for name in images.attributes]
            assert Path(file).is_file()


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"csv": "trian.csv"}, "csv: no 'trian.csv' in .*; did you mean 'train.csv'"),
        ({"uncertain": "one"}, "uncertain: got 'one'; did you mean 'ones'"),
        ({"empty": "ignore"}, "empty: got 'ignore'; expected one of zero, mask"),
        ({"layout": "tre"}, "layout: got 'tre'; did you mean 'tree'"),
        ({"attributes": ("pleural_efusion",)}, "attributes: got 'pleural_efusion'; did you mean 'pleural_effusion'"),
    ],
)
def test_unknown_options_are_refused(tmp_path, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        reader.read(chexpert(tmp_path, [radiograph(FRONTAL)]), **options)


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        (
            radiograph(OTHER, edema=0.5),
            r"line 3: Edema is '0.5', expected 1, 0, -1 or empty \(1 such",
        ),
        (radiograph(OTHER, edema=2), r"line 3: Edema is '2.0', expected 1, 0, -1"),
        (radiograph(OTHER, edema="yes"), r"line 3: Edema is 'yes', expected 1, 0, -1"),
        (radiograph("train/00002/view1_frontal.jpg"), r"line 3: Path is 'train/00002/view1_frontal.jpg', expected"),
        (radiograph(""), r"line 3: Path is '', expected"),
        (radiograph("CheXpert-v1.0/" + FRONTAL), "line 3: 'train/patient00001/.*' for the second time"),
    ],
)
def test_cells_that_do_not_fit_are_named_by_line(tmp_path, row, complaint):
    with pytest.raises(ValueError, match=complaint):
        reader.read(chexpert(tmp_path, [radiograph(FRONTAL), row]))


def test_a_misspelt_column_offers_the_nearest(tmp_path):
    columns = ["Pleural Efusion" if name == "Pleural Effusion" else name for name in CHEXPERT_COLUMNS]
    with pytest.raises(ValueError, match="no column 'Pleural Effusion'; did you mean 'Pleural Efusion'"):
        reader.read(chexpert(tmp_path, [radiograph(FRONTAL)], columns=columns))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "cannot be read as a csv table"),
        (",".join(CHEXPERT_COLUMNS).encode(), "a header and no rows"),
        (b"\xff\xfe\x00\x01", "cannot be read as a csv table"),
        (b"a,b\n1,2\n", "no column 'Path'"),
        (b"a,b\n1,2\n1,2,3\n", "cannot be read as a csv table.*line 3"),
    ],
)
def test_files_that_are_no_label_files(tmp_path, content, complaint):
    (tmp_path / "train.csv").write_bytes(content)
    with pytest.raises(ValueError, match=complaint) as caught:
        reader.read(tmp_path)
    assert "train.csv" in str(caught.value)


def test_no_frontal_view_left(tmp_path):
    with pytest.raises(ValueError, match="1 rows and no frontal view"):
        reader.read(chexpert(tmp_path, [radiograph(LATERAL)]))


def test_two_downloads_in_one_folder(tmp_path):
    for prefix in reader.PREFIXES:
        chexpert(tmp_path / prefix, [radiograph(f"{prefix}/{FRONTAL}")])
    with pytest.raises(ValueError, match="several data sets"):
        reader.read(tmp_path)
