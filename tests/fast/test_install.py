"""What is installed into a network computes the same, shows the same, and can be taken out again."""

import copy
import inspect
from dataclasses import replace

import pytest
import torch
from networks import small
from torch import nn

from ldm import fast, probe
from ldm.blocks import ResnetBlock
from ldm.config import SD15
from ldm.fast import onednn
from ldm.fast.forwards import FORWARDS
from ldm.fast.installing import Installed
from ldm.unet import UNet, UNetBlocks

# SD1.5's head width 40 and 77 tokens; everything else as small as it gets, for the kernels run in an interpreter.
CONFIG = replace(
    SD15.unet, widths=(80, 80), resnets_per_level=1, attention=(True, False), heads=2, context_width=16, norm_groups=4
)
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # float32 in other orders of summation
PLACE = "down_blocks.0.attentions.0.transformer_blocks.0"


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


CALL = randn(1, 4, 4, 4), 500, randn(1, 77, 16, seed=1)


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


def unet(blocks=UNetBlocks()):  # noqa: B008
    torch.manual_seed(0)
    return UNet(CONFIG, blocks).eval()


def laid(network):
    """How every parameter lies in memory, and what it holds."""
    return {name: (x.stride(), x.is_contiguous(), x.clone()) for name, x in network.named_parameters()}


def same(one, other):
    return all(a[:2] == b[:2] and torch.equal(a[2], b[2]) for a, b in zip(one.values(), other.values(), strict=True))


def test_the_report_counts_what_was_replaced_in_a_line_each():
    installed = fast.install(unet(), kernels="triton", packed=True, channels_last=True, cuda_graph=True)
    assert str(installed).splitlines() == [
        "   8 x ResnetBlock: time, group norm and SiLU in one kernel",
        "   5 x GroupNorm: group norm in one kernel",
        "   4 x BasicTransformerBlock: residual and layer norm in one kernel",
        "   8 x Attention: attention in one kernel",
        "   4 x GEGLU: gate and GELU in one kernel",
        "   8 x Attention: projections packed into one matrix product",
        "   1 x UNet: weights in channels_last",
        "   1 x UNet: one CUDA graph for each shape",
    ]
    assert sum(installed.replaced.values()) == 39
    with_onednn = ["   1 x Linear: large products by oneDNN"] if onednn.there() else []
    assert str(fast.install(unet())).splitlines() == [
        *with_onednn,
        "   8 x ResnetBlock: SiLU in place",
        "   4 x FeedForward: large ones in parts",
        "   4 x GEGLU: gate in place",
        "   1 x UNet: rows of a large batch on threads of their own",
    ]
    assert str(fast.install(copy.deepcopy(small("clip")))) == "CLIPTextEncoder: plain torch, nothing replaced"


def test_names_classes_and_weights_stay():
    plain, network = unet(), unet()
    fast.install(network, kernels="triton", packed=True, channels_last=True, cuda_graph=True)
    assert list(network.state_dict()) == list(plain.state_dict())
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), plain.state_dict().values(), strict=True)
    )
    kinds = [[(name, type(module)) for name, module in of.named_modules()] for of in (network, plain)]
    assert kinds[0] == kinds[1]
    assert probe.places(network) == probe.places(plain)


def test_undone_it_is_bit_for_bit_what_it_was():
    network = unet()
    before, eps = laid(network), network(*CALL)
    parameters = list(network.parameters())
    installed = fast.install(network, kernels="triton", packed=True, channels_last=True, cuda_graph=True)
    assert fast.installed(network) is installed
    assert not same(laid(network), before)
    torch.testing.assert_close(network(*CALL), eps, **CLOSE)
    installed.undo()
    assert fast.installed(network) is None
    assert not any("forward" in vars(module) for module in network.modules())
    assert same(laid(network), before)
    assert all(a is b for a, b in zip(network.parameters(), parameters, strict=True))
    assert torch.equal(network(*CALL), eps)


def test_installed_again_the_last_call_says_what_holds():
    network = unet()
    before, eps = laid(network), network(*CALL)
    first = fast.install(network, kernels="triton", packed=True, channels_last=True)
    assert fast.install(network, kernels="triton").replaced.keys() < first.replaced.keys()
    in_place = {"ResnetBlock: SiLU in place": 8, "GEGLU: gate in place": 4}
    in_parts = {"FeedForward: large ones in parts": 4}
    by_onednn = {"Linear: large products by oneDNN": 1} if onednn.there() else {}
    assert fast.install(network).replaced == {
        **in_place,
        **in_parts,
        **by_onednn,
        "UNet: rows of a large batch on threads of their own": 1,
    }
    assert same(laid(network), before)
    assert torch.equal(network(*CALL), eps)


