"""Fine-tuning: what one step computes, and `ldm finetune` from weights and a folder to weights, killed in between."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm_tools import cli
from numpy.typing import NDArray
from safetensors.torch import load_file
from tiny_run import CLIP, UNET, VAE, command, write_data, write_weights
from torch import Tensor

import ldm
from ldm.clip import CLIPTextEncoder
from ldm.config import DiffusionConfig
from ldm.schedule import Schedule
from ldm.train.diffusion import min_snr_weights
from ldm.train.finetune import Rounds, finetune
from ldm.train.objective import FineTuning, Material, encode_captions, examples, loss_of
from ldm.train.run_folder import RunFolder
from ldm.train.unet_learner import UNetLearner
from ldm.train.watch import validate, validation_examples
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

SCHEDULE, CPU = Schedule.sd15(), torch.device("cpu")
RECIPE = FineTuning(steps=4, batch=2, accumulate=2, lr=1e-3)
COUNT = 7


class Stored:
    """Made-up posteriors; a mirrored image's mean is negative."""

    moment = torch.randn(COUNT, 8, 8, 8, generator=torch.Generator().manual_seed(0))

    def moments(self, rows: NDArray[np.int64], flipped: Sequence[bool]) -> Tensor:
        signs = torch.tensor([-1.0 if flip else 1.0 for flip in flipped]).view(-1, 1, 1, 1)
        found = self.moment[torch.from_numpy(rows)]
        return torch.cat([found[:, :4] * signs, found[:, 4:]], dim=1)


def material(count: int = COUNT) -> Material:
    contexts = torch.randn(4, 5, 32, generator=torch.Generator().manual_seed(1))
    files = np.array([f"image{i}.png" for i in range(count)])
    return Material(files, Stored(), torch.arange(count) % 3, contexts, 0.18215)


def network() -> UNet:
    torch.manual_seed(0)
    return UNet(UNET)


# ---- one step --------------------------------------------------------------------------------------


def test_the_defaults_are_the_papers():
    recipe = FineTuning(steps=1)
    assert (recipe.lr, recipe.betas, recipe.eps, recipe.weight_decay) == (1e-5, (0.9, 0.999), 1e-8, 1e-2)
    assert (recipe.batch, recipe.accumulate, recipe.clip, recipe.lr_at(0), recipe.lr_at(10**6)) == (8, 4, 1, 1e-5, 1e-5)
    assert not any((recipe.ema_decay, recipe.caption_dropout, recipe.min_snr_gamma, recipe.flip))
    assert recipe.precision == "float32"


