"""Folders of phantoms to train classifiers on.

Nothing here may import triton: pytest reads this file before `pytest_configure` says that kernels are interpreted.
"""

from pathlib import Path

import pytest

from ldm.data import folders, splits
from ldm.data.labelled import LabelledImages
from ldm.phantom.folders import write as write_phantoms
from ldm.phantom.items import Order


@pytest.fixture(scope="module")
def chest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from classifier_training import SIZE

    return write_phantoms("chest", tmp_path_factory.mktemp("chest") / "data", Order(n=80, size=SIZE))


@pytest.fixture(scope="module")
def skin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from classifier_training import SIZE

    return write_phantoms("skin", tmp_path_factory.mktemp("skin") / "data", Order(n=120, size=SIZE))


@pytest.fixture
def parts(chest: Path) -> tuple[LabelledImages, LabelledImages]:
    data = folders.read(chest)
    split = splits.grouped(data)
    return data.select(split.train), data.select(split.validation)
