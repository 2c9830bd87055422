"""Fine-tuning with the text encoder: it learns as the U-Net does, and all that holds of a run holds of it too."""

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from ldm_tools import cli
from numpy.typing import NDArray
from safetensors.torch import load_file
from test_train_distributed import assert_same_run
from test_train_distributed import finetune as finetune_in_processes
from tiny_run import CLIP, UNET, VAE, command, write_data, write_weights
from torch import Tensor

import ldm
from ldm.clip import CLIPTextEncoder
from ldm.schedule import Schedule
from ldm.train.finetune import Rounds, finetune
from ldm.train.objective import FineTuning, Material, examples, loss_of
from ldm.train.run_folder import LAST, RunFolder
from ldm.train.unet_learner import UNetLearner, as_one
from ldm.train.watch import draw_samples, validation_examples
from ldm.unet import UNet
from ldm.vae import AutoencoderKL

SCHEDULE, CPU = Schedule.sd15(), torch.device("cpu")
RECIPE = FineTuning(steps=4, batch=2, accumulate=2, lr=1e-3, caption_dropout=0.2)
COUNT = 5


class Stored:
    """Made-up posteriors."""

    moment = torch.randn(COUNT, 8, 8, 8, generator=torch.Generator().manual_seed(0))

    def moments(self, rows: NDArray[np.int64], flipped: Sequence[bool]) -> Tensor:
        return self.moment[torch.from_numpy(rows)]


def material(count: int = COUNT) -> Material:
    """Two captions and the empty one, as token ids."""
    ids = torch.randint(1000, (3, 7), generator=torch.Generator().manual_seed(1))
    return Material(np.array([f"{i}.png" for i in range(count)]), Stored(), torch.arange(count) % 2, ids, 0.18215)


def networks() -> tuple[UNet, CLIPTextEncoder]:
    torch.manual_seed(0)
    return UNet(UNET), CLIPTextEncoder(CLIP)


def learner(recipe: FineTuning = RECIPE) -> UNetLearner:
    unet, clip = networks()
    return UNetLearner(unet, recipe, clip=clip)


def test_token_ids_through_both_networks_are_contexts_through_one():
    unet, clip = networks()
    tokens = material()
    with torch.no_grad():
        contexts = replace(tokens, contexts=clip(tokens.contexts))
        one, other = (
            loss_of(network, examples(given, RECIPE, np.arange(4), 0), SCHEDULE, RECIPE, CPU)
            for network, given in ((as_one(unet, clip), tokens), (unet, contexts))
        )
    assert float(one) == pytest.approx(float(other), rel=1e-5)  # float32, captions in batches of another size


def test_both_learn_and_their_gradients_are_clipped_together():
    both = learner(replace(RECIPE, clip=1e-3))
    both.gradients(0, material(), SCHEDULE)
    squares = [float(p.grad.square().sum()) for network in networks_of(both) for p in network.parameters()]
    before = {name: p.detach().clone() for name, p in both.trained.named_parameters()}
    taken = both.step(0, material(), SCHEDULE)
    assert taken.grad_norm == pytest.approx(sum(squares) ** 0.5, rel=1e-4)  # float32, summed in another order
    clipped = [float(p.grad.square().sum()) for network in networks_of(both) for p in network.parameters()]
    assert sum(clipped) ** 0.5 == pytest.approx(1e-3, rel=1e-2)
    assert [name for name, p in both.trained.named_parameters() if torch.equal(p, before[name])] == []


def networks_of(both: UNetLearner) -> tuple[UNet, CLIPTextEncoder]:
    assert both.clip is not None
    return both.unet, both.clip


def test_what_is_watched_is_the_average_of_both():
    both = learner(replace(RECIPE, ema_decay=0.9))
    for step in range(2):
        both.step(step, material(), SCHEDULE)
    assert both.ema is not None
    unet, clip = networks_of(both)
    trained = {name: p.detach().clone() for name, p in both.trained.named_parameters()}
    with both.as_saved():
        assert all(torch.equal(p, both.ema.values[f"clip.{name}"]) for name, p in clip.named_parameters())
        assert all(torch.equal(p, both.ema.values[f"unet.{name}"]) for name, p in unet.named_parameters())
    assert all(torch.equal(p, trained[name]) for name, p in both.trained.named_parameters())


# ---- the loop --------------------------------------------------------------------------------------


