"""OpenVINO in the U-Net's place: the same numbers, and the plain network wherever it cannot serve."""

import copy
from importlib.util import find_spec

import pytest
import torch
from tiny_model import UNET, write_tiny_model

import ldm
from ldm import fast, probe
from ldm.fast import backend, openvino_engine
from ldm.unet import UNet

installed_here = pytest.mark.skipif(find_spec("openvino") is None, reason="needs openvino, an optional engine")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _cache_of_its_own(cache, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))


@pytest.fixture
def plain():
    torch.manual_seed(0)
    return UNet(UNET).eval().requires_grad_(False)


@pytest.fixture
def networks(plain):
    """A network, and a copy that OpenVINO computes."""
    unet = copy.deepcopy(plain)
    fast.install(unet, kernels="openvino")
    return plain, unet


def call(rows: int, side: int = 8, tokens: int = 77):
    generator = torch.Generator().manual_seed(rows)
    x_t = torch.randn(rows, 4, side, side, generator=generator)
    return x_t, 999 * torch.rand(rows, generator=generator), torch.randn(rows, tokens, 16, generator=generator)


def error(got: torch.Tensor, expected: torch.Tensor) -> float:
    return float((got - expected).norm() / expected.norm())


def calls(unet: UNet) -> tuple[int, int]:
    return tuple(fast.installed(unet).engine["calls"].values())


def test_where_it_is_missing_one_line_says_how_to_have_it(monkeypatch):
    monkeypatch.setattr(backend, "_OPENVINO", False)
    with pytest.raises(ValueError, match=r'openvino is not installed here; pip install -e "\.\[openvino\]"') as raised:
        ldm.load("no file is read for this", backend="openvino")
    assert "\n" not in str(raised.value)


def test_a_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(backend, "_OPENVINO", True)
    with pytest.raises(ValueError, match="computes on a CPU, the tensors are on cuda"):
        fast.resolved("openvino", torch.device("cuda"))


def test_float16_and_a_cuda_graph_are_refused(monkeypatch):
    monkeypatch.setattr(backend, "_OPENVINO", True)
    unet = UNet(UNET)
    with pytest.raises(ValueError, match="expected one of the two"):
        fast.install(unet, kernels="openvino", cuda_graph=True)
    with pytest.raises(ValueError, match=r"float32 or bfloat16, the U-Net is in torch\.float16"):
        fast.install(unet.half(), kernels="openvino")
    assert fast.installed(unet) is None


@pytest.mark.parametrize("change", ["weights", "heads", "bfloat16", "version"])
def test_the_cache_knows_everything_that_a_result_depends_on(plain, change):
    before = openvino_engine._key(plain, "1")
    assert openvino_engine._key(copy.deepcopy(plain), "1") == before
    if change == "weights":
        plain.conv_in.weight[0, 0, 0, 0] += 1e-3
    elif change == "heads":
        plain.down_blocks[0].attentions[0].transformer_blocks[0].attn1.heads = 4
    elif change == "bfloat16":
        plain = plain.bfloat16()
    assert openvino_engine._key(plain, "2" if change == "version" else "1") != before


@installed_here
@pytest.mark.parametrize("limit", [1 << 26, 0], ids=["compiled for each shape", "compiled once"])
def test_it_computes_what_the_network_computes(networks, monkeypatch, limit):
    monkeypatch.setattr(openvino_engine, "SMALL", limit)
    plain, unet = networks
    for rows, side, tokens in [(1, 8, 77), (3, 8, 77), (2, 16, 154), (3, 8, 77)]:
        x_t, t, context = call(rows, side, tokens)
        assert error(unet(x_t, t, context), plain(x_t, t, context)) < 1e-5
        assert error(unet(x_t, 500, context), plain(x_t, 500, context)) < 1e-5
    assert calls(unet) == (8, 0)
    assert len(fast.installed(unet).by_openvino._compiled) == (3 if limit else 1)


