"""Taps and edits: names mean what they say, edits change what they name and nothing else, nothing is left behind."""

from functools import partial

import pytest
import torch
from networks import SMALL, module_name, small, too_large
from reference import FORWARD, golden, image, noise
from small_networks import reference_run_inputs, sampling_model
from torch import Tensor, nn

from ldm import probe
from ldm.blocks import Attention
from ldm.clip import CLIPTextEncoder
from ldm.conditioning import constant, swap
from ldm.guidance import guided
from ldm.probe import Taps, add, apply, put, scale, swap_in, zero
from ldm.samplers import ddim
from ldm.schedule import Schedule, leading
from ldm.traversal.prompt_tree import swaps, traverse_tree
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

pytestmark = pytest.mark.usefixtures("no_grad")

CROSS = "up_blocks.1.attentions.0.transformer_blocks.0.attn2"
SELF = "mid_block.attentions.0.transformer_blocks.0.attn1"
STEPS = 4


@pytest.fixture(scope="module")
def unet() -> UNet:
    return small("unet")


@pytest.fixture(scope="module")
def x() -> Tensor:
    return noise("small.latent", (2, 4, 16, 16))


@pytest.fixture(scope="module")
def context() -> Tensor:
    return noise("small.context", (2, 77, 64))


@pytest.fixture(scope="module")
def plain(unet, x, context) -> Tensor:
    with torch.no_grad():
        return unet(x, 500, context)


def capture(unet: UNet, x: Tensor, context: Tensor, *names: str, t: int = 500) -> Taps:
    with probe.capture(unet, *names) as seen:
        unet(x, t, context)
    return seen


def edited(unet: UNet, x: Tensor, context: Tensor, edits: dict, t: int = 500) -> Tensor:
    with probe.edit(unet, edits):
        return unet(x, t, context)


def hooks_of(network: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())


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


# ---- edits -----------------------------------------------------------------------------------------


def test_zero_scale_add_and_put_are_arithmetic(unet, x, context):
    place = "mid_block"
    before = capture(unet, x, context, place)[place]
    direction = noise("direction", (128, 1, 1))
    for edit, expected in [
        (zero(), torch.zeros_like(before)),
        (scale(0.5), 0.5 * before),
        (add(direction, 2.0), before + 2.0 * direction),
        (put(direction), direction.expand_as(before)),
        (apply(torch.tanh), before.tanh()),
        (torch.tanh, before.tanh()),  # any function of the activation
        ([torch.tanh, scale(2.0)], 2.0 * before.tanh()),
        ([scale(2.0), add(direction)], 2.0 * before + direction),
    ]:
        with probe.edit(unet, {place: edit}), probe.capture(unet, place, f"{place}.resnets.1") as seen:
            unet(x, 500, context)
        assert torch.equal(seen[place], expected)
        assert torch.equal(seen[f"{place}.resnets.1"], before)  # what lies before the place is as it was


def test_scaling_by_one_changes_no_bit(unet, x, context, plain):
    modules = [name for name in probe.places(unet) if not name.endswith(".probabilities")]
    assert torch.equal(edited(unet, x, context, {name: scale(1.0) for name in modules}), plain)


def test_probabilities_left_as_they_are_give_the_fused_result(unet, x, context, plain):
    same = edited(unet, x, context, {"*.probabilities": apply(lambda p: p.clone())})
    torch.testing.assert_close(same, plain, rtol=FORWARD, atol=FORWARD)  # written out instead of fused: other sums


def test_a_residual_branch_is_removed_by_zeroing_its_last_layer(unet, x, context):
    edits = {"mid_block.resnets.*.conv2": zero(), "mid_block.attentions.0.proj_out": zero()}
    with probe.edit(unet, edits), probe.capture(unet, "down_blocks.3", "mid_block") as seen:
        unet(x, 500, context)
    assert torch.equal(seen["mid_block"], seen["down_blocks.3"])  # nothing is left but the way past it


def test_a_removed_skip_is_a_concatenation_with_zeros(unet, x, context):
    with (
        probe.edit(unet, {"up_blocks.1.skips.2": zero()}),
        probe.capture(unet, "up_blocks.1.resnets.2.conv_shortcut") as seen,
    ):
        unet(x, 500, context)
    shortcut = unet.up_blocks[1].resnets[2].conv_shortcut
    with probe.edit(unet, {"up_blocks.1.skips.2": zero()}), probe.capture(unet, "up_blocks.1.attentions.1") as main:
        unet(x, 500, context)
    alone = nn.functional.conv2d(main["up_blocks.1.attentions.1"], shortcut.weight[:, :128], shortcut.bias)
    torch.testing.assert_close(seen["up_blocks.1.resnets.2.conv_shortcut"], alone, rtol=1e-5, atol=1e-5)


