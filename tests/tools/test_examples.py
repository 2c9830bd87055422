"""The worked extensions: each is nothing where it should be nothing, and does what its equations say."""

import copy

import pytest
import torch
from ldm_tools.examples import cross_attention_lora, deep_cache, free_u, linear_attention, measure
from networks import SMALL, small
from reference import noise
from torch.nn import functional as F

import ldm
from ldm import probe
from ldm.blocks import Attention
from ldm.config import PHANTOM
from ldm.guidance import guided
from ldm.pipeline import PHANTOM_WEIGHTS, StableDiffusion
from ldm.traversal.round_trip import relative_error
from ldm.unet import UNet


@pytest.fixture
def sd() -> StableDiffusion:
    return ldm.load(PHANTOM_WEIGHTS)


# ---- 1: re-weighted skips and backbone -------------------------------------------------------------


@torch.no_grad()
def test_free_u_with_ones_is_nothing(unet, inputs):
    plain = unet(*inputs)
    with free_u.free_u(unet, {0: (1.0, 1.0), 1: (1.0, 1.0)}):
        same = unet(*inputs)
    # There and back through a Fourier transform, twelve times.
    torch.testing.assert_close(same, plain, rtol=1e-4, atol=1e-5)
    with free_u.free_u(unet):
        assert relative_error(unet(*inputs), plain) > 0.01
    assert torch.equal(unet(*inputs), plain)


def test_the_backbone_grows_where_it_is_strong():
    strength = torch.tensor([0.0, 1.0, 2.0, 4.0]).view(1, 1, 2, 2)
    backbone = strength.expand(1, 6, 2, 2)
    louder = free_u.louder(backbone, b=1.5)
    torch.testing.assert_close(louder[:, :3], backbone[:, :3] * (1 + 0.5 * strength / 4))
    assert torch.equal(louder[:, 3:], backbone[:, 3:])
    assert torch.equal(free_u.louder(torch.full((1, 2, 3, 3), 7.0), 1.5), torch.full((1, 2, 3, 3), 7.0))


def test_a_skip_loses_its_low_frequencies_only():
    y = torch.arange(8) / 8 * 2 * torch.pi
    low, high = torch.cos(y).expand(1, 2, 8, 8), torch.cos(3 * y).expand(1, 2, 8, 8)
    torch.testing.assert_close(free_u.quieter(5 + low + high, s=0.25), 0.25 * (5 + low) + high, rtol=0, atol=1e-5)


# ---- 2: deep features kept -------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("config", [SMALL.unet, PHANTOM.unet], ids=["attention in the last block", "none there"])
def test_a_cache_that_is_fresh_is_exact(config):
    torch.manual_seed(0)
    unet = UNet(config).eval()
    x, context = noise("x", (2, 4, 16, 16)), noise("c", (2, 5, config.context_width))
    cached = deep_cache.DeepCached(unet, interval=2)
    eps = cached(x, 500, context)
    assert torch.equal(eps, unet(x, 500, context))
    # The same time and input again: from the kept features comes the same result, without the deep layers.
    with probe.capture(unet, "mid_block") as taps:
        again = cached(x, 500, context)
    assert not taps.runs["mid_block"]
    assert torch.equal(again, eps)
    assert torch.equal(cached(-x, 20, context), unet(-x, 20, context))  # the third call is a full one


@torch.no_grad()
def test_deep_features_are_computed_at_every_nth_step(sd):
    plain = measure.sample(sd, sd.unet, seeds=(0,), steps=6)
    cached = deep_cache.DeepCached(sd.unet, interval=3)
    with probe.capture(sd.unet, "mid_block") as taps:
        drawn = measure.sample(sd, cached, seeds=(0,), steps=6)
    assert len(taps.runs["mid_block"]) == 2
    assert 0 < relative_error(drawn, plain) < 0.5
    exact = measure.sample(sd, deep_cache.DeepCached(sd.unet, interval=1), seeds=(0,), steps=6)
    assert torch.equal(exact, plain)


# ---- 3: low-rank changes of cross-attention ---------------------------------------------------------