@installed_here
def test_bfloat16_is_taken_only_where_it_was_asked_for(networks):
    plain, unet = networks
    x_t, t, context = call(2)
    rounded = copy.deepcopy(plain).bfloat16()
    fast.install(rounded, kernels="openvino")
    assert fast.installed(unet).engine["precision"] == "f32"
    assert fast.installed(rounded).engine["precision"] == "bf16"
    got = rounded(x_t.bfloat16(), t, context.bfloat16())
    assert got.dtype == torch.bfloat16
    assert error(got.float(), plain(x_t, t, context)) < 0.1
    assert calls(rounded) == (1, 0)


@installed_here
def test_what_was_converted_is_found_again(networks, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plain, unet = networks
    expected = unet(*call(2))
    assert len(list(openvino_engine.cache_folder().iterdir())) == 1
    monkeypatch.setattr(openvino_engine, "_write", lambda *_: pytest.fail("converted again"))
    again = copy.deepcopy(plain)
    fast.install(again, kernels="openvino")
    assert torch.equal(again(*call(2)), expected)


@installed_here
def test_a_changed_weight_is_seen(networks):
    plain, unet = networks
    unet(*call(2))
    for network in (plain, unet):
        network.conv_out.weight.mul_(2)
    assert error(unet(*call(2)), plain(*call(2))) < 1e-5


@installed_here
def test_taps_gradients_and_replaced_parts_get_the_plain_network_which_is_said_once(networks, caplog):
    plain, unet = networks
    place = "mid_block.resnets.0"
    with probe.capture(unet, place) as seen:
        unet(*call(2))
        unet(*call(2))
    assert len(seen.runs[place]) == 2
    x_t, t, context = call(2)
    assert unet(x_t.requires_grad_(), t, context).requires_grad
    unet.conv_in.forward = type(unet.conv_in).forward.__get__(unet.conv_in)
    with torch.no_grad():
        assert torch.equal(unet(*call(2)), plain(*call(2)))
    assert calls(unet) == (0, 4)
    assert len(caplog.records) == len(fast.installed(unet).engine["left_to_torch"]) == 3
    del unet.conv_in.forward
    unet(*call(2))
    assert calls(unet) == (1, 4)


@installed_here
def test_a_wrong_engine_is_not_used(networks, monkeypatch, caplog):
    plain, unet = networks
    converted = openvino_engine._converted
    other = copy.deepcopy(plain)
    other.conv_out.weight.mul_(1.01)
    monkeypatch.setattr(openvino_engine, "_converted", lambda network: converted(other))
    assert torch.equal(unet(*call(2)), plain(*call(2)))
    assert calls(unet) == (0, 1)
    assert "its first row is" in caplog.text


@installed_here
def test_what_does_not_fit_is_said_by_the_network(networks):
    _, unet = networks
    x_t, t, context = call(2)
    for wrong, complaint in [((x_t, t, context[:1]), "context"), ((x_t[..., :7], t, context), "multiples of 2")]:
        with pytest.raises(ValueError, match=complaint):
            unet(*wrong)
    unet(x_t, t, context)
    assert calls(unet)[0] == 1


@installed_here
def test_undone_it_is_the_network_that_it_was(networks):
    plain, unet = networks
    fast.installed(unet).undo()
    assert torch.equal(unet(*call(2)), plain(*call(2)))
    assert "forward" not in vars(unet)


@installed_here
def test_a_run_says_what_computed_it(tmp_path):
    sd = ldm.load(write_tiny_model(tmp_path / "tiny.safetensors"), backend="openvino")
    (*_, last) = sd.sample(sd.encode_prompts(["a"]), [0], steps=2)
    plain = ldm.load(tmp_path / "tiny.safetensors", backend="torch")
    (*_, expected) = plain.sample(plain.encode_prompts(["a"]), [0], steps=2)
    assert error(last.x_prev, expected.x_prev) < 1e-5
    assert (sd.backend, sd.engine["name"], plain.engine) == ("openvino", "openvino", None)
    assert sd.engine["calls"] == {"openvino": 2, "torch": 0}