def run(folder: Path, recipe: FineTuning, stops: Sequence[bool] = ()) -> int:
    """A run on made-up material, told to stop at the first True."""
    answers = iter(stops)
    both = learner(recipe)
    torch.manual_seed(1)
    run_folder = RunFolder(folder, {"vae": AutoencoderKL(VAE)}, recipe.settings())
    rounds = Rounds(3, validation_examples(material(2)))
    return finetune(both, SCHEDULE, material(), run_folder, rounds, stop=lambda: next(answers, False))


def same_files(a: Path, b: Path, step: int) -> bool:
    """Whether the state and the model are the same bit for bit."""
    name = f"step-{step:08d}.state.safetensors"
    one, other = load_file(a / name), load_file(b / name)
    same = one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    return same and (a / LAST).read_bytes() == (b / LAST).read_bytes()


@pytest.mark.parametrize("recipe", [RECIPE, replace(RECIPE, ema_decay=0.9, warmup=3, checkpoint_gradients=True)])
def test_a_stopped_run_that_goes_on_equals_one_that_was_not(tmp_path, recipe):
    assert run(tmp_path / "straight", recipe) == 4
    assert run(tmp_path / "stopped", recipe, [False, False, True]) == 2
    assert run(tmp_path / "stopped", recipe) == 4
    assert same_files(tmp_path / "straight", tmp_path / "stopped", 4)


# ---- the command -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model.safetensors and data/."""
    place = tmp_path_factory.mktemp("runs")
    write_weights(place / "model.safetensors")
    write_data(place / "data")
    return place


def arguments(place: Path, out: Path, *more: str) -> list[str]:
    data = place / "data" / "CheXpert-v1.0-small"
    return command(place / "model.safetensors", data, out, "--train-text-encoder", *more)


def test_what_comes_out_is_what_goes_in_again(tmp_path, place, capsys):
    out = tmp_path / "out"
    assert cli.main(arguments(place, out, "--steps", "2", "--sample-every", "2")) == 0
    before, after = ldm.load(place / "model.safetensors"), ldm.load(out / LAST)
    for part, learns in (("clip", True), ("unet", True), ("vae", False)):
        old, new = getattr(before, part).state_dict(), getattr(after, part).state_dict()
        moved = {name for name in old if not torch.equal(old[name], new[name])}
        assert moved == (set(old) if learns else set()), part
    assert [path.name for path in (out / "samples").iterdir()] == ["step-00000002.png"]
    assert cli.main(arguments(place, out, "--steps", "2", "--resume", "auto")) == 0
    capsys.readouterr()
    frozen = [word for word in arguments(place, out, "--steps", "3") if word != "--train-text-encoder"]
    assert cli.main([*frozen, "--resume", "auto"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "holds a run with other settings: " in said
    assert "text_encoder (was {" in said


def test_without_it_a_run_is_what_it_was(tmp_path, place):
    """Neither settings nor names of tensors tell of the option, so that runs begun before it go on."""
    plain = [word for word in arguments(place, tmp_path / "out", "--steps", "1") if word != "--train-text-encoder"]
    assert cli.main(plain) == 0
    settings = json.loads((tmp_path / "out" / "run.json").read_text())["settings"]
    assert settings.keys() == {*RECIPE.settings(), "data", "preprocessing", "unet", "frozen"}
    names = load_file(tmp_path / "out" / "step-00000001.state.safetensors").keys()
    assert {name.split(".", 1)[1] for name in names} == set(UNet(UNET).state_dict())


def test_samples_are_of_the_encoder_as_it_is_by_then(place):
    sd = ldm.load(place / "model.safetensors")
    draw = partial(draw_samples, sd, ["Chest X-ray of a subject with Edema"])
    before, again = np.asarray(draw()), np.asarray(draw())
    with torch.no_grad():
        sd.clip.text_model.final_layer_norm.weight.mul_(-3)
    assert np.array_equal(before, again)
    assert not np.array_equal(before, np.asarray(draw()))


# ---- two real processes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--shard",)], ids=["copies", "shards"])
def test_two_processes_are_one_run(tmp_path, place, more):
    for name in ("model.safetensors", "data"):
        (tmp_path / name).symlink_to(place / name)
    finetune_in_processes(1, tmp_path / "straight", 4, "--train-text-encoder")
    finetune_in_processes(2, tmp_path / "two", 4, "--train-text-encoder", *more)
    assert_same_run(tmp_path / "straight", tmp_path / "two")