def test_in_place_torch_gives_the_same_bits_and_places():
    """What `ldm.load` installs on a CPU."""
    plain, network, every = unet(), unet(), probe.places(unet())
    expected = plain(*CALL)
    fast.install(network)
    assert torch.equal(network(*CALL), expected)
    with probe.capture(plain, *every) as these, probe.capture(network, *every) as those:
        assert torch.equal(network(*CALL), plain(*CALL))
    assert all(torch.equal(activation, those[place]) for place, (activation,) in these.runs.items())
    with torch.enable_grad():
        (gradient,), (same_gradient,) = (
            torch.autograd.grad(of(*CALL).sum(), of.conv_in.weight) for of in (plain, network)
        )
    assert torch.equal(gradient, same_gradient)


def test_the_autoencoder_in_place_gives_the_same_bits():
    vae, z = copy.deepcopy(small("vae")), randn(1, 4, 4, 4)
    expected = vae.decode(z)
    fast.install(vae)
    assert torch.equal(vae.decode(z), expected)


def test_every_place_is_seen_with_the_plain_networks_values():
    plain, network = unet(), unet()
    fast.install(network, kernels="triton", packed=True)
    with (
        probe.capture(plain, *probe.places(plain)) as expected,
        probe.capture(network, *probe.places(network)) as found,
    ):
        torch.testing.assert_close(network(*CALL), plain(*CALL), **CLOSE)
    for place, (activation,) in expected.runs.items():
        torch.testing.assert_close(found[place], activation, **CLOSE, msg=lambda m, place=place: f"{place}: {m}")


@pytest.mark.parametrize("place", ["down_blocks.0.resnets.0.norm2", f"{PLACE}.norm3", f"{PLACE}.attn1.to_k"])
def test_a_replaced_or_hooked_part_is_called_as_it_is(place):
    plain, network = unet(), unet()
    fast.install(network, kernels="triton", packed=True)
    for of in (plain, network):
        of.get_submodule(place).register_forward_hook(lambda module, args, output: 2 * output)
    expected = plain(*CALL)
    torch.testing.assert_close(network(*CALL), expected, **CLOSE)
    assert not torch.allclose(expected, unet()(*CALL), **CLOSE)


class OwnResnet(ResnetBlock):
    """A resnet that computes something else."""

    def forward(self, x, time=None):
        return 0.5 * super().forward(x, time)


class OwnNorm(nn.GroupNorm):
    def forward(self, x):
        return 2 * super().forward(x)


def test_blocks_of_ones_own_stay_as_they_are():
    plain = unet(UNetBlocks(resnet=OwnResnet, norm=OwnNorm))
    network = copy.deepcopy(plain)
    assert "OwnResnet" not in str(fast.install(network, kernels="triton"))
    torch.testing.assert_close(network(*CALL), plain(*CALL), **CLOSE)


def test_a_copy_has_it_too_and_for_itself():
    network = unet()
    fast.install(network, kernels="torch", packed=True, channels_last=True)
    eps, twin = network(*CALL), copy.deepcopy(network)
    torch.testing.assert_close(twin(*CALL), eps, **CLOSE)
    twin.conv_in.weight.zero_()
    installed = fast.installed(twin)
    assert isinstance(installed, Installed)
    assert installed.network is twin
    installed.undo()
    assert torch.equal(network(*CALL), eps)
    assert fast.installed(network) is not None
    assert not any("forward" in vars(module) for module in twin.modules())


def test_the_text_encoder_has_its_attention_replaced():
    clip = copy.deepcopy(small("clip"))
    ids = torch.arange(2 * 77).view(2, 77)
    plain = clip(ids)
    installed = fast.install(clip, kernels="triton")
    assert installed.replaced == {"SelfAttention: causal attention in one kernel": 3}
    torch.testing.assert_close(clip(ids), plain, **CLOSE)


def test_what_cannot_be_is_refused():
    with pytest.raises(ValueError, match="cuda_graph: got a CLIPTextEncoder, expected a U-Net"):
        fast.install(small("clip"), cuda_graph=True)
    network = unet()
    installed = fast.install(network, kernels="triton")
    network.mid_block.resnets[0].forward = lambda x, time: x
    with pytest.raises(ValueError, match=r"'mid_block.resnets.0': its forward was replaced since; put it back first"):
        installed.undo()


@pytest.mark.parametrize("forward", FORWARDS, ids=lambda forward: forward.__qualname__)
def test_arguments_keep_their_names(forward):
    """As in layer(input=x)."""
    theirs = list(inspect.signature(forward).parameters.values())[1:]  # after the module
    ours = list(inspect.signature(FORWARDS[forward].forward).parameters.values())[2:]  # after Ops and the module
    assert [(x.name, x.kind, x.default) for x in ours] == [(x.name, x.kind, x.default) for x in theirs]
