"""A classifier that is trained in a second."""

from ldm.train.augmentation import CHEXPERT
from ldm.train.classifier import Training

SIZE = 32
TINY = Training(
    lr=1e-3, weight_decay=0.0, epochs=2, augmentation=CHEXPERT, model="test_efficientnet", size=SIZE, batch=16,
    pretrained=False,
)  # fmt: skip
