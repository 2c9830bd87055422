"""What tests of the explorer share."""

import pytest
from explorer_material import NASTY, phantom_domain

from ldm.study.report.explorer import Explorer, write


@pytest.fixture(scope="module")
def explorer():
    return Explorer(
        title=f"Trajectories {NASTY}",
        command="ldm demo --neutral \"it's\" --out 'a b'",
        note="All images are drawn.",
        domains=(
            phantom_domain("chest", ("pleural_effusion", "support_devices"), ((0, "generated"), (7, "rendered"))),
            phantom_domain("skin", ("hair", "ink"), ((3, "generated"),), note=f"Real; credit: {NASTY}"),
        ),
    )


@pytest.fixture(scope="module")
def page_path(explorer, tmp_path_factory):
    path = tmp_path_factory.mktemp("explorer") / "index.html"
    write(explorer, path)
    return path
