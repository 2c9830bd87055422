"""What `import ldm` asks of torch's threads, before torch reads it."""

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
