"""What configuration a checkpoint is of, told from shapes, metadata and config.json."""

from dataclasses import replace

import pytest
from hollow_checkpoints import blank
from safetensors.torch import save_file
from tiny_checkpoints import CONFIGS, write_folder

from ldm.checkpoint import CheckpointError, examine, identify, infer_config, load_parts, save
from ldm.checkpoint.loading import build
from ldm.config import PHANTOM, SD15
from ldm.pipeline import PHANTOM_WEIGHTS
from ldm.unet import UNet
from ldm.vae import AutoencoderKL


def test_our_own_files_tell_what_shapes_do_not(tmp_path):
    for layout in ("single", "folder"):
        path = tmp_path / layout
        save(path, blank(PHANTOM), layout=layout)
        assert load_parts(path).config == PHANTOM
        assert "written by ldm" in identify(path).describe()


@pytest.mark.parametrize("channels", [1, 3, 8, 9, 16, 32])
@pytest.mark.parametrize("layout", ["single", "folder"])
def test_any_number_of_latent_channels_comes_back(tmp_path, layout, channels):
    """Some are those of other models: 16 of SD3's autoencoder, 9 of an inpainting U-Net's input."""
    vae, unet = (replace(part, latent_channels=channels) for part in (PHANTOM.vae, PHANTOM.unet))
    config = replace(PHANTOM, vae=vae, unet=unet)
    save(tmp_path / "a", blank(config), layout=layout)
    assert load_parts(tmp_path / "a").config == config


def test_heads_and_groups_of_a_folder_come_from_its_config_json(tmp_path):
    folder = write_folder(tmp_path / "a")
    (folder / "unet" / "config.json").write_text('{"attention_head_dim": 4, "norm_num_groups": 16, "other": [1]}')
    (folder / "text_encoder" / "config.json").write_text('{"num_attention_heads": 2}')
    (folder / "vae" / "config.json").write_text('{"scaling_factor": 0.5}')
    config = load_parts(folder).config
    assert (config.unet.heads, config.unet.norm_groups, config.clip.heads) == (4, 16, 2)
    assert config.vae.scaling_factor == 0.5


@pytest.mark.parametrize("name", ["clip", "vae", "unet"])
def test_configurations_are_inferred_from_shapes(name):
    for config in (CONFIGS[name], {"clip": SD15.clip, "vae": SD15.vae, "unet": SD15.unet}[name]):
        shapes = {key: tuple(tensor.shape) for key, tensor in build(config).state_dict().items()}
        assert infer_config(name, shapes) == config


@pytest.mark.parametrize("name", ["vae", "unet"])
def test_shapes_that_no_network_has_are_refused(tmp_path, name):
    # The phantom model's groups are not SD1.5's, and a file of other making does not tell them.
    path = tmp_path / "a.safetensors"
    network = (
        AutoencoderKL(PHANTOM.vae)
        if name == "vae"
        else UNet(replace(PHANTOM.unet, norm_groups=16, widths=(48, 80, 96)))
    )
    save_file(network.state_dict(), path)
    with pytest.raises(
        CheckpointError, match=r"has these shapes \(.*\); numbers of heads and of groups do not show"
    ) as error:
        examine(identify(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize("channels", [4, 16])
def test_an_autoencoder_alone_is_called_so(tmp_path, channels):
    """As `ldm train-small` keeps it while it works: without the metadata of a whole model."""
    path = tmp_path / "autoencoder.safetensors"
    save_file(AutoencoderKL(replace(PHANTOM.vae, latent_channels=channels)).state_dict(), path)
    told = (
        f"diffusers-layout file, but no autoencoder of {channels} latent channels has .*: expected .* the whole model"
    )
    with pytest.raises(CheckpointError, match=told):
        load_parts(path, base=PHANTOM_WEIGHTS)
    with pytest.raises(CheckpointError, match="holds autoencoder, but no text encoder and U-Net: give a whole model"):
        load_parts(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ('{"attention_head_dim": [5, 10, 20, 20]}', r"heads = \[5, 10, 20, 20\], expected one number"),
        ('{"attention_head_dim": 0}', "modulo by zero"),
        ('{"norm_num_groups": 7}', "not a multiple of norm_groups 7"),
    ],
)
def test_settings_that_no_network_can_have_are_refused(tmp_path, fields, message):
    folder = write_folder(tmp_path / "a")
    (folder / "unet" / "config.json").write_text(fields)
    with pytest.raises(CheckpointError, match=message) as error:
        load_parts(folder)
    assert str(folder) in str(error.value)
