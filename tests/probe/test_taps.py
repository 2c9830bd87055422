"""Taps: names mean what they say, what is captured is what was there, nothing is left behind."""

import pytest
import torch
from networks import SMALL, module_name, small, too_large
from reference import FORWARD, golden, image, noise
from tapped import CROSS, SELF, capture, hooks_of
from torch import nn

from ldm import probe
from ldm.blocks import Attention
from ldm.clip import CLIPTextEncoder
from ldm.probe import scale, swap_in, zero
from ldm.vae import AutoencoderKL

pytestmark = pytest.mark.usefixtures("no_grad")


# ---- names -----------------------------------------------------------------------------------------


def test_names_mean_what_the_reference_calls_so(unet, x, context):
    """Every module output that CompVis' own network gave, found by name."""
    reference = golden("small_unet")
    of = {name: module_name("unet", name.removeprefix("tap."), SMALL.unet) for name in reference.names()[:]
          if name.startswith("tap.")}  # fmt: skip
    seen = capture(unet, x, context, *of.values(), t=981)
    errors = {name: reference.error(name, seen[place][:1]) for name, place in of.items()}
    assert len(errors) == 49
    assert not too_large(errors, FORWARD)


def test_every_place_runs_and_has_one_name(unet, x, context):
    names = probe.places(unet)
    assert len(set(names)) == len(names)
    seen = capture(unet, x, context, *names)
    # `up_blocks` and the like are lists, which hold no activation; the identity in a feed-forward runs like the rest.
    assert [name for name in names if len(seen.runs[name]) != 1] == []
    # Blocks, resnets, attentions, skips of SD1.5's depth.
    assert sum(name.endswith(".attn2") for name in names) == 16
    assert sum(".skips." in name for name in names) == 12
    assert {f"{kind}_blocks.{i}" for kind in ("down", "up") for i in range(4)} | {"mid_block"} <= set(names)


def test_skips_have_names_but_no_keys(unet):
    assert [key for key in unet.state_dict() if "skips" in key] == []


def test_a_skip_is_what_the_way_down_left(unet, x, context):
    seen = capture(unet, x, context, "conv_in", "down_blocks.3", "down_blocks.0", "up_blocks.*.skips.*")
    assert torch.equal(seen["up_blocks.0.skips.0"], seen["down_blocks.3"])
    assert torch.equal(seen["up_blocks.3.skips.2"], seen["conv_in"])
    # The first level ends with its downsampler: the third skip that the level above takes from below.
    assert torch.equal(seen["up_blocks.2.skips.2"], seen["down_blocks.0"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mid_blok", "UNet has no 'mid_blok'; did you mean 'mid_block'?"),
        ("up_blocks.1.skip.0", "did you mean 'up_blocks.1.skips.0'"),
        (f"{SELF}.context", f"did you mean '{SELF.replace('attn1', 'attn2')}.context'"),  # it looks at itself
        ("*.nothing", "has no"),
        ("up_blocks", "has no 'up_blocks'; it is a list: name one of up_blocks.0, up_blocks.1,"),
        (  # not a skip of the way up, which is another thing
            "down_blocks.0.skips.0",
            "'down_blocks.0' has resnets, attentions, downsamplers; 'skips' is in up_blocks.*",
        ),
        ("down_blocks.7", "'down_blocks' has 0, 1, 2, 3"),
        ("mid_block.atentions.0.proj_out", "did you mean 'mid_block.attentions.0.proj_out'?"),
    ],
)
def test_unknown_names_are_refused_with_the_nearest(unet, name, message):
    for opened in (probe.capture(unet, name), probe.edit(unet, {name: zero()})):
        with pytest.raises(ValueError, match="place: ") as error, opened:
            pass
        assert message in str(error.value)


