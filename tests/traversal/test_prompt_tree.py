"""The prompt tree: every branch is the run it stands for, shared steps are taken once, and runs resume."""

from functools import cache, partial
from itertools import pairwise

import pytest
import torch
from networks import small
from reference import TRAJECTORY_G1, TRAJECTORY_G75, golden
from small_networks import ToyUNet, reference_run_inputs, sampling_model, toy_context
from torch import Tensor

from ldm.conditioning import Contexts, constant, piecewise, swap
from ldm.guidance import guided
from ldm.samplers import SAMPLERS, Noise, Sampler, Step, ddim, initial_noise, step_noise
from ldm.schedule import Schedule, linspace
from ldm.traversal.prompt_tree import Branch, swaps, traverse_tree, unet_rows

SCHEDULE = Schedule.sd15()
SHAPE = (4, 8, 8)
NEUTRAL, EFFUSION, DEVICES, EMPTY = (toy_context(value) for value in (0.1, 0.7, -0.5, 0.0))
NINE = range(5, 50, 5)
NESTED = Branch(
    "neutral",
    NEUTRAL,
    children=(
        Branch("effusion", EFFUSION, 2, children=(Branch("effusion+devices", DEVICES, 6), Branch("back", NEUTRAL, 6))),
        Branch("devices", DEVICES, 6),
        Branch("all along", DEVICES, 0),
        Branch("too late", DEVICES, 10),
    ),
)
# What each branch of NESTED stands for, as contexts of 10 steps.
NESTED_ALONE = {
    "neutral": constant(NEUTRAL, 10),
    "effusion": swap(NEUTRAL, EFFUSION, 2, 10),
    "effusion+devices": piecewise([NEUTRAL, EFFUSION, DEVICES], [2, 6], 10),
    "back": piecewise([NEUTRAL, EFFUSION, NEUTRAL], [2, 6], 10),
    "devices": swap(NEUTRAL, DEVICES, 6, 10),
    "all along": constant(DEVICES, 10),
    "too late": constant(NEUTRAL, 10),
}


def toy_guide(scale: float = 7.5, **options):
    return partial(guided, ToyUNet(), guidance_scale=scale, uncond=EMPTY, **options)


def toy_sample(unet=None, scale: float = 7.5, max_batch: int | None = None, **options):
    sd = sampling_model(unet or ToyUNet(), max_batch)
    return partial(sd.sample, guidance_scale=scale, negative=EMPTY, **options)


def alone(guide, schedule: Contexts, x_T: Tensor, **options) -> list[Step]:
    with torch.no_grad():
        return list(ddim(guide(schedule), x_T, SCHEDULE, len(schedule), **options))


# ---- a tree is its branches ------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.8])
@pytest.mark.parametrize("max_batch", [None, 1, 5])
def test_every_branch_is_the_run_it_stands_for(max_batch, eta):
    x_T, noise = initial_noise([0, 1, 2], SHAPE), step_noise([0, 1, 2], SHAPE)
    sample = toy_sample(max_batch=max_batch, eta=eta)
    result = traverse_tree(sample, x_T, NESTED, [0, 1, 2], 10, keep=("x_t", "x0_pred", "eps"))
    assert list(result.latents) == list(NESTED_ALONE)
    for name, schedule in NESTED_ALONE.items():
        run = alone(toy_guide(), schedule, x_T, eta=eta, noise=noise)
        assert torch.equal(result.latents[name], run[-1].x_prev), name
        for quantity, field in (("x_t", "x_prev"), ("x0_pred", "x0_pred"), ("eps", "eps")):
            assert torch.equal(result.path(name, quantity), torch.stack([getattr(step, field) for step in run]))


def run_of(name: str, sampler: Sampler, x_T: Tensor, noise: Noise) -> list[Step]:
    """A branch of NESTED alone, in pieces, of which each but the first knows x_t and nothing else."""
    schedule, timesteps = NESTED_ALONE[name], linspace(10)
    eps_fn = toy_guide(0.6 if sampler.uncond else 7.5)(schedule)
    swaps_at = {"effusion": [2], "effusion+devices": [2, 6], "back": [2, 6], "devices": [6]}.get(name, [])
    run: list[Step] = []
    with torch.no_grad():
        for start, stop in pairwise([0, *swaps_at, 10]):
            x_t = run[-1].x_prev if run else x_T
            rest = sampler(eps_fn, x_t, SCHEDULE, 10, start=start, noise=noise, timesteps=timesteps)
            run += [step for step in rest if step.index < stop]
    return run


