"""The yardstick itself: the generator makes the published bits, and a comparison sees what it should."""

import json
import zlib

import numpy as np
import pytest
import torch
from reference import FORWARD, Golden, bell, image, noise, weight

# crc32 of the little-endian bytes, published with the reference vectors. Among them: a convolution, a bias, a norm,
# a key projection (scaled by 1.5), an embedding; seeds 0, 1 and one above 32 bits.
FINGERPRINTS = [
    ("model.diffusion_model.input_blocks.0.0.weight", (320, 4, 3, 3), 0, 69520246),
    ("model.diffusion_model.time_embed.0.bias", (1280,), 0, 1705741029),
    ("model.diffusion_model.out.0.weight", (320,), 1, 3770610387),
    (
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight",
        (1280, 768),
        1,
        3937775856,
    ),
    (
        "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
        (77, 768),
        2**40 + 7,
        2119487907,
    ),
]


@pytest.mark.parametrize(("name", "shape", "seed", "crc"), FINGERPRINTS, ids=[row[0] for row in FINGERPRINTS])
def test_the_generator_makes_the_published_bits(name, shape, seed, crc):
    values = weight(name, shape, seed)
    assert values.shape == shape
    assert zlib.crc32(values.astype("<f4").tobytes()) == crc


def test_a_tensor_longer_than_one_piece_continues_its_stream():
    # Values are generated in pieces; a prefix must not depend on how long the whole is.
    whole = bell("x", (200_000,), 1.0, 0.0)
    assert np.array_equal(bell("x", (70_000,), 1.0, 0.0), whole[:70_000])
    assert len(np.unique(whole[:1000])) > 990
    assert not np.array_equal(whole[:1000], whole[65536:66536])


def test_test_inputs_have_unit_variance_and_images_their_range():
    x = noise("some input", (1, 4, 64, 64))
    # 16384 independent values: the mean strays by 0.008, the standard deviation by 0.005; five times that is allowed.
    assert abs(float(x.mean())) < 0.04
    assert abs(float(x.std()) - 1) < 0.025
    picture = image("some image", 32, 48)
    assert picture.shape == (1, 3, 32, 48)
    assert (float(picture.min()), float(picture.max())) == (-1.0, 1.0)


def stored(tmp_path, monkeypatch, samples: int | None = None) -> tuple[Golden, torch.Tensor]:
    """A file with one tensor "x", whole or as samples and statistics, and that tensor."""
    values = np.random.default_rng(0).normal(size=(3, 400)).astype(np.float32)
    wide = values.astype(np.float64)
    arrays = {"x@stats": np.array([wide.mean(), wide.std(), np.linalg.norm(wide), wide.min(), wide.max()])}
    if samples is None:
        arrays["x"] = values
    else:
        index = np.arange(samples, dtype=np.int32)
        arrays |= {"x@idx": index, "x@val": values.reshape(-1)[index], "x@shape": np.array(values.shape)}
    arrays["@meta"] = np.frombuffer(json.dumps({"source": "a test"}).encode(), np.uint8)
    np.savez(tmp_path / "made.npz", **arrays)
    monkeypatch.setattr("reference.GOLDEN", tmp_path)
    return Golden("made"), torch.from_numpy(values)


@pytest.mark.parametrize("samples", [None, 100])
def test_a_comparison_measures_the_relative_difference(samples, tmp_path, monkeypatch):
    reference, values = stored(tmp_path, monkeypatch, samples)
    assert reference.names() == ["x"]
    assert reference.meta == {"source": "a test"}
    # Statistics are recomputed in another order: the last bits of float64 differ.
    assert reference.error("x", values) < 1e-12
    assert reference.error("x", values * 1.001) == pytest.approx(1e-3, rel=1e-3)


def test_a_mistake_outside_the_samples_is_seen(tmp_path, monkeypatch):
    reference, values = stored(tmp_path, monkeypatch, samples=100)
    values[2] += 0.01  # none of the first 100 values
    assert reference.error("x", values) > 10 * FORWARD


@pytest.mark.parametrize("samples", [None, 100])
@pytest.mark.parametrize("place", [(0, 5), (2, 5)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_value_that_is_not_finite_is_an_error_wherever_it_is(value, place, samples, tmp_path, monkeypatch):
    reference, values = stored(tmp_path, monkeypatch, samples)
    values[place] = value
    with pytest.raises(AssertionError, match="x: 1 values are not finite"):
        reference.error("x", values)


@pytest.mark.parametrize("samples", [None, 100])
def test_another_shape_is_an_error(samples, tmp_path, monkeypatch):
    reference, values = stored(tmp_path, monkeypatch, samples)
    with pytest.raises(AssertionError, match=r"x: \(400, 3\), reference \(3, 400\)"):
        reference.error("x", values.T)
