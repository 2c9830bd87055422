"""A low-rank adapter: nothing changes before the first step, the file is the adapter, a run goes on exactly."""

import copy
import gzip
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from adapter_files import pair
from ldm_tools import cli
from networks import small
from reference import FORWARD, GOLDEN, Golden, noise
from safetensors import safe_open
from safetensors.torch import load_file
from test_finetune import SCHEDULE, assert_same_state, material, network
from tiny_run import command, write_data, write_weights
from torch import Tensor

import ldm
from ldm.checkpoint import load_parts, save, sha256
from ldm.checkpoint.adapters import read_lora
from ldm.checkpoint.loading import build
from ldm.config import SD15
from ldm.train.finetune import Rounds, finetune
from ldm.train.low_rank import MODULES, Adapted, Adapter, LowRank, adapt, save_adapter
from ldm.train.objective import FineTuning
from ldm.train.run_folder import LAST, RunFolder
from ldm.train.unet_learner import UNetLearner
from ldm.train.watch import validation_examples

RECIPE = FineTuning(steps=4, batch=2, accumulate=2, lr=1e-2)


def fill(adapter: Adapter) -> dict[str, Tensor]:
    """Values that depend on the names alone, into the adapter and returned."""
    values = {}
    for name, change in adapter.items():
        shape = (change.lora_up.weight.shape[0], *change.lora_down.weight.shape[1:])
        down, up = pair(name, shape, adapter.rank)
        values |= {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": up}
    adapter.load_state_dict(values)
    return values


def inputs() -> tuple[Tensor, int, Tensor]:
    return noise("unet.x", (1, 4, 16, 16)), 437, noise("unet.context", (1, 77, 64))


# ---- the layers ------------------------------------------------------------------------------------


def test_a_change_is_b_a_x_by_hand():
    layer = torch.nn.Linear(5, 3)
    change = LowRank(layer, 2, 6.0, torch.Generator().manual_seed(0))
    with torch.no_grad():
        change.lora_up.weight.copy_(torch.arange(6.0).view(3, 2))
        x = torch.randn(4, 5)
        by_hand = x @ layer.weight.T + layer.bias + 6 / 2 * x @ change.lora_down.weight.T @ change.lora_up.weight.T
        torch.testing.assert_close(Adapted(layer, change)(x), by_hand, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("modules", MODULES)
def test_before_the_first_step_it_is_the_base(modules):
    unet = copy.deepcopy(small("unet"))
    adapter = adapt(unet, 4, modules=modules)
    with torch.no_grad():
        assert torch.equal(unet(*inputs()), small("unet")(*inputs()))
    assert all(not change.lora_up.weight.any() and change.lora_down.weight.any() for change in adapter.values())
    assert {p for p in unet.parameters() if p.requires_grad} == set(adapter.parameters())


def test_a_is_drawn_from_the_seed_alone():
    one, same, other = (adapt(copy.deepcopy(small("unet")), 4, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("modules", MODULES)
def test_the_file_holds_what_diffusers_and_our_own_reader_merge(tmp_path, modules):
    golden = Golden("lora_trained")
    unet = copy.deepcopy(small("unet"))
    adapter = adapt(unet, 4, 3.0, modules)
    save_adapter(tmp_path / "a.safetensors", adapter, fill(adapter))
    save(tmp_path / "small.safetensors", {part: small(part) for part in ("clip", "vae", "unet")})
    merged = load_parts(tmp_path / "small.safetensors", loras=[(tmp_path / "a.safetensors", 1.0)]).unet
    with torch.no_grad():
        beside, inside = unet(*inputs()), merged(*inputs())
    assert golden.error(f"{modules}.eps", beside) < FORWARD
    assert golden.error(f"{modules}.eps", inside) < FORWARD


@pytest.mark.parametrize("modules", MODULES)
def test_of_sd15_names_shapes_and_alpha_are_those_of_diffusers_and_peft(tmp_path, modules):
    wanted = json.loads(gzip.decompress((GOLDEN / "manifests" / "lora_kohya.json.gz").read_bytes()))[modules]
    adapter = adapt(build(SD15.unet), 8, 4.0, modules)
    weights = {name: torch.zeros(tensor.shape) for name, tensor in adapter.state_dict().items()}
    save_adapter(tmp_path / "a.safetensors", adapter, weights)
    stored = load_file(tmp_path / "a.safetensors")
    assert {name: list(tensor.shape) for name, tensor in stored.items()} == wanted
    assert {float(tensor) for name, tensor in stored.items() if name.endswith(".alpha")} == {4.0}
    assert (
        f"{len(wanted) // 3} weights of the U-Net, rank 8, scale 0.5"
        in read_lora(tmp_path / "a.safetensors").describe()
    )


@pytest.mark.parametrize("rank", [0, 33])
def test_a_rank_that_is_not_low_is_refused(rank):
    with pytest.raises(ValueError, match=rf"--lora: got rank {rank}, expected 1..32, the rank of down_blocks.0"):
        adapt(copy.deepcopy(small("unet")), rank)


# ---- a run -----------------------------------------------------------------------------------------


def run(folder: Path, recipe: FineTuning, stops: Sequence[bool] = ()) -> UNetLearner:
    """A run on made-up material, told to stop at the first True."""
    answers = iter(stops)
    unet = network()
    adapter = adapt(unet, 2, 4.0, base="abc")
    learner = UNetLearner(unet, recipe, adapter=adapter)
    rounds = Rounds(3, validation_examples(material(2)))
    run_folder = RunFolder(folder, {}, recipe.settings())
    finetune(learner, SCHEDULE, material(), run_folder, rounds, stop=lambda: next(answers, False))
    return learner


@pytest.mark.parametrize(
    "recipe", [RECIPE, replace(RECIPE, ema_decay=0.9, warmup=3, checkpoint_gradients=True, precision="bf16")]
)
def test_a_stopped_run_that_goes_on_equals_one_that_was_not(tmp_path, recipe):
    run(tmp_path / "straight", recipe)
    run(tmp_path / "stopped", recipe, [False, False, True])
    run(tmp_path / "stopped", recipe)
    assert_same_state(tmp_path / "straight", tmp_path / "stopped", 4)


def test_only_the_adapter_learns_and_only_it_is_saved(tmp_path):
    learner = run(tmp_path, replace(RECIPE, ema_decay=0.9))
    base = network().state_dict()
    kept = {name.replace(".frozen", ""): tensor for name, tensor in learner.unet.state_dict().items()}
    assert all(torch.equal(kept[name], tensor) for name, tensor in base.items())
    assert all(p.any() for p in learner.adapter.parameters())
    stored = load_file(tmp_path / LAST)
    assert stored.keys() == {*learner.adapter.state_dict(), *(f"{name}.alpha" for name in learner.adapter)}
    assert all(torch.equal(stored[name], average) for name, average in learner.ema.values.items())
    state = load_file(tmp_path / "step-00000004.state.safetensors")
    kinds = ("model", "exp_avg", "exp_avg_sq", "ema")
    assert state.keys() == {f"{kind}.{name}" for kind in kinds for name in learner.adapter.state_dict()}


# ---- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("runs")
    write_weights(place / "model.safetensors")
    write_data(place / "data")
    return place


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    return command(place / "model.safetensors", place / "data" / "CheXpert-v1.0-small", out, *more)


def test_what_comes_out_goes_into_the_other_commands(tmp_path, place, capsys):
    out, weights = tmp_path / "out", place / "model.safetensors"
    run = arguments(place, out, "--lora", "2", "--lora-alpha", "1", "--steps", "2", "--sample-every", "2")
    assert cli.main(run) == 0
    assert f"the LoRA (--lora {out / LAST} --weights {weights}) after 2 steps" in capsys.readouterr().out
    assert [path.name for path in (out / "samples").iterdir()] == ["step-00000002.png"]
    record = json.loads((out / "run.json").read_text())
    told = {"rank": 2, "alpha": 1.0, "modules": "attention", "base_sha256": sha256(weights)}
    assert record["settings"]["lora"] == told
    with safe_open(out / LAST, "pt") as file:
        metadata = file.metadata()
    assert (metadata["ldm.base_sha256"], metadata["ss_network_dim"]) == (sha256(weights), "2")
    plain, changed = ldm.load(weights), ldm.load(weights, loras=[(out / LAST, 1.0)])
    old, new = plain.unet.state_dict(), changed.unet.state_dict()
    moved = {name for name in old if not torch.equal(old[name], new[name])}
    ends = tuple(f"{end}.weight" for end in MODULES["attention"])
    assert moved == {name for name in old if name.endswith(ends)}
    assert cli.main(["inspect", str(weights), "--no-hash", "--lora", str(out / LAST)]) == 0
    assert "rank 2, scale 0.5" in capsys.readouterr().out
    # Of another rank it is another run
    assert cli.main([*run, "--resume", "auto"]) == 0
    other = arguments(place, out, "--lora", "4", "--lora-alpha", "1", "--steps", "2", "--resume", "auto")
    assert cli.main(other) == 2
    assert "holds a run with other settings: lora (was {" in capsys.readouterr().err
    whole = arguments(place, out, "--steps", "2", "--resume", "auto")
    assert cli.main(whole) == 2


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--lora", "0"], "--lora: got 0, expected more than 0"),
        (["--lora", "100"], "--lora: got rank 100, expected 1..32"),
        (["--lora", "2", "--lora-alpha", "nan"], "--lora-alpha: got nan, expected more than 0"),
        (["--lora-alpha", "2"], "--lora-alpha: it is of an adapter; give --lora RANK too"),
        (["--lora", "2", "--train-text-encoder"], "--lora: not together with --train-text-encoder"),
        (["--lora", "2", "--dtype", "bfloat16", "--bf16"], "--dtype: got bfloat16, expected float32, which what"),
        (["--lora", "2", "--shard"], "--lora: not together with --shard"),
    ],
)
def test_bad_input_is_one_line_before_any_work(tmp_path, place, capsys, options, complaint):
    assert cli.main(arguments(place, tmp_path / "out", *options)) == 2
    assert complaint in capsys.readouterr().err.splitlines()[-1]
