"""Small folders that look like the data sets that are read, made by the tests that read them."""

import csv
import gzip
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from ldm.data.chexpert import OBSERVATIONS
from ldm.data.isic import DIAGNOSES, INFERRED, METADATA, TRUTH

AKIEC_SET = ("MEL", "NV", "BCC", "AKIEC", "BKL", "DF", "VASC")  # the diagnoses of 2018
CHEXPERT_COLUMNS = ("Path", "Sex", "Age", "Frontal/Lateral", "AP/PA", *OBSERVATIONS)
INFERRED_COLUMNS = (
    *("", "image", "dark_corner", "hair", "gel_border", "gel_bubble", "ruler", "ink", "patches", "vasc"),
    *("label", "label_string"),
)


def write_csv(
    path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, object]], eol: str = "\n", separator: str = ","
) -> Path:
    """Cells that a row leaves out are empty."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator=eol, delimiter=separator)
        writer.writeheader()
        writer.writerows(rows)
    return path


def radiograph(path: str, **cells: object) -> dict[str, object]:
    """A row of train.csv; a label is given as pleural_effusion=1.0."""
    named = {name.lower().replace(" ", "_"): name for name in OBSERVATIONS}
    view = "Lateral" if path.endswith("lateral.jpg") else "Frontal"
    row = {
        "Path": path,
        "Sex": "Female",
        "Age": 61,
        "Frontal/Lateral": view,
        "AP/PA": "AP" if view == "Frontal" else "",
    }
    return row | {named.get(key, key): value for key, value in cells.items()}


def chexpert(
    folder: Path,
    rows: Iterable[Mapping[str, object]],
    name: str = "train.csv",
    columns: Sequence[str] = CHEXPERT_COLUMNS,
) -> Path:
    """A label file in the folder. Returns the folder."""
    write_csv(folder / name, columns, rows)
    return folder


def many_radiographs(patients: int, each: int = 3) -> list[dict[str, object]]:
    """Patients with some studies; effusion in every second, devices in every third image."""
    return [
        radiograph(
            f"CheXpert-v1.0-small/train/patient{patient:05d}/study{study}/view1_frontal.jpg",
            pleural_effusion=float((patient + study) % 2),
            support_devices=float((patient * each + study) % 3 == 0),
        )
        for patient in range(1, patients + 1)
        for study in range(1, each + 1)
    ]


def isic(
    folder: Path,
    diagnoses: Mapping[str, str],
    lesions: Mapping[str, str] | None = None,
    inferred: Mapping[str, Mapping[str, float]] | None = None,
    number: type = float,
    eol: str = "\n",
) -> Path:
    """An ISIC folder, which is returned.

    Args:    diagnoses, lesions: image -> "MEL", lesion id.  inferred: image -> artifact -> probability.
    """
    truth = [
        {"image": image} | {name: number(name == diagnosis) for name in DIAGNOSES}
        for image, diagnosis in diagnoses.items()
    ]
    write_csv(folder / TRUTH, ("image", *DIAGNOSES), truth, eol)
    if lesions is not None:
        rows = [{"image": image, "lesion_id": lesions.get(image, ""), "sex": "male"} for image in diagnoses]
        write_csv(folder / METADATA, ("image", "age_approx", "anatom_site_general", "lesion_id", "sex"), rows, eol)
    if inferred is not None:
        write_inferred(folder / INFERRED, inferred)
    return folder


def write_inferred(path: Path, inferred: Mapping[str, Mapping[str, float]]) -> Path:
    """The file of probabilities: an index without a name first, "malignant" in every row."""
    rows = [
        dict.fromkeys(INFERRED_COLUMNS, 0.01)
        | {"": i, "image": image, "label": 0, "label_string": "malignant"}
        | values
        for i, (image, values) in enumerate(inferred.items())
    ]
    return write_csv(path, INFERRED_COLUMNS, rows)


def read_rows(path: Path) -> list[dict[str, str]]:
    """All rows of a csv file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def picture(path: Path, size: tuple[int, int] = (20, 16), grey: int = 90) -> Path:
    """A grey image, in the format that its name says. Args: size: width, height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, grey).save(path)
    return path


# ---------------------------------------------------------------- other sets, each with two oddities of its files


def isic2018(folder: Path) -> Path:
    """Unpacked as the archive's zip files are: each in a folder of its own name; one image is a PNG."""
    diagnoses = {"ISIC_0024306": "NV", "ISIC_0024307": "MEL", "ISIC_0024308": "AKIEC", "ISIC_0024309": "NV"}
    rows = [{"image": image, **{name: float(name == code) for name in AKIEC_SET}} for image, code in diagnoses.items()]
    home = folder / "ISIC2018_Task3_Training_GroundTruth"
    write_csv(home / "ISIC2018_Task3_Training_GroundTruth.csv", ("image", *AKIEC_SET), rows)
    lesions = [{"image": image, "lesion_id": f"HAM_{i // 2}"} for i, image in enumerate(diagnoses)]
    columns = ("image", "lesion_id", "diagnosis_confirm_type")
    write_csv(folder / "ISIC2018_Task3_Training_LesionGroupings.csv", columns, lesions)
    for image in diagnoses:
        extension = ".png" if image.endswith("7") else ".jpg"
        picture(folder / "ISIC2018_Task3_Training_Input" / f"{image}{extension}")
    return folder