def test_lora_eq_3():
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 7)
    lora = cross_attention_lora.LoRA(linear, rank=2, scale=3.0)
    x = torch.randn(4, 5)
    assert torch.equal(lora(x), linear(x))  # B is zero at first
    torch.nn.init.normal_(lora.b)
    merged = F.linear(x, linear.weight + 3.0 / 2 * lora.b @ lora.a, linear.bias)
    torch.testing.assert_close(lora(x), merged, rtol=1e-5, atol=1e-6)


def test_only_cross_attention_learns(inputs):
    unet = copy.deepcopy(small("unet"))
    plain = unet(*inputs)
    parameters = cross_attention_lora.add_lora(unet, rank=3)
    assert torch.equal(unet(*inputs), plain)
    assert len(parameters) == 16 * 4 * 2
    assert {id(p) for p in unet.parameters() if p.requires_grad} == {id(p) for p in parameters}
    assert all(".attn2." in name for name, p in unet.named_parameters() if p.requires_grad)


def test_a_few_steps_lower_the_loss_and_leave_the_weights(sd):
    before = {name: tensor.clone() for name, tensor in sd.unet.state_dict().items()}
    latents = cross_attention_lora.pairs(sd, count=4, first_seed=1_000_000)
    assert latents.shape == (2, 4, *sd.latent_shape)
    assert not torch.equal(latents[0], latents[1])
    cross_attention_lora.train(sd, latents, steps=3, batch=4)
    after = sd.unet.state_dict()
    for name, tensor in before.items():
        attention, dot, projection = name.partition(".attn2.to_")
        kept = name if not dot else f"{attention}{dot}" + ".linear.".join(projection.rsplit(".", 1))
        assert torch.equal(after[kept], tensor), name
    moved = [name for name, tensor in after.items() if name.endswith(".b") and tensor.any()]
    assert len(moved) == len([name for name in after if name.endswith(".b")])


# ---- 4: linear attention ---------------------------------------------------------------------------


@torch.no_grad()
def test_linear_attention_is_its_formula_term_by_term():
    torch.manual_seed(0)
    student = linear_attention.LinearAttention(6, heads=2)
    x = torch.randn(1, 5, 6)
    q, k, v = (project(x).view(5, 2, 3) for project in (student.to_q, student.to_k, student.to_v))
    out = torch.zeros(5, 2, 3)
    for n in range(5):
        for h in range(2):
            weights = torch.stack([(F.elu(q[n, h]) + 1) @ (F.elu(k[m, h]) + 1) for m in range(5)])
            out[n, h] = (weights[:, None] * v[:, h]).sum(0) / weights.sum()
    torch.testing.assert_close(student(x), student.to_out(out.view(1, 5, 6)), rtol=1e-5, atol=1e-6)


def test_the_student_learns_from_the_teacher():
    torch.manual_seed(0)
    teacher, student = Attention(8, heads=2), linear_attention.LinearAttention(8, heads=2)
    student.load_state_dict(teacher.state_dict())
    shown = torch.randn(32, 10, 8)
    with torch.no_grad():
        before = relative_error(student(shown), teacher(shown))
    linear_attention.distil(teacher, student, shown, steps=300)
    with torch.no_grad():
        assert relative_error(student(shown), teacher(shown)) < 0.5 * before


@torch.no_grad()
def test_one_self_attention_is_replaced(sd):
    shown = linear_attention.lessons(sd, count=2)
    teacher, student = linear_attention.replace(sd)
    assert shown.shape == (2, 64, teacher.to_q.in_features)
    assert sum(isinstance(m, linear_attention.LinearAttention) for m in sd.unet.modules()) == 1
    assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))


# ---- what they are measured with -------------------------------------------------------------------


@torch.no_grad()
def test_sampling_is_the_libraries_own(sd):
    neutral = measure.sample(sd, sd.unet, prompts=("a",), seeds=(3,), steps=2)
    empty, context = sd.encode_prompts(["", "a"])[:, None]
    eps_fn = guided(sd.unet, ldm.conditioning.constant(context, 2), measure.GUIDANCE, empty)
    *_, last = ldm.samplers.ddim(eps_fn, ldm.samplers.initial_noise([3], sd.latent_shape), sd.schedule, 2)
    assert torch.equal(neutral, last.x_prev)
