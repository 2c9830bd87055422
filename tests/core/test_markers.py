"""Which kernels a run of tests takes: interpreted ones, or on a GPU those that users have."""

import subprocess
import sys
from pathlib import Path

import pytest
from markers import only_on_a_gpu

TESTS = Path(__file__).parents[1]


@pytest.mark.parametrize("chosen", ["gpu", "gpu and not slow", "slow and gpu", "not not gpu"])
def test_tests_of_a_gpu_alone_run_its_kernels(chosen):
    assert only_on_a_gpu(chosen)


@pytest.mark.parametrize("chosen", ["", "slow", "not gpu", "slow or gpu", "not slow and not gpu", "not slow", "gpu or"])
def test_all_others_run_in_the_interpreter(chosen):
    assert not only_on_a_gpu(chosen)


def test_no_conftest_imports_triton_before_it_is_told_to_interpret():
    """pytest reads those of the folders that it is given before `pytest_configure`; triton decides when imported."""
    files = [str(file) for file in sorted(TESTS.rglob("conftest.py"))]
    code = f"import runpy, sys\nsys.path.insert(0, {str(TESTS)!r})\nfor file in {files!r}: runpy.run_path(file)\n"
    subprocess.run([sys.executable, "-c", code + "assert 'triton' not in sys.modules"], check=True)
