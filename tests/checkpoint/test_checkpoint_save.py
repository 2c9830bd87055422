"""Files out: a conversion there and back gives the same bytes, and nothing is lost or overwritten by accident."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_checkpoints import FORMAT, TINY, part, single, write_as_published, write_folder, write_single

from ldm.checkpoint import CheckpointError, KeysDoNotFit, convert, identify, load_parts, save
from ldm.checkpoint.container import TensorFile
from ldm.clip import CLIPTextEncoder
from ldm.config import PHANTOM
from ldm.unet import UNet
from ldm.vae import AutoencoderKL


def weights_of(folder):
    """Path within the folder -> bytes, of every safetensors file."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


def there_and_back(source, tmp_path, **options):
    """The bytes of a source that was converted to the other layout and back."""
    single_file = source.is_file()
    layouts = ("folder", "single") if single_file else ("single", "folder")
    other, back = tmp_path / "other.safetensors", tmp_path / "back"
    convert(source, other, layout=layouts[0], **options)
    convert(other, back, layout=layouts[1])
    return back.read_bytes() if single_file else weights_of(back)


# --------------------------------------------------------------------------------------------------- there and back


@pytest.mark.parametrize("ema", [False, True])
def test_a_single_file_comes_back_byte_for_byte(tmp_path, ema):
    source = write_single(tmp_path / "a.safetensors", ema)
    assert there_and_back(source, tmp_path) == source.read_bytes()


@pytest.mark.parametrize("ema", [False, True])
def test_the_published_order_and_header_come_back(tmp_path, ema):
    source = write_as_published(tmp_path / "a.safetensors", single(ema))
    assert there_and_back(source, tmp_path) == source.read_bytes()


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors: {
            key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in tensors.items()
        },
        lambda tensors: {key: tensor.bfloat16() if "vae" in key else tensor for key, tensor in tensors.items()},
        lambda tensors: {key: tensor for key, tensor in tensors.items() if "." in key},
        lambda tensors: {key: tensor for key, tensor in tensors.items() if key.startswith("model.diffusion_model.")},
    ],
    ids=["fp16", "mixed", "without buffers", "U-Net alone"],
)
def test_other_single_files_come_back_too(tmp_path, change):
    source = tmp_path / "a.safetensors"
    save_file(change(single()), source, metadata={"format": "pt", "title": "somebody's"})
    assert there_and_back(source, tmp_path) == source.read_bytes()


@pytest.mark.parametrize("old_names", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.float16])
def test_a_folder_comes_back_byte_for_byte(tmp_path, old_names, dtype):
    source = write_folder(tmp_path / "a", old_names=old_names, dtype=dtype)
    assert there_and_back(source, tmp_path) == weights_of(source)


def test_a_folder_with_odd_headers_and_a_foreign_configuration_comes_back(tmp_path):
    source = write_folder(tmp_path / "a", old_names=True)
    save_file(part("unet"), source / "unet" / "diffusion_pytorch_model.safetensors")  # without metadata
    clip = {**part("clip"), "text_model.embeddings.position_ids": torch.arange(9)[None]}
    write_as_published(source / "text_encoder" / "model.safetensors", clip)
    (source / "text_encoder" / "config.json").write_text('{"num_attention_heads": 2}')
    (source / "unet" / "config.json").write_text('{"attention_head_dim": 4}')
    assert there_and_back(source, tmp_path) == weights_of(source)
    config = load_parts(tmp_path / "other.safetensors").config
    assert (config.clip.heads, config.unet.heads) == (2, 4)
    assert load_parts(tmp_path / "back").config == config


def test_both_sets_of_weights_come_back_from_a_folder(tmp_path):
    source = write_folder(tmp_path / "a")
    unet = source / "unet"
    (unet / "diffusion_pytorch_model.safetensors").rename(unet / "diffusion_pytorch_model.non_ema.safetensors")
    save_file(part("unet", seed=1), unet / "diffusion_pytorch_model.safetensors", metadata=FORMAT)
    assert there_and_back(source, tmp_path) == weights_of(source)


@pytest.mark.parametrize("layout", ["single", "folder"])
def test_our_own_files_come_back(tmp_path, layout):
    source = tmp_path / "ours.safetensors"
    save(source, random_networks(PHANTOM), layout=layout, dtype=torch.float16, metadata={"run": "17"}, vae_names="old")
    expected = source.read_bytes() if layout == "single" else weights_of(source)
    assert there_and_back(source, tmp_path) == expected
    assert load_parts(tmp_path / "other.safetensors").config == load_parts(tmp_path / "back").config == PHANTOM


def test_the_same_layout_is_a_copy(tmp_path):
    source = write_as_published(tmp_path / "a.safetensors", single(ema=True))
    convert(source, tmp_path / "b.safetensors", layout="single")
    assert (tmp_path / "b.safetensors").read_bytes() == source.read_bytes()
    folder = write_folder(tmp_path / "folder", old_names=True)
    convert(folder, tmp_path / "copy", layout="folder")
    assert weights_of(tmp_path / "copy") == weights_of(folder)


# ---------------------------------------------------------------------------------------------------- what is written


def test_the_single_file_has_the_published_names_and_shapes(tmp_path):
    convert(write_folder(tmp_path / "a", old_names=True), tmp_path / "b.safetensors", layout="single")
    written, expected = load_file(tmp_path / "b.safetensors"), single()
    for key, tensor in written.items():
        assert torch.equal(tensor, expected[key])
    buffers = {"betas", "alphas_cumprod", "model_ema.decay", "model_ema.num_updates"}
    position_ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    assert set(expected) - set(written) == {*buffers, position_ids}