@pytest.mark.parametrize("name", SAMPLERS)
def test_under_every_sampler_a_branch_is_the_run_it_stands_for(name):
    sampler, unet = SAMPLERS[name], ToyUNet()
    x_T, noise = initial_noise([0, 1], SHAPE), step_noise([0, 1], SHAPE)
    options = {"sampler": name, "spacing": "linspace"}
    done: list[int] = []
    result = traverse_tree(toy_sample(unet, 1, **options), x_T, NESTED, [0, 1], 10, progress=done.append)
    guided_sample = toy_sample(scale=0.6 if sampler.uncond else 7.5, **options)
    result_guided = traverse_tree(guided_sample, x_T, NESTED, [0, 1], 10, keep=("x_t", "eps"))
    for branch in NESTED_ALONE:
        run = run_of(branch, sampler, x_T, noise)
        assert torch.equal(result_guided.latents[branch], run[-1].x_prev), branch
        for quantity, field in (("x_t", "x_prev"), ("eps", "eps")):
            alone_path = torch.stack([getattr(step, field) for step in run])
            assert torch.equal(result_guided.path(branch, quantity), alone_path)
    # What it cost is what was foreseen, and what the network saw.
    assert result.unet_rows == sum(done) == sum(rows for rows, *_ in unet.calls)
    foreseen = 2 * unet_rows(NESTED, 10, sampler)
    assert result.unet_rows > foreseen if sampler.varies else result.unet_rows == foreseen


def test_neutral_to_neutral_is_the_neutral_path_bit_for_bit():
    tree = swaps(NEUTRAL, {"neutral again": NEUTRAL.clone()}, NINE)
    result = traverse_tree(toy_sample(), initial_noise([0, 1], SHAPE), tree, [0, 1])
    for latents in result.latents.values():
        assert torch.equal(latents, result.latents["neutral"])


def test_float32_latents_stay_so_under_a_half_precision_network():
    sample = partial(sampling_model(ToyUNet()).sample, negative=EMPTY.bfloat16())
    tree = swaps(NEUTRAL.bfloat16(), {"effusion": EFFUSION.bfloat16()}, (5,), 10)
    result = traverse_tree(sample, initial_noise([0, 1], SHAPE), tree, [0, 1], 10, keep=("x_t", "eps"))
    kept = [tensor for of in result.kept.values() for tensor in of.values()]
    assert {tensor.dtype for tensor in (*result.latents.values(), *kept)} == {torch.float32}


def test_contexts_may_differ_from_seed_to_seed():
    x_T, neutrals = initial_noise([0, 1], SHAPE), torch.cat([NEUTRAL, DEVICES])
    tree = Branch("neutral", neutrals, children=(Branch("effusion", EFFUSION, 3),))
    result = traverse_tree(toy_sample(), x_T, tree, [0, 1], 10)
    for row, neutral in enumerate([NEUTRAL, DEVICES]):
        expected = alone(toy_guide(), swap(neutral, EFFUSION, 3, 10), x_T[row : row + 1])[-1].x_prev
        assert torch.equal(result.latents["effusion"][row : row + 1], expected)


def test_swaps_names_every_style_and_step():
    tree = swaps(NEUTRAL, {"effusion": EFFUSION, "devices": DEVICES}, (5, 20), steps=50)
    assert [(child.name, child.at) for child in tree.children] == [
        ("effusion/s05", 5),
        ("effusion/s20", 20),
        ("devices/s05", 5),
        ("devices/s20", 20),
    ]
    authors = swaps(NEUTRAL, {"effusion": EFFUSION}, (5,), indexing="authors")
    assert [(child.name, child.at) for child in authors.children] == [("effusion/s05", 6)]
    with pytest.raises(ValueError, match=r"at: .*0\.\.50 steps, got 51"):
        swaps(NEUTRAL, {"effusion": EFFUSION}, (51,))