# ---- capture ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [CROSS, SELF])
def test_probabilities_are_those_of_the_fused_attention(unet, x, context, place):
    seen = capture(unet, x, context, place, f"{place}.probabilities", f"{place}.heads", f"{place}.to_v")
    attention = unet.get_submodule(place)
    probabilities, v = seen[f"{place}.probabilities"], seen[f"{place}.to_v"]
    torch.testing.assert_close(probabilities.sum(-1), torch.ones(probabilities.shape[:3]))
    found = probabilities @ v.unflatten(-1, (attention.heads, -1)).transpose(1, 2)
    # Sums of 77 or 4 float32 products in another order.
    torch.testing.assert_close(found, seen[f"{place}.heads"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(attention.to_out(found.transpose(1, 2).flatten(2)), seen[place], rtol=1e-5, atol=1e-6)


def test_probabilities_by_hand():
    attention = Attention(2, heads=1).requires_grad_(False)
    for name in ("to_q", "to_k", "to_v"):
        getattr(attention, name).weight.copy_(torch.eye(2))
    q = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    both = probe.attention_probabilities(q[:, None], q[:, None])
    high = torch.exp(torch.tensor(2**-0.5))  # scores of the first row: 1 / sqrt(2), 0
    torch.testing.assert_close(both[0, 0], torch.tensor([[high / (1 + high), 1 / (1 + high)], [0.5, 0.5]]))
    causal = probe.attention_probabilities(q[:, None], q[:, None], causal=True)
    torch.testing.assert_close(causal[0, 0], torch.tensor([[1.0, 0.0], [0.5, 0.5]]))


def test_capturing_changes_no_bit(unet, x, context, plain):
    with probe.capture(unet, *probe.places(unet)):
        assert torch.equal(unet(x, 500, context), plain)


def test_every_call_is_recorded_with_its_timesteps(unet, x, context):
    with probe.capture(unet, "mid_block") as seen:
        unet(x, 981, context)
        unet(x, torch.tensor([500, 1]), context)
    assert [t.tolist() for t in seen.timesteps] == [[981, 981], [500, 1]]
    assert len(seen.runs["mid_block"]) == 2
    assert torch.equal(seen["mid_block"], seen.runs["mid_block"][1])
    assert torch.equal(seen.at("mid_block", torch.tensor([981, 981])), seen.runs["mid_block"][0])
    with pytest.raises(ValueError, match="0 captured calls of 2 rows at t = \\[3, 3\\]"):
        seen.at("mid_block", torch.tensor([3, 3]))
    with pytest.raises(ValueError, match="'conv_in' was not captured"):
        seen["conv_in"]


def test_keep_says_what_is_kept(unet, x, context):
    with probe.capture(unet, "mid_block", keep=lambda a: a.mean(dim=(2, 3))) as seen:
        unet(x, 500, context)
    assert seen["mid_block"].shape == (2, 128)


def test_nothing_is_left_when_the_with_ends(unet, x, context, plain):
    before = hooks_of(unet)
    with (
        probe.capture(unet, *probe.places(unet)),
        probe.edit(unet, {f"{CROSS}.probabilities": zero(), "mid_block": scale(2)}),
    ):
        assert hooks_of(unet) > before
    with pytest.raises(RuntimeError, match="in the midst"), probe.edit(unet, {"mid_block": zero()}):
        raise RuntimeError("in the midst")
    assert hooks_of(unet) == before == 0
    assert torch.equal(unet(x, 500, context), plain)


def test_what_was_captured_by_a_pattern_is_found_by_it(unet, x, context):
    seen = capture(unet, x, context, f"{CROSS[:-1]}*.probabilities", "mid_block.resnets.*")
    assert seen["*.resnets.1"] is seen["mid_block.resnets.1"]
    with pytest.raises(ValueError, match=r"'\*.probabilities' is 2 places, expected one: up_blocks.1.*attn1.*attn2"):
        seen["*.probabilities"]
    with pytest.raises(ValueError, match=r"'\*.heads' was not captured"):
        seen["*.heads"]


class Mixer(nn.Module):
    """An attention with names of its own inside."""

    def __init__(self):
        super().__init__()
        self.heads = 2
        self.query, self.key, self.value, self.mix = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):
        split = [layer(x).unflatten(-1, (2, 2)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        return self.mix(nn.functional.scaled_dot_product_attention(*split).transpose(1, 2).flatten(2))


def test_an_attention_of_ones_own_has_places_once_it_is_named(monkeypatch):
    network, x = nn.Sequential(Mixer()), noise("mixer", (1, 3, 4))
    assert probe.places(network) == ("0", "0.query", "0.key", "0.value", "0.mix")
    monkeypatch.setitem(probe.ATTENTIONS, Mixer, probe.AttentionKind("query", "key", "value", "mix"))
    plain = network(x)
    with probe.capture(network, "*.probabilities") as seen, probe.edit(network, {"0.heads": zero().only(heads=[1])}):
        assert not torch.allclose(network(x), plain)
    assert seen["*.probabilities"].shape == (1, 2, 3, 3)


# ---- the other networks ----------------------------------------------------------------------------


def test_the_autoencoder(x):
    vae: AutoencoderKL = small("vae")
    pictures = image("small.image", 64, 64)
    attention = "encoder.mid_block.attentions.0"
    with probe.capture(vae, f"{attention}.probabilities", "decoder.up_blocks.1", "encoder.conv_out") as seen:
        moments = vae.moments(pictures)
        plain = vae.decode(x)
    assert seen[f"{attention}.probabilities"].shape == (1, 1, 64, 64)
    assert torch.equal(vae.quant_conv(seen["encoder.conv_out"]), moments)
    with probe.edit(vae, {"decoder.mid_block.attentions.0.to_out": zero()}):
        assert not torch.allclose(vae.decode(x), plain)
    with probe.edit(vae, {"decoder.up_blocks.1": swap_in(seen)}):
        assert torch.equal(vae.decode(-x), plain)
    with (
        pytest.raises(ValueError, match="outside a U-Net's call"),
        probe.edit(vae, {"decoder.conv_in": zero().only(timesteps=[1])}),
    ):
        vae.decode(x)


def test_the_text_encoder():
    clip: CLIPTextEncoder = small("clip")
    ids = torch.from_numpy(golden("small_clip")["ids"])[:2]
    states = clip.hidden_states(ids)
    attention = "text_model.encoder.layers.1.self_attn"
    names = [f"{attention}.probabilities", f"{attention}.heads", f"{attention}.v_proj", "text_model.encoder.layers.0"]
    with probe.capture(clip, *names) as seen:
        clip(ids)
    probabilities, heads, v = (seen[name] for name in names[:3])
    assert torch.equal(seen[names[3]], states[1])
    assert not probabilities.triu(1).any()  # a token sees none that come after
    torch.testing.assert_close(probabilities @ v.unflatten(-1, (4, -1)).transpose(1, 2), heads, rtol=1e-5, atol=1e-6)
    with probe.edit(clip, {f"{attention}.heads": zero().only(tokens=[5])}):
        changed = clip.hidden_states(ids)[2] != states[2]
    assert changed.any(dim=(0, 2)).tolist() == [i == 5 for i in range(77)]
