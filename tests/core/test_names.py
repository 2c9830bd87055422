"""A name that came, and the nearest that is known."""

import pytest

from ldm.names import nearest


@pytest.mark.parametrize(
    ("name", "known", "hint"),
    [
        ("hiar", ["hair", "ink"], "; did you mean 'hair'?"),
        ("pleural effusion", ["pleural_effusion"], "; did you mean 'pleural_effusion'?"),
        ("pleural_efusion", ["Pleural Effusion"], "; did you mean 'Pleural Effusion'?"),
        ("xylophone", ["hair", "ink"], ""),
        ("hair", [], ""),
    ],
)
def test_the_nearest_name(name, known, hint):
    assert nearest(name, known) == hint