# ---- what it costs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("styles", "shared"), [(1, 275), (2, 500)])
def test_nine_swaps_cost_275_rows_a_seed_instead_of_500(styles, shared):
    tree = swaps(NEUTRAL, {f"style {k}": EFFUSION for k in range(styles)}, NINE)
    unet, done = ToyUNet(), []
    seeds = [0, 1, 2]
    result = traverse_tree(toy_sample(unet), initial_noise(seeds, SHAPE), tree, seeds, progress=done.append)
    assert unet_rows(tree, 50) == shared
    assert result.unet_rows == sum(done) == 3 * shared
    # The network saw just those, with the unconditional half that guidance adds, in one call a step.
    assert sum(rows for rows, *_ in unet.calls) == 2 * 3 * shared
    assert len(unet.calls) == 50


def test_only_what_is_asked_for_is_kept():
    result = traverse_tree(toy_sample(), initial_noise([0], SHAPE), NESTED, [0], 10, keep=("x_t",))
    own_steps = {name: len(tensor) for name, tensor in result.kept["x_t"].items()}
    assert own_steps["neutral"] == 10
    assert own_steps["effusion+devices"] == 4
    assert own_steps["too late"] == 0
    assert sum(own_steps.values()) == result.unet_rows
    assert result.path("effusion+devices", "x_t").shape == (10, 1, *SHAPE)
    assert torch.equal(result.path("devices", "x_t")[-1], result.latents["devices"])
    with pytest.raises(ValueError, match=r"quantity: .*\['x_t'\], got 'eps'"):
        result.path("neutral", "eps")
    with pytest.raises(ValueError, match=r"name: expected one of .* got 'nowhere'"):
        result.path("nowhere", "x_t")


# ---- errors come before the first evaluation ---------------------------------------------------------


@pytest.mark.parametrize(
    ("children", "message"),
    [
        ((Branch("a", EFFUSION, 1), Branch("a", DEVICES, 2)), "tree: expected unique names, got 'a' twice"),
        ((Branch("a", EFFUSION, 11),), r"branch 'a': expected to fork at step 0\.\.10, got 11"),
        ((Branch("a", EFFUSION, 4, (Branch("b", DEVICES, 3),)),), r"branch 'b': .*step 4\.\.10, got 3"),
        ((Branch("a", EFFUSION[0], 1),), r"branch 'a': expected a context of \(1 or 2, L, D\), got \(3, 8\)"),
        ((Branch("a", EFFUSION.repeat(3, 1, 1), 1),), r"branch 'a': .*got \(3, 3, 8\)"),
        ((Branch("a", EFFUSION[:, :2], 1),), r"branch 'a': expected a context like the root's"),
        ((Branch("a", EFFUSION.double(), 1),), r"branch 'a': expected a context like the root's"),
    ],
)
def test_a_tree_that_cannot_run_is_refused(children, message):
    unet, tree = ToyUNet(), Branch("neutral", NEUTRAL, children=children)
    with pytest.raises(ValueError, match=message):
        traverse_tree(toy_sample(unet, 1), initial_noise([0, 1], SHAPE), tree, [0, 1], 10)
    assert unet.calls == []


def test_other_arguments_are_named_too():
    x_T = initial_noise([0], SHAPE)
    with pytest.raises(ValueError, match="tree: expected the root 'neutral' at step 0, got 3"):
        traverse_tree(toy_sample(), x_T, Branch("neutral", NEUTRAL, 3), [0], 10)
    with pytest.raises(ValueError, match=r"keep: expected some of .* got \['x0'\]"):
        traverse_tree(toy_sample(), x_T, NESTED, [0], 10, keep=("x0",))
    with pytest.raises(ValueError, match=r"keep: expected each quantity once, got \['x_t', 'eps', 'x_t'\]"):
        traverse_tree(toy_sample(), x_T, NESTED, [0], 10, keep=("x_t", "eps", "x_t"))
    with pytest.raises(ValueError, match="seeds: expected 1, one a row of x_T, got 2"):
        traverse_tree(toy_sample(), x_T, NESTED, [0, 1], 10)


# ---- a real network --------------------------------------------------------------------------------