@pytest.mark.parametrize("names", ["new", "old"])
def test_the_folder_has_the_names_asked_for(tmp_path, names):
    convert(write_single(tmp_path / "a.safetensors"), tmp_path / "b", layout="folder", vae_names=names)
    expected = write_folder(tmp_path / "expected", old_names=names == "old")
    written = weights_of(tmp_path / "b")
    for name in ("unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.safetensors"):
        assert written[name] == (expected / name).read_bytes()


def test_dtypes_change_when_asked_and_schedule_buffers_do_not(tmp_path):
    source = write_single(tmp_path / "a.safetensors", ema=True)
    convert(source, tmp_path / "b.safetensors", layout="single", dtype=torch.bfloat16)
    before = load_file(source)
    for key, tensor in load_file(tmp_path / "b.safetensors").items():
        kept = key in ("betas", "alphas_cumprod", "model_ema.decay") or not tensor.is_floating_point()
        expected = before[key]
        assert torch.equal(tensor, expected if kept else expected.bfloat16())
        assert tensor.dtype == (expected.dtype if kept else torch.bfloat16)


def test_metadata_of_the_user_outlives_a_change_of_dtype(tmp_path):
    source = tmp_path / "a.safetensors"
    save_file(single(), source, metadata={"format": "pt", "title": "somebody's"})
    convert(source, tmp_path / "b.safetensors", layout="single", dtype=torch.float16)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "title": "somebody's"}


@pytest.mark.parametrize("ema", ["plain", "ema"])
def test_one_set_of_weights_can_be_kept(tmp_path, ema):
    source = write_single(tmp_path / "a.safetensors", ema=True)
    for layout in ("single", "folder"):
        convert(source, tmp_path / layout, layout=layout, ema=ema)
        checkpoint = identify(tmp_path / layout)
        assert "unet_ema" not in checkpoint.parts
        expected = part("unet", seed=1 if ema == "ema" else 0)
        assert torch.equal(checkpoint.parts["unet"]["conv_in.weight"].fetch(True), expected["conv_in.weight"])


def random_networks(config):
    torch.manual_seed(0)
    return {"clip": CLIPTextEncoder(config.clip), "vae": AutoencoderKL(config.vae), "unet": UNet(config.unet)}


@pytest.mark.parametrize("layout", ["single", "folder"])
def test_networks_that_are_saved_and_loaded_are_the_same(tmp_path, layout):
    networks = random_networks(TINY)
    for name in ("unet", "vae"):
        networks[name].to(memory_format=torch.channels_last)
    save(tmp_path / "a", networks, layout=layout, metadata={"run": "17"})
    loaded = load_parts(tmp_path / "a")
    assert loaded.config == TINY
    for network, back in zip(networks.values(), (loaded.clip, loaded.vae, loaded.unet), strict=True):
        for key, tensor in network.state_dict().items():
            assert torch.equal(tensor, back.state_dict()[key])
    assert TensorFile(loaded.files[0]).header.metadata["run"] == "17"


def test_a_trained_unet_is_saved_alone_and_laid_over_its_base(tmp_path):
    base = write_single(tmp_path / "base.safetensors")
    unet = random_networks(TINY)["unet"]
    save(tmp_path / "tuned.safetensors", {"unet": unet}, dtype=torch.float16)
    loaded = load_parts(tmp_path / "tuned.safetensors", base=base, dtype=torch.float32)
    assert torch.equal(loaded.unet.conv_in.weight, unet.conv_in.weight.half().float())


def test_the_same_networks_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        save(tmp_path / name, random_networks(TINY), metadata={"x": "1", "run": "17"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


# ------------------------------------------------------------------------------------------------------------ refusals


def test_nothing_is_overwritten_unasked(tmp_path):
    source = write_single(tmp_path / "a.safetensors")
    before = source.read_bytes()
    for layout in ("single", "folder"):
        target = tmp_path / layout
        convert(source, target, layout=layout)
        with pytest.raises(CheckpointError, match=r"exists already; .*--force"):
            convert(source, target, layout=layout)
        convert(source, target, layout=layout, overwrite=True)
    with pytest.raises(CheckpointError, match="is a folder, which a single layout cannot replace"):
        convert(source, tmp_path / "folder", layout="single", overwrite=True)
    with pytest.raises(CheckpointError, match="is a file, which a folder layout cannot replace"):
        convert(source, tmp_path / "single", layout="folder", overwrite=True)
    convert(source, source, layout="single", overwrite=True)  # reads while it writes beside
    assert source.read_bytes() == before


def test_overwriting_a_folder_leaves_no_older_weights_of_the_same_network(tmp_path):
    folder = tmp_path / "folder"
    convert(write_single(tmp_path / "both.safetensors", ema=True), folder, layout="folder")
    (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_bytes(b"older")
    (folder / "tokenizer").mkdir()
    save(folder, {"unet": UNet(TINY.unet)}, layout="folder", overwrite=True)
    assert (folder / "tokenizer").exists()
    assert sorted(weights_of(folder)) == [
        "text_encoder/model.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]


def test_what_does_not_fit_is_not_converted(tmp_path):
    source = tmp_path / "a.safetensors"
    save_file({**single(), "model.diffusion_model.extra": torch.zeros(1)}, source)
    with pytest.raises(KeysDoNotFit, match=r"1 unexpected \(model.diffusion_model.extra\)"):
        convert(source, tmp_path / "b", layout="folder")
    assert not (tmp_path / "b").exists()


def test_wrong_arguments_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"parts: \['u_net'\], expected some of"):
        save(tmp_path / "a", {"u_net": UNet(TINY.unet)})
    with pytest.raises(CheckpointError, match="layout: 'zip', expected 'single' or 'folder'"):
        save(tmp_path / "a", {"unet": UNet(TINY.unet)}, layout="zip")