def test_one_head(unet, x, context):
    attention = unet.get_submodule(CROSS)
    found = capture(unet, x, context, f"{CROSS}.heads")[f"{CROSS}.heads"]
    with probe.edit(unet, {f"{CROSS}.heads": zero().only(heads=[3])}), probe.capture(unet, CROSS) as seen:
        unet(x, 500, context)
    without = found.clone()
    without[:, 3] = 0
    torch.testing.assert_close(seen[CROSS], attention.to_out(without.transpose(1, 2).flatten(2)), rtol=0, atol=0)


def test_one_token_of_the_probabilities(unet, x, context):
    """A word that is looked at twice as much, as Prompt-to-Prompt re-weights it."""
    names = (f"{CROSS}.probabilities", f"{CROSS}.to_v", f"{CROSS}.heads")
    seen = capture(unet, x, context, *names)
    probabilities, v = seen[names[0]].clone(), seen[names[1]].unflatten(-1, (8, -1)).transpose(1, 2)
    probabilities[..., 5] *= 2
    with probe.edit(unet, {names[0]: scale(2.0).only(tokens=[5])}), probe.capture(unet, names[2]) as after:
        unet(x, 500, context)
    torch.testing.assert_close(after[names[2]], probabilities @ v, rtol=1e-5, atol=1e-6)


def test_probabilities_then_heads_whatever_the_order_of_the_edits(unet, x, context):
    both = {f"{CROSS}.heads": zero().only(heads=[0]), f"{CROSS}.probabilities": scale(0.5)}
    for edits in (both, dict(reversed(both.items()))):
        with probe.edit(unet, edits), probe.capture(unet, f"{CROSS}.heads") as seen:
            unet(x, 500, context)
        heads = seen[f"{CROSS}.heads"]
        assert not heads[:, 0].any()
        half = capture(unet, x, context, f"{CROSS}.heads")[f"{CROSS}.heads"][:, 1:] / 2
        torch.testing.assert_close(heads[:, 1:], half, rtol=1e-5, atol=1e-6)


def test_tokens_of_a_sequence(unet, x, context):
    before = capture(unet, x, context, f"{CROSS}.to_v")[f"{CROSS}.to_v"]
    with probe.edit(unet, {f"{CROSS}.to_v": zero().only(tokens=[0, 76])}), probe.capture(unet, f"{CROSS}.to_v") as seen:
        unet(x, 500, context)
    after = seen[f"{CROSS}.to_v"]
    assert not after[:, [0, 76]].any()
    assert torch.equal(after[:, 1:76], before[:, 1:76])


def test_rows_and_timesteps_select_rows(unet, x, context):
    t = torch.tensor([981, 21])
    plain = unet(x, t, context)
    for only in ({"rows": [1]}, {"timesteps": [21]}, {"rows": "cond"}):
        with probe.edit(unet, {"mid_block": zero().only(**only)}):
            out = unet(x, t, context)
        # The other row passes through the same calls of the same size: the same bits.
        assert torch.equal(out[0], plain[0])
        assert not torch.allclose(out[1], plain[1])
    for only in ({"rows": []}, {"timesteps": [500]}, {"rows": "uncond", "timesteps": [21]}):
        with probe.edit(unet, {"mid_block": zero().only(**only)}):
            assert torch.equal(unet(x, t, context), plain)


def test_selections_add_up():
    edit = zero().only(heads=[1]).only(rows=[0])
    out = edit(torch.ones(2, 3, 4, 5), probe.Moment("a.heads", None))
    assert out.sum() == 2 * 3 * 4 * 5 - 4 * 5


def test_a_context_for_one_layer(unet, x, context, plain):
    other = noise("other context", (1, 77, 64))
    whole = edited(unet, x, context, {"*.attn2.context": put(other)})
    assert torch.equal(whole, unet(x, 500, other.expand(2, -1, -1)))
    one = edited(unet, x, context, {f"{CROSS}.context": put(other)})
    assert not torch.allclose(one, plain)
    assert not torch.allclose(one, whole)
    with probe.edit(unet, {f"{CROSS}.context": put(other)}), probe.capture(unet, "*.attn2.context") as seen:
        unet(x, 500, context)
    changed = [name for name, of in seen.runs.items() if not torch.equal(of[0], context)]
    assert changed == [f"{CROSS}.context"]