def isic2020(folder: Path) -> Path:
    """Kaggle's: train.csv, images in jpeg/train; some benign images without a diagnosis, Windows line ends."""
    columns = ("image_name", "patient_id", "sex", "age_approx", "anatom_site_general_challenge")
    columns += ("diagnosis", "benign_malignant", "target")
    diagnoses = ["melanoma", "nevus", "unknown", "solar lentigo", "nevus"]
    rows = [
        {
            **{"image_name": f"ISIC_001571{i}", "patient_id": f"IP_{i // 2}", "diagnosis": diagnosis},
            **{"benign_malignant": "x", "target": int(diagnosis == "melanoma")},
        }
        for i, diagnosis in enumerate(diagnoses)
    ]
    write_csv(folder / "train.csv", columns, rows, "\r\n")
    for row in rows:
        picture(folder / "jpeg/train" / f"{row['image_name']}.jpg")
    return folder


def ham10000(folder: Path) -> Path:
    """The Dataverse's: tabs and no extension; images in two folders, one of which writes .JPG."""
    columns = ("lesion_id", "image_id", "dx", "dx_type", "age", "sex", "localization", "dataset")
    rows = [
        {"lesion_id": f"HAM_{i // 2}", "image_id": f"ISIC_002741{i}", "dx": dx, "age": 50.0}
        for i, dx in enumerate(["bkl", "nv", "nv", "mel", "akiec"])
    ]
    write_csv(folder / "HAM10000_metadata", columns, rows, separator="\t")
    for i, row in enumerate(rows):
        place = "HAM10000_images_part_1" if i < 3 else "HAM10000_images_part_2"
        picture(folder / place / f"{row['image_id']}{'.jpg' if i < 3 else '.JPG'}")
    return folder


