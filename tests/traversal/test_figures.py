"""Pictures of runs: what is asked of the animation."""

import numpy as np
import pytest
from PIL import Image

from ldm.traversal.figures import save_animation


@pytest.mark.parametrize("equal", [(), (1,), (0, 1, 2, 3), (2, 3, 4)])
def test_every_point_of_a_curve_is_a_frame_also_beside_an_equal_one(tmp_path, equal):
    rng = np.random.default_rng(0)
    pixels = [rng.integers(0, 255, (20, 30, 3), dtype=np.uint8) for _ in range(5)]
    for i in equal:
        pixels[i] = pixels[0]
    save_animation(tmp_path / "a.gif", [Image.fromarray(image) for image in pixels])
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 5 + 3  # there and back
        shown = []
        for i in range(5):
            animation.seek(i)
            shown.append(np.asarray(animation.convert("RGB")))
    for i in equal:
        assert np.array_equal(shown[i], shown[0])  # to the eye they are equal
    assert len({image.tobytes() for image in shown}) == len({image.tobytes() for image in pixels})
