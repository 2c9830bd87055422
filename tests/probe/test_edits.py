"""Edits change what they name and nothing else, alone and with samplers, guidance and trees."""

from functools import partial

import pytest
import torch
from reference import FORWARD, noise
from small_networks import reference_run_inputs, sampling_model
from tapped import CROSS, capture, edited
from torch import Tensor, nn

from ldm import probe
from ldm.conditioning import constant, swap
from ldm.guidance import guided
from ldm.probe import add, apply, put, scale, swap_in, zero
from ldm.samplers import ddim
from ldm.schedule import Schedule, leading
from ldm.traversal.prompt_tree import swaps, traverse_tree
from ldm.unet import UNet

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 4


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
