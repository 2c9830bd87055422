"""What tests of the bench share."""

from pathlib import Path

import pytest
from tiny_model import write_tiny_model


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole model of random weights; not to be written into."""
    return write_tiny_model(tmp_path_factory.mktemp("bench") / "tiny.safetensors")
