"""What the drawn patients are called: every prompt and caption of the phantoms, in the words of the paper.

A cell is one neutral prompt and the attributes that are swapped into it. The paper has three: healthy chests,
melanomas, nevi. A domain is all that the shipped model can be asked for from one neutral prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ldm.data import captions

GUIDANCE = 3.0  # where the shipped model draws every attribute and clean neutral images: see weights/README.md

# Attributes of a chest, extras too, as CheXpert's labels name them.
CHEST_LABELS = {
    "pleural_effusion": "Pleural Effusion",
    "support_devices": "Support Devices",
    "cardiomegaly": "Cardiomegaly",
}
TITLES = {
    "pleural_effusion": "Pleural effusion",
    "support_devices": "Support devices",
    "melanoma": "Melanoma",
    "hair": "Hair",
    "gel_bubble": "Gel bubbles",
    "ruler": "Ruler",
    "ink": "Ink",
}
# The words of a style's prompt that name its attribute.
ATTRIBUTE_WORDS = {
    "pleural_effusion": ("pleural", "effusion"),
    "support_devices": ("support", "devices"),
    "hair": ("hairs",),
    "gel_bubble": ("gel", "bubbles"),
    "ruler": ("ruler",),
    "ink": ("ink",),
    "melanoma": ("melanoma",),
}


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


def chest_style(attribute: str) -> str:
    """The prompt of a chest that shows one attribute."""
    return captions.chexpert({CHEST_LABELS[attribute]: 1.0})


def _skin(name: str, title: str, diagnosis: str) -> Cell:
    styles = {artifact: captions.isic_style(diagnosis, artifact) for artifact in captions.ISIC_CAPTION_ARTIFACTS}
    return Cell(name, title, captions.ISIC_NEUTRAL[diagnosis], styles, "skin", {"melanoma": diagnosis == "MEL"})


CHEST_STYLES = {name: chest_style(name) for name in ("pleural_effusion", "support_devices")}
CELLS = {
    "chest": Cell("chest", "Chest X-ray", captions.CHEXPERT_NEUTRAL, CHEST_STYLES, "chest"),
    "melanoma": _skin("melanoma", "Melanoma", "MEL"),
    "nevus": _skin("nevus", "Melanocytic nevus", "NV"),
}

# The nevus, and the other diagnosis as one more attribute: all that the skin's prompts can ask for.
SKIN_STYLES = {**CELLS["nevus"].styles, "melanoma": captions.ISIC_NEUTRAL["MEL"]}
DOMAINS = {"chest": CELLS["chest"], "skin": replace(CELLS["nevus"], name="skin", styles=SKIN_STYLES)}


def phrasings(domain: str, attributes: Mapping[str, bool]) -> tuple[str, ...]:
    """The captions that one image goes by, one of which is drawn each time that a model in training sees it.

    They are all wordings of the paper and of its code; a clean lesion is also called by the bare stem, the neutral
    prompt of the paper's traversals.
    """
    if domain == "chest":
        labels = {label: float(attributes.get(name, False)) for name, label in CHEST_LABELS.items()}
        choices = [captions.chexpert(labels, "paper"), captions.chexpert(labels, "code")]
        if not (labels["Pleural Effusion"] or labels["Cardiomegaly"]):  # devices are no finding
            choices.append(captions.chexpert(labels | {"No Finding": 1.0}, "paper"))
        return tuple(choices)
    diagnosis = "MEL" if attributes["melanoma"] else "NV"
    artifacts = [name for name in captions.ISIC_CAPTION_ARTIFACTS if attributes[name]]
    choices = [captions.isic(diagnosis, artifacts)]
    if not artifacts:
        choices.append(captions.ISIC_NEUTRAL[diagnosis])
    if len(artifacts) == 1:
        choices.append(captions.isic_style(diagnosis, artifacts[0]))
    return tuple(choices)