def test_another_runs_activation(unet, x, context, plain):
    """All skips and the middle of another run, and all of its times: what comes out is the other run."""
    other_x, other = noise("other x", (2, 4, 16, 16)), noise("other context", (2, 77, 64))
    everything_below = ("up_blocks.3.attentions.2", "mid_block")
    with probe.capture(unet, *everything_below) as donor:
        unet(other_x, 981, other)
        expected = unet(other_x, 500, other)
    assert torch.equal(edited(unet, x, context, {"up_blocks.3.attentions.2": swap_in(donor)}), expected)
    middle = edited(unet, x, context, {"mid_block": swap_in(donor)})
    assert not torch.allclose(middle, plain)
    assert torch.equal(middle, edited(unet, x, context, {"mid_block": put(donor["mid_block"])}))
    with pytest.raises(ValueError, match="0 captured calls"):
        edited(unet, x, context, {"mid_block": swap_in(donor)}, t=3)


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"mid_block": put(torch.zeros(3, 3))}, r"value: \(3, 3\) does not broadcast to 'mid_block', \(2, 128, 2, 2\)"),
        ({"mid_block": apply(lambda a: a[:, :1, :1, 0])}, "does not broadcast to 'mid_block'"),
        ({"mid_block": zero().only(heads=[0])}, "heads: 'mid_block' has none"),
        ({"mid_block": zero().only(tokens=[0])}, "tokens: 'mid_block' is"),
        ({f"{CROSS}.heads": zero().only(heads=[8])}, r"heads: got \[8\], expected numbers in 0..7"),
        ({f"{CROSS}.probabilities": zero().only(tokens=[77])}, r"tokens: got \[77\], expected numbers in 0..76"),
        ({"mid_block": zero().only(rows=[2])}, r"rows: got \[2\], expected numbers in 0..1"),
        ({"mid_block": zero().only(rows="both")}, "rows: got 'both' of 2 rows"),
    ],
)
def test_edits_that_do_not_fit_are_refused(unet, x, context, edits, message):
    with pytest.raises(ValueError, match=message):
        edited(unet, x, context, edits)


def test_what_is_no_edit_is_refused(unet):
    with (
        pytest.raises(ValueError, match=r"edits: 'mid_block' is given 0\.5, expected an edit such as zero"),
        probe.edit(unet, {"mid_block": 0.5}),
    ):
        pass


def test_an_edit_whose_timesteps_never_come_is_said(unet, x, context, caplog):
    never, some = zero().only(timesteps=[999, 981, 3, 2]), zero().only(timesteps=[500, 3])
    with probe.edit(unet, {"mid_block": [never, some], "conv_in": scale(1.0)}):
        unet(x, 500, context)
    assert [record.getMessage() for record in caplog.records] == [
        "edit of 'mid_block' never acted: the network was not called at any of its timesteps, 999, 981, 3, ..."
    ]


def test_one_place_is_edited_once(unet):
    opened = probe.edit(unet, {f"{CROSS}.heads": scale(2.0), "mid_block": zero()})
    with opened:
        for again in ("mid_block", f"{CROSS}.probabilities"):
            with pytest.raises(ValueError, match="is edited already"), probe.edit(unet, {again: zero()}):
                pass
        with probe.edit(unet, {"conv_in": scale(1.0)}):
            pass
    with probe.edit(unet, {"mid_block": zero()}):  # free again
        pass


# ---- with samplers, guidance and trees -------------------------------------------------------------


def run(unet: UNet, schedule, scale_: float = 3.0, max_batch: int | None = None, rows: int = 2) -> Tensor:
    x_T, _, uncond = reference_run_inputs()
    eps_fn = guided(unet, schedule, scale_, uncond, max_batch=max_batch)
    *_, last = ddim(eps_fn, torch.cat([x_T, -x_T])[:rows], Schedule.sd15(), STEPS)
    return last.x_prev


def test_injecting_into_all_layers_is_the_embedding_schedule(unet):
    """Layer by layer and step by step are two ways to say one thing, where both are asked for everything."""
    _, (neutral, style, _), _ = reference_run_inputs()
    late = put(style).only(rows="cond", timesteps=leading(STEPS)[2:])
    with probe.edit(unet, {"*.attn2.context": late}):
        injected = run(unet, constant(neutral, STEPS))
    assert torch.equal(injected, run(unet, swap(neutral, style, at=2, steps=STEPS)))


def test_halves_are_the_same_rows_however_the_batch_is_split(unet):
    _, (neutral, style, _), _ = reference_run_inputs()
    with probe.edit(unet, {f"{CROSS}.context": put(style).only(rows="cond")}):
        whole, split = (run(unet, constant(neutral, STEPS), max_batch=size) for size in (None, 1))
    torch.testing.assert_close(split, whole, rtol=1e-4, atol=1e-4)  # as far as batches of other sizes agree


def test_a_tree_is_edited_like_its_branches(unet):
    x_T, (neutral, style, _), uncond = reference_run_inputs()
    sample = partial(sampling_model(unet, max_batch=1).sample, guidance_scale=3.0, negative=uncond)
    with probe.edit(unet, {"up_blocks.2.skips.0": scale(0.5).only(timesteps=leading(STEPS)[1:])}):
        tree = traverse_tree(sample, x_T, swaps(neutral, {"style": style}, [2], STEPS), [0], STEPS)
        alone = run(unet, swap(neutral, style, at=2, steps=STEPS), max_batch=1, rows=1)
    assert torch.equal(tree.latents["style/s02"], alone)


def test_a_whole_trajectory_swapped_in_is_that_trajectory(unet):
    """Activations of one run put into another, step by step, each at its own time."""
    _, (neutral, style, _), _ = reference_run_inputs()
    with probe.capture(unet, "conv_out") as donor:
        expected = run(unet, constant(style, STEPS))
    with probe.edit(unet, {"conv_out": swap_in(donor)}):
        assert torch.equal(run(unet, constant(neutral, STEPS)), expected)


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
