"""config.json: every field of the libraries' own is honoured, held to the weights, or refused; none is passed over."""

import json
import logging

import pytest
from reference import GOLDEN
from safetensors.torch import save_file
from tiny_checkpoints import TINY, part, write_folder

from ldm.checkpoint import CheckpointError, convert, layouts, load_parts, save
from ldm.checkpoint.identification import identify
from ldm.checkpoint.loading import examine
from ldm.unet import UNet

# As diffusers 0.35.2 and transformers 4.57.6 write them for networks of TINY's sizes.
PUBLISHED = json.loads((GOLDEN / "diffusers_configs.json").read_text())


def folder(path, network, fields):
    write_folder(path)
    (path / layouts.FOLDERS[network] / "config.json").write_text(json.dumps(fields))
    return path


def published(network, **changes):
    return PUBLISHED[layouts.FOLDERS[network]] | changes


@pytest.mark.parametrize("network", ["clip", "vae", "unet"])
def test_what_the_libraries_write_is_read_without_a_word(tmp_path, network, caplog):
    with caplog.at_level(logging.WARNING):
        assert load_parts(folder(tmp_path / "a", network, published(network))).config == TINY
    assert caplog.text == ""


@pytest.mark.parametrize("network", ["clip", "vae", "unet"])
def test_what_we_write_are_fields_of_theirs_with_their_values(tmp_path, network):
    convert(write_folder(tmp_path / "a"), tmp_path / "b", layout="folder")
    written = json.loads((tmp_path / "b" / layouts.FOLDERS[network] / "config.json").read_text())
    own = {"projection_dim"}  # of an output that the text encoder does not have
    assert {name: value for name, value in written.items() if name not in own} == {
        name: value for name, value in published(network).items() if name in written and name not in own
    }


# Each changes what diffusers computes from the same weights, and nothing here is built for it.
@pytest.mark.parametrize(
    ("network", "field", "value"),
    [
        ("unet", "flip_sin_to_cos", False),
        ("unet", "freq_shift", 1),
        ("unet", "act_fn", "gelu"),
        ("unet", "center_input_sample", True),
        ("unet", "only_cross_attention", True),
        ("unet", "only_cross_attention", [True, False]),
        ("unet", "mid_block_only_cross_attention", True),
        ("unet", "class_embed_type", "timestep"),
        ("unet", "num_class_embeds", 4),
        ("unet", "downsample_padding", 0),
        ("unet", "mid_block_scale_factor", 1.4),
        ("unet", "mid_block_type", None),
        ("unet", "mid_block_type", "UNetMidBlock2DSimpleCrossAttn"),
        ("unet", "dual_cross_attention", True),
        ("unet", "addition_embed_type", "text"),
        ("unet", "encoder_hid_dim", 4096),
        ("unet", "resnet_time_scale_shift", "scale_shift"),
        ("unet", "resnet_skip_time_act", True),
        ("unet", "resnet_out_scale_factor", 1.4),
        ("unet", "time_embedding_type", "fourier"),
        ("unet", "time_embedding_dim", 64),
        ("unet", "time_embedding_act_fn", "silu"),
        ("unet", "timestep_post_act", "silu"),
        ("unet", "time_cond_proj_dim", 256),
        ("unet", "conv_in_kernel", 1),
        ("unet", "conv_out_kernel", 1),
        ("unet", "attention_type", "gated"),
        ("unet", "cross_attention_norm", "group_norm"),
        ("unet", "num_attention_heads", 4),
        ("unet", "use_linear_projection", True),
        ("vae", "shift_factor", 0.1159),
        ("vae", "act_fn", "gelu"),
        ("vae", "latents_mean", [0.0, 0.1, 0.0, 0.0]),
        ("vae", "latents_std", [1.0, 2.0, 1.0, 1.0]),
        ("vae", "use_quant_conv", False),
        ("vae", "use_post_quant_conv", False),
        ("vae", "mid_block_add_attention", False),
        ("clip", "hidden_act", "gelu"),
    ],
)
def test_what_is_built_in_one_way_only_is_refused_in_another(tmp_path, network, field, value):
    path = folder(tmp_path / "a", network, published(network, **{field: value}))
    with pytest.raises(CheckpointError, match=rf"config.json: {field} is ") as error:
        load_parts(path)
    assert "\n" not in str(error.value)