def small_guide(scale: float, **options):
    return partial(guided, small("unet"), guidance_scale=scale, uncond=reference_run_inputs()[2], **options)


def small_sample(scale: float, max_batch: int | None = None):
    sd = sampling_model(small("unet"), max_batch)
    return partial(sd.sample, guidance_scale=scale, negative=reference_run_inputs()[2])


@pytest.mark.parametrize(("scale", "tolerance"), [(1.0, TRAJECTORY_G1), (7.5, TRAJECTORY_G75)])
def test_a_branch_that_swaps_twice_is_compvis(scale, tolerance):
    x_T, (first, second, third), _ = reference_run_inputs()
    twice = Branch("one swap", second, 17, children=(Branch("two swaps", third, 34),))
    result = traverse_tree(small_sample(scale), x_T, Branch("none", first, children=(twice,)), [0], keep=("x_t",))
    stored = golden(f"ddim50_swap_g{scale:g}")
    assert stored.error("x", result.path("two swaps", "x_t").squeeze(1)) < tolerance
    assert golden(f"ddim_variants_g{scale:g}").error("noswap50.final", result.latents["none"]) < tolerance


def small_tree() -> Branch:
    _, (first, second, third), _ = reference_run_inputs()
    deep = Branch("deep", second, 1, children=(Branch("deeper", third, 4),))
    return Branch("neutral", first, children=(deep, Branch("same", first.clone(), 2)))


SMALL_ALONE = {"neutral": [0], "deep": [0, 1], "deeper": [0, 1, 2]}  # which prompts, in turn


def small_alone(name: str, x_T: Tensor, max_batch: int | None = None) -> Tensor:
    prompts = reference_run_inputs()[1]
    contexts = piecewise([prompts[k] for k in SMALL_ALONE[name]], [1, 4][: len(SMALL_ALONE[name]) - 1], 6)
    return alone(small_guide(7.5, max_batch=max_batch), contexts, x_T)[-1].x_prev


def test_one_latent_a_call_makes_results_independent_of_everything_else_in_the_batch():
    x_T = initial_noise([0, 1], SHAPE)
    latents = traverse_tree(small_sample(7.5, 1), x_T, small_tree(), [0, 1], 6).latents
    assert torch.equal(latents["same"], latents["neutral"])
    for name in SMALL_ALONE:
        for seed in (0, 1):
            assert torch.equal(latents[name][seed : seed + 1], small_alone(name, x_T[seed : seed + 1]))


def test_one_branch_a_call_makes_a_branch_the_run_alone_bit_for_bit():
    x_T = initial_noise([0, 1], SHAPE)
    latents = traverse_tree(small_sample(7.5, 2 * len(x_T)), x_T, small_tree(), [0, 1], 6).latents
    assert torch.equal(latents["same"], latents["neutral"])
    for name in SMALL_ALONE:
        assert torch.equal(latents[name], small_alone(name, x_T))


@cache
def small_one_by_one(name: str) -> Tensor:
    return small_alone(name, initial_noise([0, 1], SHAPE), max_batch=1)


@pytest.mark.parametrize("max_batch", [None, 3])
def test_any_other_batching_agrees_to_the_roundings_of_one_forward_pass_a_step(max_batch):
    # A matrix product of another size adds in another order: 2e-6 a forward pass of this network, which a run at
    # guidance 7.5 carries along. The tolerance is the one that independent implementations are held to.
    x_T = initial_noise([0, 1], SHAPE)
    latents = traverse_tree(small_sample(7.5, max_batch), x_T, small_tree(), [0, 1], 6).latents
    for name in [*SMALL_ALONE, "same"]:
        expected = small_one_by_one(name.replace("same", "neutral"))
        assert (latents[name] - expected).norm() / expected.norm() < TRAJECTORY_G75


def test_branches_that_fork_later_stay_closer_to_the_neutral_path():
    tree = swaps(NEUTRAL, {"effusion": EFFUSION}, NINE)
    latents = traverse_tree(toy_sample(), initial_noise([0], SHAPE), tree, [0]).latents
    distances = [float((latents[f"effusion/s{s:02d}"] - latents["neutral"]).norm()) for s in NINE]
    assert all(early > late > 0 for early, late in pairwise(distances))
