"""From a path to filled networks: every layout gives the same weights, every key is explained, memory is bounded."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny_checkpoints import CONFIGS, FORMAT, TINY, manifest, part, single, write_folder, write_single

from ldm.checkpoint import CheckpointError, KeysDoNotFit, convert, examine, identify, infer_config, load_parts, save
from ldm.checkpoint.container import Header, LazyTensor, write_tensors
from ldm.checkpoint.loading import build
from ldm.clip import CLIPTextEncoder
from ldm.config import PHANTOM, SD15, CLIPConfig
from ldm.unet import UNet
from ldm.vae import AutoencoderKL


def networks(loaded):
    return {"clip": loaded.clip, "vae": loaded.vae, "unet": loaded.unet}


def assert_holds(loaded, dtype=torch.float32, unet_seed=0):
    for name, network in networks(loaded).items():
        expected = part(name, unet_seed if name == "unet" else 0)
        state = network.state_dict()
        assert state.keys() == expected.keys()
        for key, tensor in expected.items():
            assert state[key].dtype == dtype
            assert torch.equal(state[key], tensor.to(dtype)), key


# ------------------------------------------------------------------------------------------- layouts, dtypes, sets


@pytest.mark.parametrize(
    "write",
    [
        lambda path: write_single(path / "a.safetensors"),
        lambda path: write_folder(path / "a"),
        lambda path: write_folder(path / "a", old_names=True),
        lambda path: write_folder(path / "a", variant=".fp16"),
    ],
)
def test_every_layout_gives_the_same_weights_and_configuration(tmp_path, write):
    loaded = load_parts(write(tmp_path))
    assert_holds(loaded)
    assert loaded.config == TINY
    assert loaded.mapped
    assert not any(network.training for network in networks(loaded).values())
    assert all(p.requires_grad for network in networks(loaded).values() for p in network.parameters())


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.float16])
def test_dtypes_are_kept_or_converted(tmp_path, stored, asked):
    loaded = load_parts(write_folder(tmp_path / "a", dtype=stored), dtype=asked)
    for name, network in networks(loaded).items():
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, part(name)[key].to(stored).to(asked or stored))
            assert tensor.dtype == (asked or stored)
    assert loaded.mapped == (asked in (None, stored))


@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16])
def test_the_autoencoder_keeps_a_precision_of_its_own(tmp_path, dtype):
    loaded = load_parts(write_single(tmp_path / "a.safetensors"), dtype=dtype, vae_dtype=torch.float32)
    for key, tensor in loaded.vae.state_dict().items():
        assert torch.equal(tensor, part("vae")[key]), key  # not through float16 and back
    assert {tensor.dtype for tensor in loaded.vae.parameters()} == {torch.float32}
    assert {tensor.dtype for tensor in loaded.unet.parameters()} == {dtype or torch.float32}
    assert loaded.mapped == (dtype is None)


def test_the_networks_run_and_can_be_trained(tmp_path):
    path = write_single(tmp_path / "a.safetensors")
    before = path.read_bytes()
    loaded = load_parts(path)
    context = loaded.clip(torch.zeros(1, 9, dtype=torch.int64))
    eps = loaded.unet(torch.zeros(1, 4, 8, 8), 10, context)
    loaded.vae.decode(eps).square().mean().backward()
    with torch.no_grad():
        for parameter in loaded.unet.parameters():
            parameter -= 0.1
    assert path.read_bytes() == before


def test_two_sets_of_weights_are_never_chosen_between_silently(tmp_path):
    path = write_single(tmp_path / "a.safetensors", ema=True)
    with pytest.raises(CheckpointError, match=r"ema='ema' or ema='plain' \(--ema ema, --ema plain\)"):
        load_parts(path)
    plain, loaded = load_parts(path, ema="plain"), load_parts(path, ema="ema")
    assert_holds(plain)
    assert_holds(loaded, unet_seed=1)
    assert (plain.weight_set, loaded.weight_set) == ("plain", "ema")
    assert "model.diffusion_model.out.2.bias" in loaded.report.unneeded
    with pytest.raises(CheckpointError, match="ema: 'both', expected"):
        load_parts(path, ema="both")


def test_one_set_of_weights_is_not_called_ema(tmp_path):
    path = write_single(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="one set of U-Net weights"):
        load_parts(path, ema="ema")
    loaded = load_parts(path, ema="plain")
    assert_holds(loaded)
    assert loaded.weight_set is None


@pytest.mark.parametrize("place", ["non_ema", "unet_ema"])
def test_folders_with_two_sets(tmp_path, place):
    folder = write_folder(tmp_path / "a")
    name = "diffusion_pytorch_model.safetensors"
    if place == "non_ema":
        (folder / "unet" / name).rename(folder / "unet" / "diffusion_pytorch_model.non_ema.safetensors")
        save_file(part("unet", seed=1), folder / "unet" / name)
    else:
        (folder / "unet_ema").mkdir()
        save_file(part("unet", seed=1), folder / "unet_ema" / name)
    with pytest.raises(CheckpointError, match="choose with"):
        load_parts(folder)
    assert_holds(load_parts(folder, ema="plain"))
    assert_holds(load_parts(folder, ema="ema"), unet_seed=1)


# ------------------------------------------------------------------------------------------------- over a base model


def test_a_network_alone_is_laid_over_a_base(tmp_path):
    base = write_single(tmp_path / "base.safetensors", ema=True)
    unet = tmp_path / "unet.safetensors"
    save_file(part("unet", seed=2), unet)
    with pytest.raises(CheckpointError, match="holds U-Net, but no text encoder and autoencoder: give a whole model"):
        load_parts(unet)
    loaded = load_parts(unet, base=base)  # the base's two sets are not asked about: neither is used
    assert_holds(loaded, unet_seed=2)
    assert loaded.files == (unet, base)
    with pytest.raises(CheckpointError, match="a whole model; a base"):
        load_parts(base, base=unet)


def test_of_a_base_only_the_files_of_the_parts_taken_count(tmp_path):
    base = write_folder(tmp_path / "base")
    save_file({"betas": torch.zeros(3)}, base / "single_file_extras.safetensors")
    save_file(part("unet", seed=2), tmp_path / "unet.safetensors")
    loaded = load_parts(tmp_path / "unet.safetensors", base=base)
    assert [path.relative_to(tmp_path).as_posix() for path in loaded.files] == [
        "unet.safetensors",
        "base/text_encoder/model.safetensors",
        "base/vae/diffusion_pytorch_model.safetensors",
    ]


def test_a_base_that_does_not_fit_is_refused(tmp_path):
    save(tmp_path / "phantom.safetensors", blank(PHANTOM), dtype=torch.float16)
    save_file(part("unet"), tmp_path / "unet.safetensors")
    assert load_parts(tmp_path / "unet.safetensors", base=tmp_path / "phantom.safetensors").config.vae == PHANTOM.vae
    wide = {**part("clip"), "text_model.embeddings.token_embedding.weight": torch.zeros(60, 128)}
    save_file(wide, tmp_path / "wide.safetensors")
    base = write_folder(tmp_path / "base")
    (base / "text_encoder" / "model.safetensors").unlink()
    (base / "text_encoder").rmdir()
    with pytest.raises(CheckpointError, match="wrong shape"):
        load_parts(tmp_path / "wide.safetensors", base=base)
    narrow = CLIPTextEncoder(CLIPConfig(vocabulary=60, tokens=9, width=32, layers=1, heads=1, mlp_width=32))
    save(tmp_path / "narrow.safetensors", {"clip": narrow})
    with pytest.raises(CheckpointError, match="contexts of width 32, the U-Net takes 64"):
        load_parts(tmp_path / "narrow.safetensors", base=base)


# ------------------------------------------------------------------------------------------------- every key explained


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


# ------------------------------------------------------------------------------------------------------ configurations


def blank(config):
    return {"clip": CLIPTextEncoder(config.clip), "vae": AutoencoderKL(config.vae), "unet": UNet(config.unet)}


def test_our_own_files_tell_what_shapes_do_not(tmp_path):
    for layout in ("single", "folder"):
        path = tmp_path / layout
        save(path, blank(PHANTOM), layout=layout)
        assert load_parts(path).config == PHANTOM
        assert "written by ldm" in identify(path).describe()


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


# -------------------------------------------------------------------------------------------------------------- memory


def published(key, row, half=False) -> LazyTensor:
    """One tensor of a published file, its values of no meaning."""
    dtype = torch.float16 if half and row["dtype"] == "float32" else getattr(torch, row["dtype"])
    shape = tuple(row["shape"])
    return LazyTensor(key, shape, dtype, lambda copy: torch.full(shape, 0.01).to(dtype))


def write_zeros(path, tensors) -> None:
    """A file with these tensors' header over a hole, which takes no room on the disk."""
    header = Header.build(tensors, FORMAT)
    with path.open("wb") as file:
        file.write(len(header.text).to_bytes(8, "little") + header.text)
        file.truncate(header.file_bytes)


