"""Which kernels a run of tests takes: interpreted ones, or on a GPU those that users have."""

import pytest
from markers import only_on_a_gpu


@pytest.mark.parametrize("chosen", ["gpu", "gpu and not slow", "slow and gpu", "not not gpu"])
def test_tests_of_a_gpu_alone_run_its_kernels(chosen):
    assert only_on_a_gpu(chosen)


@pytest.mark.parametrize("chosen", ["", "slow", "not gpu", "slow or gpu", "not slow and not gpu", "not slow", "gpu or"])
def test_all_others_run_in_the_interpreter(chosen):
    assert not only_on_a_gpu(chosen)
