"""Every key of a checkpoint is explained: used, unneeded, missing, unexpected or of the wrong shape."""

import pytest
import torch
from hollow_checkpoints import published, write_zeros
from safetensors.torch import save_file
from tiny_checkpoints import manifest, part, single, write_folder

from ldm.checkpoint import CheckpointError, KeysDoNotFit, convert, examine, identify, load_parts
from ldm.checkpoint.container import LazyTensor
from ldm.config import SD15


def test_every_key_of_a_single_file_is_explained(tmp_path):
    tensors = single()
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    report = load_parts(path).report
    assert sorted((*report.used, *report.unneeded)) == sorted(tensors)
    assert sorted(report.unneeded) == [
        "alphas_cumprod",
        "betas",
        "cond_stage_model.transformer.text_model.embeddings.position_ids",
        "model_ema.decay",
        "model_ema.num_updates",
    ]
    assert report.ok
    assert report.problems() == ""


@pytest.mark.parametrize("name", ["single_file_v1-5-pruned-emaonly", "single_file_v1-5-pruned"])
def test_every_key_of_the_published_files_is_explained(tmp_path, name):
    # The header of the published file over a hole: identification and report read no tensor.
    rows = manifest(name)
    path = tmp_path / "v1-5.safetensors"
    write_zeros(path, {key: published(key, row) for key, row in rows.items()})
    examined = examine(identify(path))
    assert {**examined.configs} == {"clip": SD15.clip, "vae": SD15.vae, "unet": SD15.unet}
    assert examined.report.ok
    assert len(examined.report.unneeded) == 15  # 12 schedule buffers, 2 numbers of the moving average, position_ids
    assert len(examined.report.used) == len(rows) - 15


def test_missing_unexpected_and_wrongly_shaped_keys_are_told_together(tmp_path):
    tensors = single()
    tensors.pop("model.diffusion_model.out.2.bias")
    tensors["first_stage_model.encoder.conv_out.weight"] = torch.zeros(8, 64, 1, 1)
    tensors["model.diffusion_model.extra.weight"] = torch.zeros(1)
    tensors["optimizer.step"] = torch.zeros(1)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(KeysDoNotFit) as error:
        load_parts(path)
    report = error.value.report
    assert report.missing == ("unet.conv_out.bias",)
    assert set(report.unexpected) == {"model.diffusion_model.extra.weight", "optimizer.step"}
    assert report.wrong_shape == (("vae.encoder.conv_out.weight", (8, 64, 1, 1), (8, 64, 3, 3)),)
    message = str(error.value)
    assert "1 missing (unet.conv_out.bias)" in message
    assert "2 unexpected" in message
    assert "1 of wrong shape (vae.encoder.conv_out.weight (8, 64, 1, 1), expected (8, 64, 3, 3))" in message
    assert "\n" not in message


SINGLE_UNET, SINGLE_VAE = "model.diffusion_model.", "first_stage_model."
TO_K = "transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize("shape", [(), (7,), (0, 10**30)])
@pytest.mark.parametrize(
    ("stored", "ours"),
    [
        (SINGLE_UNET + "input_blocks.0.0.weight", "unet.conv_in.weight"),
        (SINGLE_UNET + "out.2.weight", "unet.conv_out.weight"),
        (SINGLE_UNET + "input_blocks.1.1." + TO_K, "unet.down_blocks.0.attentions.0." + TO_K),
        (SINGLE_VAE + "encoder.conv_in.weight", "vae.encoder.conv_in.weight"),
        (SINGLE_VAE + "decoder.conv_in.weight", "vae.decoder.conv_in.weight"),
        (
            "cond_stage_model.transformer.text_model.encoder.layers.0.mlp.fc2.weight",
            "clip.text_model.encoder.layers.0.mlp.fc2.weight",
        ),
    ],
)
def test_shapes_of_another_number_of_axes_are_reported(tmp_path, stored, ours, shape):
    path = tmp_path / "a.safetensors"
    tensors = {key: LazyTensor.of(key, tensor) for key, tensor in single().items()}
    write_zeros(path, tensors | {stored: LazyTensor(stored, shape, torch.float32, torch.empty)})
    with pytest.raises(KeysDoNotFit) as error:
        load_parts(path)
    assert [(name, found) for name, found, _ in error.value.report.wrong_shape] == [(ours, shape)]
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(), (7,), (0, 10**30), (1, 2, 3, 4, 5)])
@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("unet", "conv_in.weight"),
        ("unet", "down_blocks.0.resnets.0.conv1.weight"),
        ("vae", "encoder.down_blocks.1.resnets.0.conv1.weight"),
        ("clip", "text_model.embeddings.token_embedding.weight"),
        ("clip", "text_model.embeddings.position_embedding.weight"),
        ("clip", "text_model.encoder.layers.0.mlp.fc1.weight"),
    ],
)
def test_shapes_that_sizes_are_told_from_may_be_damaged_too(tmp_path, name, key, shape):
    path = tmp_path / "a.safetensors"
    tensors = {key: LazyTensor.of(key, tensor) for key, tensor in part(name).items()}
    write_zeros(path, tensors | {key: LazyTensor(key, shape, torch.float32, torch.empty)})
    with pytest.raises(CheckpointError) as error:
        convert(path, tmp_path / "b.safetensors", layout="single")
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_long_lists_are_cut_in_the_message_and_whole_in_the_report(tmp_path):
    tensors = {key: tensor for key, tensor in single().items() if ".encoder.layers.1." not in key}
    tensors["cond_stage_model.transformer.text_model.encoder.layers.1.mlp.fc2.bias"] = torch.zeros(64)
    path = tmp_path / "a.safetensors"
    save_file(tensors, path)
    with pytest.raises(KeysDoNotFit, match=r"15 missing \(clip\S+, clip\S+, clip\S+, \.\.\)") as error:
        load_parts(path)
    assert len(error.value.report.missing) == 15


@pytest.mark.parametrize(
    "key",
    [
        "text_model.embeddings.token_embedding.weight",
        "text_model.encoder.layers.0.mlp.fc1.weight",
        "text_model.embeddings.position_embedding.weight",
    ],
)
def test_a_missing_key_that_the_configuration_is_told_from_is_reported_too(tmp_path, key):
    folder = write_folder(tmp_path / "a")
    tensors = part("clip")
    tensors.pop(key)
    save_file(tensors, folder / "text_encoder" / "model.safetensors")
    with pytest.raises(KeysDoNotFit) as error:
        load_parts(folder)
    assert f"clip.{key}" in error.value.report.missing


def test_reshaped_biases_are_refused(tmp_path):
    # Weights of the autoencoder's attention have two published shapes, biases one (diffusers issue 6226).
    tensors = single()
    key = "first_stage_model.encoder.mid.attn_1.q.bias"
    tensors[key] = tensors[key][:, None, None, None]
    path = tmp_path / "a.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    with pytest.raises(KeysDoNotFit, match=r"to_q\.bias"):
        load_parts(path)