# The kernel's own high-water mark of this process; getrusage's would begin with that of the process that started it.
MEASURE = """
import re, sys
from pathlib import Path
import torch
from ldm.checkpoint import examine, identify, load_parts

def peak_bytes():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

path, dtype = sys.argv[1], getattr(torch, sys.argv[2], None)
examine(identify(path))  # everything but the weights
before = peak_bytes()
loaded = load_parts(path, dtype=dtype)
weights = [p for network in (loaded.clip, loaded.vae, loaded.unet) for p in network.parameters()]
# Ready means that every page has been in memory: those of a mapped file count from their first use.
touched = sum(float(weight.detach().flatten()[::512].float().sum()) for weight in weights)
print(peak_bytes() - before, sum(weight.nbytes for weight in weights))
"""


@pytest.fixture(scope="module")
def full_size_file(tmp_path_factory):
    """SD1.5 in fp16, 2.1 GB."""
    path = tmp_path_factory.mktemp("full") / "v1-5-fp16.safetensors"
    rows = manifest("single_file_v1-5-pruned-emaonly")
    write_tensors(path, {key: published(key, row, half=True) for key, row in rows.items()}, FORMAT)
    yield path
    path.unlink()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak memory from Linux's /proc")
@pytest.mark.parametrize("dtype", ["None", "bfloat16", "float32"])
def test_loading_a_full_size_model_takes_its_weights_memory_and_a_tenth(full_size_file, dtype):
    command = [sys.executable, "-c", MEASURE, str(full_size_file), dtype]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    peak, weights = map(int, run.stdout.split())
    assert weights == 1_066_235_307 * (4 if dtype == "float32" else 2)
    # A tenth: the largest tensor, the token embedding, is 3.6 % of the weights; the rest is the allocator's.
    assert 0.95 * weights < peak < 1.1 * weights, f"{peak / weights:.3f} of the weights"


@pytest.mark.gpu
def test_loading_onto_a_gpu(tmp_path):
    loaded = load_parts(write_single(tmp_path / "a.safetensors"), device="cuda", dtype=torch.float16)
    assert not loaded.mapped
    for name, network in networks(loaded).items():
        for key, tensor in network.state_dict().items():
            assert tensor.device.type == "cuda"
            assert torch.equal(tensor.cpu(), part(name)[key].half())