def mimic(folder: Path) -> Path:
    """MIMIC-CXR-JPG: compressed tables; a study with two views, one without labels, an image as PNG."""
    labels = [
        {"subject_id": 10000032, "study_id": 50414267, "Pleural Effusion": 1.0, "Support Devices": -1.0},
        {"subject_id": 10000764, "study_id": 57375967, "No Finding": 1.0},
    ]
    names = sorted(OBSERVATIONS)
    write_csv(folder / "mimic-cxr-2.0.0-chexpert.csv", ("subject_id", "study_id", *names), labels)
    views = [
        ("02aa804e-bde0afdd", 10000032, 50414267, "PA"),
        ("174413ec-4ec4c1f7", 10000032, 50414267, "LATERAL"),
        ("096052b7-d256dc40", 10000764, 57375967, "AP"),
        ("aaaaaaaa-d256dc40", 10000935, 50578979, "AP"),
    ]
    columns = ("dicom_id", "subject_id", "study_id", "ViewPosition")
    rows = [dict(zip(columns, view, strict=True)) for view in views]
    write_csv(folder / "mimic-cxr-2.0.0-metadata.csv", columns, rows)
    parts = [{**row, "split": part} for row, part in zip(rows, ("train", "train", "validate", "test"), strict=True)]
    write_csv(folder / "mimic-cxr-2.0.0-split.csv", ("dicom_id", "study_id", "subject_id", "split"), [
        {name: row[name] for name in ("dicom_id", "study_id", "subject_id", "split")} for row in parts
    ])  # fmt: skip
    for path in sorted(folder.glob("*.csv")):
        (folder / f"{path.name}.gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    for image, subject, study, _ in views:
        extension = ".png" if image.startswith("096") else ".jpg"
        picture(folder / f"files/p10/p{subject}/s{study}/{image}{extension}")
    return folder


def nih(folder: Path) -> Path:
    """ChestX-ray14: a comma in a column's name, one at the line's end, images in several folders."""
    header = (
        "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
        "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],"
    )
    rows = [
        "00000001_000.png,Cardiomegaly,0,1,58,M,PA,2682,2749,0.143,0.143,",
        "00000001_001.png,Cardiomegaly|Effusion,1,1,58,M,PA,2894,2729,0.143,0.143,",
        "00000002_000.png,No Finding,0,2,81,M,PA,2500,2048,0.171,0.171,",
        "00000003_000.png,Pleural_Thickening|Hernia,0,3,74,F,AP,2500,2048,0.168,0.168,",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "Data_Entry_2017.csv").write_text("\n".join([header, *rows]) + "\n")
    for i, row in enumerate(rows):
        picture(folder / f"images_00{1 + i // 2}/images" / row.split(",")[0])
    return folder


def padchest(folder: Path) -> Path:
    """PadChest: lists as Python writes them, an index without a name, spaces in labels, laterals, exclusions."""
    columns = ("", "ImageID", "ImageDir", "StudyID", "PatientID", "Projection", "MethodLabel", "Labels")
    cells = [
        ("PA", "['pleural effusion', 'cardiomegaly']"),
        ("L", "['pleural effusion']"),
        ("AP_horizontal", "['pacemaker', ' cardiomegaly']"),
        ("PA", "['normal']"),
        ("PA", "['exclude']"),
        ("PA", ""),
    ]
    rows = [
        {
            **{"": i, "ImageID": f"2168_{i}.png", "ImageDir": i % 2, "PatientID": i // 2},
            **{"Projection": view, "Labels": labels, "MethodLabel": "Physician"},
        }
        for i, (view, labels) in enumerate(cells)
    ]
    write_csv(folder / "PADCHEST_chest_x_ray_images_labels_160K_01.02.19.csv", columns, rows)
    for row in rows:
        picture(folder / str(row["ImageDir"]) / str(row["ImageID"]))
    return folder


def vindr(folder: Path) -> Path:
    """VinDr-CXR: three radiologists an image, tables in a folder of their own, `.dicom` files that are PNG here."""
    columns = ("image_id", "rad_id", "Aortic enlargement", "Pleural effusion", "Lung Opacity", "No finding")
    votes = {"aa": [(0, 1, 0, 0), (0, 1, 1, 0), (1, 0, 0, 0)], "bb": [(0, 0, 0, 1)] * 3}
    rows = [
        dict(zip(columns, (image, f"R{i}", *given), strict=True))
        for image, each in votes.items()
        for i, given in enumerate(each)
    ]
    write_csv(folder / "annotations/image_labels_train.csv", columns, rows)
    for image in votes:
        picture(folder / "train" / f"{image}.png")
    return folder


def hospital(folder: Path) -> Path:
    """A table as Excel writes it in Germany: semicolons, Windows-1252; yes and no, words, a gap."""
    lines = [
        "Bild;patient_id;Erguß;device;report",
        "a/1.png;7;ja;tube|pacemaker;x",
        "a/2.png;7;nein;;y",
        "a/3.png;8;ja;tube;z",
        "a/4.png;9;;none;z",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.csv").write_bytes("\r\n".join([*lines, ""]).encode("cp1252"))
    for i in range(1, 5):
        picture(folder / f"a/{i}.png")
    return folder
