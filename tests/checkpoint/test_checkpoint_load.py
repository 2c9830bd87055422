"""From a path to filled networks: every layout gives the same weights, over a base too, and memory is bounded."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hollow_checkpoints import blank, published
from safetensors.torch import save_file
from tiny_checkpoints import FORMAT, TINY, manifest, part, write_folder, write_single

from ldm.checkpoint import CheckpointError, load_parts, save
from ldm.checkpoint.container import write_tensors
from ldm.clip import CLIPTextEncoder
from ldm.config import PHANTOM, CLIPConfig


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


# -------------------------------------------------------------------------------------------------------------- memory


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
