"""Two names for every weight: the tables against the names of the published files, and at other depths."""

import pytest
from tiny_checkpoints import manifest

from ldm.checkpoint import layouts
from ldm.checkpoint.layouts import Depth, depth_of, ema_key, from_single, is_vae_attention_weight, rename, to_single
from ldm.checkpoint.loading import build
from ldm.config import PHANTOM, SD15, Config, UNetConfig, VAEConfig

PARTS_IN_MANIFEST = {"clip": "text_encoder", "vae": "vae", "unet": "unet"}
OTHER_DEPTHS = [
    UNetConfig(widths=(32, 64, 128), resnets_per_level=1, attention=(False, True, True)),
    UNetConfig(widths=(32, 32), resnets_per_level=3, attention=(True, True)),
    UNetConfig(widths=(32,), resnets_per_level=2, attention=(True,)),
    PHANTOM.unet,
    VAEConfig(widths=(32, 32, 64), resnets_per_level=3),
    VAEConfig(widths=(32,), resnets_per_level=1),
    PHANTOM.vae,
    PHANTOM.clip,
]


def names_of(config):
    return list(build(config).state_dict())


def config_of(config: Config, part: str):
    return {"clip": config.clip, "vae": config.vae, "unet": config.unet}[part]


@pytest.mark.parametrize("size", ["full", "small"])
@pytest.mark.parametrize("part", layouts.PARTS)
def test_the_table_is_the_published_mapping_both_ways(size, part):
    rows = {
        single: row["new"]
        for single, row in manifest(f"mapping_{size}").items()
        if row["part"] == PARTS_IN_MANIFEST[part]
    }
    prefix = layouts.SINGLE_PREFIXES[part]
    assert all(single.startswith(prefix) for single in rows)
    bare = {single.removeprefix(prefix): ours for single, ours in rows.items()}
    assert from_single(part, bare) == bare
    depth = depth_of(config_of(SD15, part))  # the small networks are as deep as the full ones
    assert to_single(part, rows.values(), depth) == {ours: single for single, ours in rows.items()}


@pytest.mark.parametrize("part", layouts.PARTS)
def test_our_networks_have_the_published_keys_and_shapes(part):
    name = {"clip": "text_encoder", "vae": "vae_new", "unet": "unet"}[part]
    published = {key: tuple(row["shape"]) for key, row in manifest(f"diffusers_full_{name}").items()}
    published.pop("text_model.embeddings.position_ids", None)
    ours = {key: tuple(tensor.shape) for key, tensor in build(config_of(SD15, part)).state_dict().items()}
    assert ours == published


def test_the_old_autoencoder_names_are_the_published_ones():
    rows = [row for row in manifest("mapping_full").values() if row["part"] == "vae"]
    to_new = dict(layouts.OLD_VAE_NAMES)
    to_old = {new: old for old, new in layouts.OLD_VAE_NAMES}
    assert [rename(row["old"], to_new) or row["old"] for row in rows] == [row["new"] for row in rows]
    assert [rename(row["new"], to_old) or row["new"] for row in rows] == [row["old"] for row in rows]


@pytest.mark.parametrize("size", ["full", "small"])
def test_exactly_the_eight_attention_weights_of_the_autoencoder_are_reshaped(size):
    rows = manifest(f"mapping_{size}").values()
    reshaped = {row["new"] for row in rows if "reshape" in row}
    assert len(reshaped) == 8
    assert {row["new"] for row in rows if is_vae_attention_weight(row["new"])} == reshaped


def test_the_moving_average_has_the_published_names():
    rows = {key: row["shadow"] for key, row in manifest("single_file_v1-5-pruned").items() if "shadow" in row}
    assert len(rows) == 686
    assert {ema_key(shadow): shadow for shadow in rows.values()} == rows


@pytest.mark.parametrize("config", OTHER_DEPTHS, ids=lambda config: f"{type(config).__name__}-{depth_of(config)}")
def test_the_tables_are_bijections_at_any_depth(config):
    part = {"CLIPConfig": "clip", "VAEConfig": "vae", "UNetConfig": "unet"}[type(config).__name__]
    ours = names_of(config)
    singles = to_single(part, ours, depth_of(config))
    assert list(singles) == ours
    assert len(set(singles.values())) == len(ours)
    prefix = layouts.SINGLE_PREFIXES[part]
    bare = {single.removeprefix(prefix): name for name, single in singles.items()}
    assert from_single(part, bare) == bare
    if part == "unet":
        assert len({ema_key(single) for single in singles.values()}) == len(ours)


def test_depth_is_told_from_the_names():
    small = manifest("compvis_small")
    unet = [name.removeprefix("model.diffusion_model.") for name in small if name.startswith("model.diffusion_model.")]
    vae = [name.removeprefix("first_stage_model.") for name in small if name.startswith("first_stage_model.")]
    assert layouts.unet_depth(unet) == depth_of(SD15.unet) == Depth(4, 2, (True, True, True, False))
    assert layouts.vae_depth(vae) == depth_of(SD15.vae) == Depth(4, 2)


def test_prefixes_end_at_dots_and_the_longest_wins():
    table = {"out.0": "norm", "out": "all"}
    assert rename("out.0.weight", table) == "norm.weight"
    assert rename("out.01.weight", table) == "all.01.weight"
    assert rename("outer.weight", table) is None


def test_a_name_of_another_network_has_no_place_in_the_single_file():
    with pytest.raises(KeyError, match=r"down_blocks\.7"):
        to_single("unet", ["down_blocks.7.resnets.0.conv1.weight"], depth_of(SD15.unet))