def test_the_rate_rises_linearly_then_stays():
    recipe = FineTuning(steps=9, lr=1.0, warmup=4)
    assert [recipe.lr_at(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_a_batch_does_not_depend_on_how_it_is_cut():
    rows = np.array([3, 0, 6, 1])
    recipe = FineTuning(steps=1, caption_dropout=0.5, flip=True)
    whole = examples(material(), recipe, rows, first_place=10)
    parts = [examples(material(), recipe, rows[:1], 10), examples(material(), recipe, rows[1:], 11)]
    for together, apart in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(together, torch.cat(apart))


def test_an_image_is_drawn_anew_each_time():
    first, again = (examples(material(), RECIPE, np.array([3]), place) for place in (3, 10))
    assert not torch.equal(first.x_0, again.x_0)
    assert not torch.equal(first.eps, again.eps)
    other = examples(material(), FineTuning(steps=1, seed=1), np.array([3]), 3)
    assert not torch.equal(first.eps, other.eps)


def test_latents_are_scaled_samples_of_the_posterior():
    rows = np.zeros(2000, dtype=np.int64)
    batch = examples(material(), RECIPE, rows, 0)
    mean, logvar = Stored.moment[0, :4], Stored.moment[0, 4:].clamp(-30, 20)
    deviations = (batch.x_0 / 0.18215 - mean) / (0.5 * logvar).exp()
    # 512,000 standard normals: their mean is within 5 / sqrt(512,000) = 0.007, their deviation within 0.005 of 1
    assert abs(float(deviations.mean())) < 0.007
    assert abs(float(deviations.std()) - 1) < 0.005
    # Times are uniform on 0 .. 999: 2000 draws average 499.5 within five times 289 / sqrt(2000)
    assert abs(float(batch.t.float().mean()) - 499.5) < 33
    assert 0 <= int(batch.t.min()) < 10 < 990 < int(batch.t.max()) < 1000


def test_half_of_the_images_are_mirrored_and_some_captions_dropped():
    rows = np.zeros(1000, dtype=np.int64)
    plain = examples(material(), RECIPE, rows, 0)
    mirrored = examples(material(), FineTuning(steps=1, flip=True, caption_dropout=0.2), rows, 0)
    turned = (plain.x_0 != mirrored.x_0).flatten(1).any(1)
    assert abs(float(turned.float().mean()) - 0.5) < 0.08  # five standard deviations of a coin thrown 1000 times
    empty = (mirrored.context == material().contexts[-1]).flatten(1).all(1)
    assert abs(float(empty.float().mean()) - 0.2) < 0.064  # likewise
    assert torch.equal(plain.eps, mirrored.eps)  # options do not change the noise


def test_captions_are_encoded_once():
    asked: list[str] = []

    def encode_prompts(prompts: Sequence[str]) -> Tensor:
        asked.extend(prompts)
        return torch.tensor([[[float(len(prompt))]] for prompt in prompts])

    contexts, places = encode_captions(encode_prompts, ["bbb", "a", "bbb", "cc"], batch=2)
    assert asked == ["a", "bbb", "cc", ""]
    assert contexts[places].flatten().tolist() == [3, 1, 3, 2]
    assert float(contexts[-1]) == 0


def test_min_snr_caps_what_clean_images_count():
    t = torch.tensor([0, 500, 999])
    snr = [float(a / (1 - a)) for a in SCHEDULE.alphas_cumprod[t]]
    assert snr[0] > 5 > snr[1]
    expected = torch.tensor([5 / snr[0], 1.0, 1.0])
    torch.testing.assert_close(min_snr_weights(SCHEDULE, t, 5.0), expected)


@pytest.mark.parametrize("gamma", [0.0, 5.0])
def test_the_loss_is_the_weighted_error_of_the_noise(gamma):
    unet, recipe = network(), FineTuning(steps=1, min_snr_gamma=gamma)
    batch = examples(material(), recipe, np.arange(4), 0)
    with torch.no_grad():
        terms = []
        for x_0, eps, t, context in zip(*batch, strict=True):
            abar = float(SCHEDULE.alphas_cumprod[t])
            x_t = math.sqrt(abar) * x_0 + math.sqrt(1 - abar) * eps
            weight = min(1.0, gamma * (1 - abar) / abar) if gamma else 1.0
            terms.append(weight * float((unet(x_t[None], int(t), context[None])[0] - eps).square().mean()))
        loss = float(loss_of(unet, batch, SCHEDULE, recipe, CPU))
    assert loss == pytest.approx(sum(terms) / 4, rel=1e-5)  # float32, summed in another order


def gradients(recipe: FineTuning) -> dict[str, Tensor]:
    learner = UNetLearner(network(), recipe)
    learner.gradients(3, material(), SCHEDULE)
    return {name: p.grad for name, p in learner.unet.named_parameters() if p.grad is not None}


def test_two_batches_of_two_are_one_of_four():
    cut = gradients(FineTuning(steps=1, batch=2, accumulate=2))
    whole = gradients(FineTuning(steps=1, batch=4, accumulate=1))
    assert len(cut) == len(list(network().parameters()))
    for name in whole:  # float32, summed in another order
        torch.testing.assert_close(cut[name], whole[name], rtol=1e-3, atol=1e-6)


def test_on_a_gpu_weights_lie_as_its_convolutions_read_them(monkeypatch):
    """Which changes the order of sums, nothing else."""
    plain = UNetLearner(network(), RECIPE)
    monkeypatch.setattr("ldm.train.unet_learner.on_gpu", lambda device: True)
    laid = UNetLearner(network(), RECIPE)
    for learner in (plain, laid):
        learner.gradients(0, material(), SCHEDULE)
    for name, p in laid.unet.named_parameters():
        assert p.is_contiguous(memory_format=torch.channels_last) or p.ndim != 4, name
        torch.testing.assert_close(p.grad, plain.unet.get_parameter(name).grad, rtol=1e-3, atol=1e-6)
    assert not all(p.is_contiguous() for p in laid.unet.parameters())


def test_recomputed_activations_give_the_same_gradients():
    kept, recomputed = gradients(RECIPE), gradients(replace(RECIPE, checkpoint_gradients=True))
    assert [name for name in kept if not torch.equal(kept[name], recomputed[name])] == []


def test_the_validation_loss_is_told_by_time():
    unet, bins = network(), validation_examples(material())
    assert [(int(b.t.min()) // 250, int(b.t.max()) // 250) for b in bins] == [(0, 0), (1, 1), (2, 2), (3, 3)]
    losses = validate(unet, bins, SCHEDULE, RECIPE, CPU)
    assert list(losses) == ["0-249", "250-499", "500-749", "750-999", "mean"]
    with torch.no_grad():
        assert losses["0-249"] == pytest.approx(float(loss_of(unet, bins[0], SCHEDULE, RECIPE, CPU)), rel=1e-5)
    assert validate(unet, bins, SCHEDULE, RECIPE, CPU) == losses


# ---- the loop --------------------------------------------------------------------------------------


def run(folder: Path, recipe: FineTuning, save_every: int, stops: Sequence[bool] = ()) -> int:
    """A run on made-up material, told to stop at the first True."""
    answers = iter(stops)
    torch.manual_seed(1)  # of the frozen networks
    frozen = {"clip": CLIPTextEncoder(CLIP), "vae": AutoencoderKL(VAE)}
    rounds = Rounds(save_every, validation_examples(material(2)))
    return finetune(
        UNetLearner(network(), recipe),
        SCHEDULE,
        material(),
        RunFolder(folder, frozen, recipe.settings()),
        rounds,
        stop=lambda: next(answers, False),
    )


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        FineTuning(steps=4, batch=2, accumulate=1, lr=1e-3, ema_decay=0.9, warmup=3),
        FineTuning(steps=4, batch=1, accumulate=1, lr=1e-3, precision="fp16"),
    ],
)
def test_a_stopped_run_that_goes_on_equals_one_that_was_not(tmp_path, recipe):
    assert run(tmp_path / "straight", recipe, 3) == 4
    assert run(tmp_path / "stopped", recipe, 3, [False, False, True]) == 2
    assert run(tmp_path / "stopped", recipe, 3) == 4
    assert_same_state(tmp_path / "straight", tmp_path / "stopped", 4)
    steps = [json.loads(line)["step"] for line in (tmp_path / "stopped" / "log.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3, 4]


def test_what_is_not_finite_stops_the_run_before_it_is_learnt(tmp_path):
    broken = material()
    broken.contexts[:] = math.inf
    learner = UNetLearner(network(), RECIPE)
    before = {name: p.clone() for name, p in learner.unet.named_parameters()}
    with pytest.raises(
        ValueError, match=r"loss at step 1 is nan, of image\d\.png, image\d\.png; there is no checkpoint"
    ):
        finetune(learner, SCHEDULE, broken, RunFolder(tmp_path, {}, {}), Rounds(1))
    assert all(torch.equal(p, before[name]) for name, p in learner.unet.named_parameters())


def test_a_gradient_that_is_not_finite_stops_the_run_too(tmp_path):
    learner = UNetLearner(network(), RECIPE)
    learner.unet.conv_in.weight.register_hook(lambda grad: grad * math.inf)
    before = {name: p.clone() for name, p in learner.unet.named_parameters()}
    with pytest.raises(
        ValueError, match=r"norm at step 1 is (nan|inf), of (image\d\.png, ){3}image\d\.png; there is no"
    ):
        finetune(learner, SCHEDULE, material(), RunFolder(tmp_path, {}, {}), Rounds(1))
    assert all(torch.equal(p, before[name]) for name, p in learner.unet.named_parameters())


def test_in_float16_a_gradient_that_overflows_halves_the_scale_and_is_left_out():
    learner = UNetLearner(network(), replace(RECIPE, precision="fp16"))
    overflow = learner.unet.conv_in.weight.register_hook(lambda grad: grad * math.inf)
    before, scale = learner.unet.conv_in.weight.clone(), learner.scaler.get_scale()
    learner.step(0, material(), SCHEDULE)
    assert torch.equal(learner.unet.conv_in.weight, before)
    assert (learner.scaler.get_scale(), learner.counters()["updates"]) == (scale / 2, 0)
    overflow.remove()
    learner.step(1, material(), SCHEDULE)
    assert learner.counters()["updates"] == 1


def assert_same_state(a: Path, b: Path, step: int) -> None:
    name = f"step-{step:08d}.state.safetensors"
    one, other = load_file(a / name), load_file(b / name)
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []
    assert (a / "last.safetensors").read_bytes() == (b / "last.safetensors").read_bytes()


def test_a_compiled_network_keeps_its_names():
    plain, compiled = UNetLearner(network(), RECIPE), UNetLearner(network(), replace(RECIPE, compile=True))
    assert [name for name, _ in plain.tensors()] == [name for name, _ in compiled.tensors()]


@pytest.mark.slow
def test_a_compiled_network_learns_the_same():
    losses = []
    for recipe in (RECIPE, replace(RECIPE, compile=True)):
        learner = UNetLearner(network(), recipe)
        losses.append([learner.step(step, material(), SCHEDULE).loss for step in range(2)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # float32, fused and summed in another order


# ---- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "model.safetensors")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("data"))


def test_what_comes_out_is_what_goes_in_again(tmp_path, weights, data, capsys, caplog):
    out = tmp_path / "out"
    assert cli.main(command(weights, data, out, "--steps", "3", "--save-every", "2", "--caption-dropout", "0.1")) == 0
    assert "the autoencoder alone brings it back to" in caplog.text  # of random weights, which is said before training
    assert "after 3 steps" in capsys.readouterr().out
    before, after = ldm.load(weights), ldm.load(out / "last.safetensors")
    for part in ("clip", "vae"):
        ours = getattr(after, part).state_dict()
        assert all(torch.equal(tensor, ours[name]) for name, tensor in getattr(before, part).state_dict().items())
    moved = {n for n, tensor in before.unet.state_dict().items() if not torch.equal(tensor, after.unet.state_dict()[n])}
    assert moved == set(before.unet.state_dict())
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert [row["step"] for row in rows if "validation" in row] == [0, 2, 3]
    assert all(row["grad_norm"] > 0 and row["images_per_s"] > 0 and row["loss"] > 0 for row in rows[1:])
    # Once more it goes on, with nothing to do; as the start of another run it is refused.
    assert cli.main(command(weights, data, out, "--steps", "3", "--caption-dropout", "0.1", "--resume", "auto")) == 0
    assert cli.main(command(weights, data, out, "--steps", "3")) == 2
    assert "holds a run at step 3; --resume auto" in capsys.readouterr().err


def test_a_run_draws_what_it_is_asked_for_and_times_its_cache(tmp_path, weights, data):
    out = tmp_path / "out"
    arguments = command(weights, data, out, "--steps", "2", "--sample-every", "2", "--measure-cache")
    assert cli.main(arguments) == 0
    assert [path.name for path in (out / "samples").iterdir()] == ["step-00000002.png"]
    assert list((out / "tensorboard").iterdir())
    record = json.loads((out / "run.json").read_text())
    speed = record["speed"]
    assert speed["ratio"] == pytest.approx(speed["images_per_s_cached"] / speed["images_per_s_uncached"])
    assert 0 < speed["outside_cached"] < 1
    assert (record["processes"], record["images"]) == (1, 8)
    before = (out / "last.safetensors").read_bytes()
    assert cli.main([*arguments, "--resume", "auto"]) == 0  # timing it again does not change the model
    assert (out / "last.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--batch", "20"], "--batch: got 20, more than the"),
        (["--only", "Gout"], ": got 'Gout'; expected one of No Finding"),
        (["--only", "fractured"], ": got 'fractured'; did you mean 'Fracture'?"),
        (["--only", "Fracture"], "is left that shows ['Fracture']"),
        (["--steps", "0"], "--steps: got 0, expected more than 0"),
        (["--caption-dropout", "1.5"], "--caption-dropout: got 1.5, expected 0 or more, below 1"),
        (["--size", "15"], "--size: got '15'"),
        (["--dtype", "float16"], "--dtype: got float16, expected float32, which what is learnt is kept in"),
        (["--shard"], "--shard: divides the network among processes; start them with torchrun"),
        (["--shard", "--fp16"], "--shard: not together with --fp16; use --bf16"),
        (["--measure-cache", "--no-cache"], "--measure-cache: there is no cache to measure"),
        (["--split", "nowhere.csv"], "split: got 'nowhere.csv'"),
    ],
)
def test_bad_input_is_one_line_before_any_work(tmp_path, weights, data, capsys, options, complaint):
    out = tmp_path / "out"
    assert cli.main(command(weights, data, out, *options)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("ldm finetune: ")
    assert complaint in said
    assert not list(out.glob("*.safetensors"))


@pytest.mark.parametrize("prediction", ["v", "x0"])
def test_a_model_of_v_or_x0_stays_one(tmp_path, data, prediction):
    told = DiffusionConfig(prediction=prediction, zero_terminal_snr=prediction == "v", spacing="trailing")
    weights, out = write_weights(tmp_path / "model.safetensors", diffusion=told), tmp_path / "out"
    assert cli.main(command(weights, data, out, "--steps", "2", "--min-snr", "5", "--sample-every", "2")) == 0
    after = ldm.load(out / "last.safetensors")
    assert (after.diffusion, after.prediction) == (told, prediction)
    assert json.loads((out / "run.json").read_text())["settings"]["diffusion"]["prediction"] == prediction


@pytest.mark.parametrize("prediction", ["eps", "v", "x0"])
def test_the_loss_is_of_what_the_network_predicts(prediction):
    unet, batch = network(), examples(material(), RECIPE, np.arange(4), 0)
    unet.prediction = prediction
    with torch.no_grad():
        terms = []
        for x_0, eps, t, context in zip(*batch, strict=True):
            alpha, std = float(SCHEDULE.alphas_cumprod[t]) ** 0.5, float(1 - SCHEDULE.alphas_cumprod[t]) ** 0.5
            wanted = {"eps": eps, "v": alpha * eps - std * x_0, "x0": x_0}[prediction]
            terms.append(
                float((unet((alpha * x_0 + std * eps)[None], int(t), context[None])[0] - wanted).square().mean())
            )
        loss = float(loss_of(unet, batch, SCHEDULE, RECIPE, CPU, prediction))
        told = validate(unet, [batch] * 4, SCHEDULE, RECIPE, CPU, prediction)["mean"]
    assert [loss, told] == pytest.approx([sum(terms) / 4] * 2, rel=1e-5)  # float32, summed in another order
    learner = UNetLearner(unet, RECIPE)
    losses = learner.gradients(3, material(), SCHEDULE)
    other = UNetLearner(network(), RECIPE).gradients(3, material(), SCHEDULE)
    assert bool((losses == other).all()) == (prediction == "eps")


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.parametrize("more", [[], ["--lora", "2"]])
def test_a_killed_run_that_goes_on_equals_one_that_was_not(tmp_path, weights, data, how, more):
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    endless = command(weights, data, killed, "--steps", "100000", "--save-every", "3", *more)
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(
        [sys.executable, "-m", "ldm_tools", *endless],
        cwd=Path(__file__).parents[2],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    while len(list(killed.glob("step-*.state.safetensors"))) < 2 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(how)
    said, _ = process.communicate(timeout=600)
    if how == signal.SIGTERM:
        assert process.returncode == 0
        assert "--resume auto goes on" in said
    else:
        assert process.returncode == -how
    step = max(int(path.name[5:13]) for path in killed.glob("step-*.state.safetensors"))

    ten_more = ["--steps", str(step + 10), "--save-every", "1000", *more]
    assert cli.main(command(weights, data, killed, *ten_more, "--resume", "auto")) == 0
    assert cli.main(command(weights, data, straight, *ten_more)) == 0
    assert_same_state(killed, straight, step + 10)
