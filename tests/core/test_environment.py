"""What `import ldm` asks of torch's threads, before torch reads it; and what sampling need not import."""

import os
import subprocess
import sys

import pytest

PRINTED = "import os, ldm; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("set_by_the_user", "holds"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_wait_asleep_unless_the_user_says_otherwise(set_by_the_user: dict[str, str], holds: str) -> None:
    usual = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    ran = subprocess.run(
        [sys.executable, "-c", PRINTED], env=usual | set_by_the_user, capture_output=True, text=True, check=True
    )
    assert ran.stdout.strip() == holds


WHO_IS_FIRST = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and "ldm" not in sys.modules:
            sys.exit("torch before ldm")

sys.meta_path.insert(0, Finder())
from ldm_tools.cli import main
main(["evaluate", "--help"])
"""


def test_a_command_whose_file_imports_torch_first_imports_ldm_before_it() -> None:
    ran = subprocess.run([sys.executable, "-c", WHO_IS_FIRST], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


SLOW_TO_IMPORT = {"matplotlib", "pandas", "scipy", "skimage", "sklearn", "timm", "torchvision"}


@pytest.mark.parametrize("command", ["generate", "traverse", "invert"])
def test_sampling_begins_without_what_only_data_and_figures_need(command: str) -> None:
    code = f"import ldm, sys, ldm_tools.{command}; print(*{{name.split('.')[0] for name in sys.modules}})"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not SLOW_TO_IMPORT & set(ran.stdout.split())