# These repeat what the weights show: where they say otherwise, one of the two is wrong.
@pytest.mark.parametrize(
    ("network", "field", "value"),
    [
        ("unet", "block_out_channels", [32, 96]),
        ("unet", "layers_per_block", 2),
        ("unet", "cross_attention_dim", 768),
        ("unet", "in_channels", 9),
        ("unet", "down_block_types", ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"]),
        ("unet", "down_block_types", ["AttnDownBlock2D", "DownBlock2D"]),
        ("unet", "up_block_types", ["UpBlock2D", "UpBlock2D"]),
        ("vae", "latent_channels", 16),
        ("vae", "block_out_channels", [32, 32]),
        ("clip", "num_hidden_layers", 1),  # one layer fewer than the file has: "clip skip" by editing
        ("clip", "hidden_size", 768),
        ("clip", "vocab_size", 49408),
    ],
)
def test_what_disagrees_with_the_weights_is_refused(tmp_path, network, field, value):
    path = folder(tmp_path / "a", network, published(network, **{field: value}))
    with pytest.raises(CheckpointError, match=rf"config.json: {field} is .*, its weights have .*: correct one"):
        load_parts(path)


@pytest.mark.parametrize(
    ("network", "fields"),
    [
        ("unet", {"attention_head_dim": [8, 8], "layers_per_block": [1, 1], "cross_attention_dim": [64, 64]}),
        ("unet", {"transformer_layers_per_block": [1, 1], "only_cross_attention": [False, False]}),
        ("unet", {"upcast_attention": True, "dropout": 0.1, "sample_size": None, "act_fn": "swish"}),
        ("unet", {"block_out_channels": (32, 64)}),
        ("vae", {"force_upcast": False, "sample_size": 512, "shift_factor": 0}),
        ("clip", {"torch_dtype": "float16", "projection_dim": 768}),
    ],
)
def test_lists_of_equal_entries_and_fields_of_no_effect_are_valid(tmp_path, network, fields, caplog):
    with caplog.at_level(logging.WARNING):
        config = load_parts(folder(tmp_path / "a", network, published(network, **fields))).config
    assert config == TINY
    assert caplog.text == ""


def test_equal_lists_set_what_the_number_would(tmp_path):
    fields = published("unet", attention_head_dim=[4, 4], norm_num_groups=16)
    config = load_parts(folder(tmp_path / "a", "unet", fields)).config
    assert (config.unet.heads, config.unet.norm_groups) == (4, 16)


def test_a_whole_clip_tells_its_text_encoder_within(tmp_path):
    fields = {
        "model_type": "clip",
        "architectures": ["CLIPModel"],
        "text_config": published("clip"),
        "projection_dim": 8,
    }
    assert load_parts(folder(tmp_path / "a", "clip", fields)).config == TINY
    fields["text_config"] = published("clip", hidden_act="gelu")
    with pytest.raises(CheckpointError, match="hidden_act is 'gelu'"):
        load_parts(folder(tmp_path / "b", "clip", fields))


def test_a_field_of_no_known_name_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        load_parts(folder(tmp_path / "a", "unet", published("unet", brand_new=3)))
    assert "unknown fields, which change nothing here: brand_new" in caplog.text


def test_a_config_json_edited_apart_from_our_own_metadata_is_refused(tmp_path):
    save(tmp_path / "a", {"unet": UNet(TINY.unet)}, layout="folder")
    file = tmp_path / "a" / "unet" / "config.json"
    fields = json.loads(file.read_text())
    examine(identify(tmp_path / "a"))
    file.write_text(json.dumps(fields | {"attention_head_dim": 4}))
    with pytest.raises(CheckpointError, match=r"heads is 4 here and 8 in the metadata of the weights beside it"):
        identify(tmp_path / "a")


def test_a_network_alone_has_its_config_json_beside_it(tmp_path):
    save_file(part("unet"), tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(published("unet", attention_head_dim=4)))
    for path in (tmp_path, tmp_path / "diffusion_pytorch_model.safetensors"):
        assert examine(identify(path)).configs["unet"].heads == 4
    (tmp_path / "config.json").write_text(json.dumps(published("unet", freq_shift=1)))
    with pytest.raises(CheckpointError, match="freq_shift is 1"):
        identify(tmp_path)
