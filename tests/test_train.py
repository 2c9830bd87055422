"""Training: the loop's promises, and what each of the three networks is trained on."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

from ldm.clip import CLIPTextEncoder
from ldm.config import CLIPConfig, UNetConfig, VAEConfig
from ldm.data.phantom import render, sample_attributes
from ldm.schedule import Schedule
from ldm.tokenizer import Tokenizer
from ldm.train import autoencoder, diffusion, loop, phantom_set, text_encoder
from ldm.train.loop import Ema, Recipe, fit
from ldm.train.phantom_set import PhantomSet, draw
from ldm.unet import UNet
from ldm.vae import AutoencoderKL, DiagonalGaussian

SCHEDULE = Schedule.sd15()

# ---- the loop --------------------------------------------------------------------------------------

RECIPE = Recipe(steps=17, lr=1e-2, warmup=4, ema_decay=0.9, save_every=5)


def tiny(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 1))


def regression(module: nn.Module) -> Callable[[int], Tensor]:
    """Fit the sum of three numbers; the batch is a function of the step."""

    def loss_at(step: int) -> Tensor:
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        return F.mse_loss(module(x), x.sum(1, keepdim=True))

    return loss_at


def run(folder: Path, recipe: Recipe = RECIPE, seed: int = 0) -> dict[str, Tensor]:
    module = tiny(seed)
    fit("tiny", module, regression(module), recipe, folder)
    return {name: p.detach() for name, p in module.named_parameters()}


class Stopped(Exception):
    pass


def run_until(folder: Path, stop: int, seed: int = 0) -> None:
    """A run that dies while it computes the loss of step `stop`."""
    module = tiny(seed)
    loss_at = regression(module)

    def or_stop(step: int) -> Tensor:
        if step == stop:
            raise Stopped
        return loss_at(step)

    with pytest.raises(Stopped):
        fit("tiny", module, or_stop, RECIPE, folder)


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two empty folders."""
    folders = tmp_path / "one", tmp_path / "other"
    for folder in folders:
        folder.mkdir()
    return folders


@pytest.mark.parametrize("stops", [(3,), (5,), (6,), (16,), (7, 12), (2, 2, 14)])
def test_a_run_that_was_stopped_ends_as_one_that_was_not(two, stops):
    whole = run(two[0])

    def seed() -> int:
        """A restart that finds a checkpoint may begin from whatever weights: they are replaced."""
        return 1 if (two[1] / "tiny.safetensors").exists() else 0

    for stop in stops:
        run_until(two[1], stop, seed())
    resumed = run(two[1], seed=seed())
    assert_equal(resumed, whole)
    assert_equal(*(load_file(folder / "tiny.safetensors") for folder in two))


def test_a_run_that_dies_while_saving_goes_on_from_the_save_before(two, monkeypatch):
    whole, save_file = run(two[0]), loop.save_file
    saves = []

    def second_one_fails(tensors: object, path: Path, metadata: object) -> None:
        saves.append(path)
        if len(saves) == 2:
            path.write_bytes(b"half a checkpoint")
            raise OSError("disk full")
        save_file(tensors, path, metadata)

    monkeypatch.setattr(loop, "save_file", second_one_fails)
    with pytest.raises(OSError, match="disk full"):
        run(two[1])
    monkeypatch.undo()
    assert_equal(run(two[1], seed=1), whole)
    assert sorted(path.name for path in two[1].iterdir()) == ["tiny.jsonl", "tiny.safetensors"]


def test_a_finished_run_gives_its_weights_without_training(two):
    done = run(two[0])
    module = tiny(seed=1)

    def not_called(step: int) -> Tensor:
        raise AssertionError(f"step {step} was trained again")

    fit("tiny", module, not_called, RECIPE, two[0])
    assert_equal({name: p.detach() for name, p in module.named_parameters()}, done)
    assert not module.training


def test_training_reduces_the_loss_and_the_journal_says_so(tmp_path):
    recipe = replace(RECIPE, steps=120, ema_decay=0.0)
    run(tmp_path, recipe)
    rows = [json.loads(line) for line in (tmp_path / "tiny.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [50, 100, 120]
    assert rows[0]["loss"] > 2 * rows[-1]["loss"] > 0
    assert rows[-1]["lr"] == recipe.lr_at(119)


def test_the_learning_rate_warms_up_and_falls_along_a_cosine():
    recipe = Recipe(steps=100, lr=2.0, warmup=10, final_lr=0.1)
    rates = [recipe.lr_at(step) for step in range(101)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(0.5 * (2.0 + 0.2))  # half way down
    assert rates[100] == pytest.approx(0.2)
    assert all(later < rate for rate, later in pairwise(rates[10:]))
    assert Recipe(steps=5, lr=1.0, warmup=0).lr_at(0) == 1.0


def test_the_optimiser_uses_that_rate_and_clips(tmp_path):
    # Adam's first step is the rate times the gradient's sign, as long as the gradient is far above its epsilon 1e-8.
    module = nn.Linear(1, 1, bias=False)
    nn.init.ones_(module.weight)
    recipe = Recipe(steps=1, lr=0.5, warmup=4, weight_decay=0.0)
    fit("one", module, lambda step: 1e6 * module.weight.sum(), recipe, tmp_path)
    assert module.weight.item() == pytest.approx(1 - recipe.lr_at(0), rel=1e-5)
    moment = load_file(tmp_path / "one.safetensors")["exp_avg.weight"]
    assert float(moment) == pytest.approx((1 - 0.9) * 1.0, rel=1e-4)  # of the gradient 1e6, clipped to norm 1


def test_the_moving_average_is_the_formula():
    module = nn.Linear(1, 1, bias=False)
    values = [0.0, 1.0, -2.0, 5.0, 0.5]
    nn.init.constant_(module.weight, values[0])
    ema, expected = Ema(module, decay=0.25), values[0]
    for step, value in enumerate(values[1:]):
        nn.init.constant_(module.weight, value)
        ema.update(module, step)
        decay = min(0.25, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        assert float(ema.values["weight"]) == pytest.approx(expected, rel=1e-6)  # float32
    assert decay == 0.25  # the last update was past the short beginning


def test_a_run_ends_with_the_moving_average_where_one_is_kept(two):
    averaged = run(two[0])
    saved = load_file(two[0] / "tiny.safetensors")
    assert_equal(averaged, {name.removeprefix("ema."): p for name, p in saved.items() if name.startswith("ema.")})
    assert not torch.equal(saved["ema.0.weight"], saved["model.0.weight"])

    plain = run(two[1], replace(RECIPE, ema_decay=0.0))
    unaveraged = load_file(two[1] / "tiny.safetensors")
    assert_equal(plain, {name.removeprefix("model."): saved[name] for name in saved if name.startswith("model.")})
    assert not any(name.startswith("ema.") for name in unaveraged)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_before_it_does_harm(bad, tmp_path):
    module = tiny()
    loss_at = regression(module)
    before = {}

    def then_bad(step: int) -> Tensor:
        before.update({name: p.detach().clone() for name, p in module.named_parameters()})
        return loss_at(step) * (bad if step == 7 else 1.0)

    with pytest.raises(ValueError, match=rf"tiny: the loss at step 7 is {bad}"):
        fit("tiny", module, then_bad, RECIPE, tmp_path)
    assert_equal({name: p.detach() for name, p in module.named_parameters()}, before)
    assert all(tensor.isfinite().all() for tensor in load_file(tmp_path / "tiny.safetensors").values())


# ---- the images ------------------------------------------------------------------------------------


def test_a_draw_depends_on_seed_and_step_only():
    forward = [draw(3, step, 50, 7) for step in range(20)]
    np.random.seed(1)  # noqa: NPY002 the global stream must not matter
    backward = [draw(3, step, 50, 7) for step in reversed(range(20))][::-1]
    assert np.array_equal(forward, backward)
    assert not np.array_equal(forward, [draw(4, step, 50, 7) for step in range(20)])


@pytest.mark.parametrize(("count", "batch"), [(10, 3), (6, 6), (4, 9), (7, 1)])
def test_draws_visit_every_image_once_an_epoch(count, batch):
    visited = np.concatenate([draw(0, step, count, batch) for step in range(count)])  # `batch` whole epochs
    epochs = visited.reshape(batch, count)
    assert (np.sort(epochs, axis=1) == np.arange(count)).all()
    if count > 5:
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == batch  # each in another order


@pytest.fixture(scope="module")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> PhantomSet:
    return PhantomSet(tmp_path_factory.mktemp("phantoms"), count=8, seed0=40, size=32, workers=1)


def test_a_set_holds_the_phantoms_of_its_seeds_both_domains_in_turn(phantoms):
    assert len(phantoms) == 8
    assert phantoms.keys == [(domain, seed) for seed in range(40, 44) for domain in ("chest", "skin")]
    assert phantoms.images.dtype == np.uint8
    for i in (0, 5):
        domain, seed = phantoms.keys[i]
        assert phantoms.attributes[i] == sample_attributes(domain, seed)
        expected = render(domain, seed, phantoms.attributes[i], 32).to_uint8()
        assert np.array_equal(phantoms.images[i], expected)


def test_a_batch_is_in_the_range_of_the_autoencoder(phantoms):
    batch = phantoms.batch([5, 0])
    assert batch.shape == (2, 3, 32, 32)
    assert batch.dtype == torch.float32
    back = ((batch + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert np.array_equal(back, phantoms.images[[5, 0]])
    assert float(batch.min()) >= -1.0
    assert float(batch.max()) <= 1.0
    assert batch.is_contiguous(memory_format=torch.channels_last)


def test_a_rendered_set_is_opened_not_rendered_again(phantoms, tmp_path, monkeypatch):
    folder = Path(phantoms.images.filename).parent

    def not_called(*_: object) -> None:
        raise AssertionError("rendered again")

    monkeypatch.setattr(PhantomSet, "_render", not_called)
    again = PhantomSet(folder, count=8, seed0=40, size=32)
    assert np.array_equal(again.images, phantoms.images)
    for other in ({"count": 6}, {"seed0": 41}, {"size": 64}):
        with pytest.raises(ValueError, match=r"phantoms\.npy: rendered with .*, asked for .*; use a new folder"):
            PhantomSet(folder, **{"count": 8, "seed0": 40, "size": 32} | other)


def test_rendering_that_was_stopped_begins_anew(tmp_path, monkeypatch):
    def half_way(self: PhantomSet, path: Path, size: int, workers: int) -> None:
        path.with_suffix(".partial").write_bytes(b"some images")
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(PhantomSet, "_render", half_way)
        with pytest.raises(Stopped):
            PhantomSet(tmp_path, count=2, seed0=1, size=32)
    assert np.ptp(PhantomSet(tmp_path, count=2, seed0=1, size=32, workers=1).images) > 0


def test_rendering_that_was_stopped_at_its_very_end_is_opened(tmp_path, monkeypatch):
    whole = PhantomSet._render

    def then_stop(self: PhantomSet, path: Path, size: int, workers: int) -> None:
        whole(self, path, size, workers)
        raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(PhantomSet, "_render", then_stop)
        with pytest.raises(Stopped):
            PhantomSet(tmp_path, count=2, seed0=1, size=32, workers=1)
    assert np.ptp(PhantomSet(tmp_path, count=2, seed0=1, size=32, workers=1).images) > 0


def test_every_image_has_the_wordings_of_its_attributes(phantoms):
    none = phantom_set.phrasings("chest", {"pleural_effusion": False, "support_devices": False})
    assert none == (
        "Normal chest X-ray with no significant findings",
        "Normal chest X-ray with no significant findings",
        "Chest X-ray of a subject with No Finding",
    )
    both = phantom_set.phrasings("chest", {"pleural_effusion": True, "support_devices": True})
    assert both == (
        "Chest X-ray of a subject with Pleural Effusion, Support Devices",
        "Chest X-ray showing Pleural Effusion, Support Devices",
    )
    absent = dict.fromkeys(("melanoma", "hair", "gel_bubble", "ruler", "ink"), False)
    assert phantom_set.phrasings("skin", absent) == (
        "a dermoscopic image with melanocytic nevus (NV) with no visible artifacts",
        "a dermoscopic image with melanocytic nevus (NV)",
    )
    assert phantom_set.phrasings("skin", absent | {"melanoma": True, "ruler": True}) == (
        "a dermoscopic image with melanoma (MEL) showing ruler",
        "a dermoscopic image with melanoma (MEL) with a ruler visible",
    )
    expected = [phantom_set.phrasings(d, a) for (d, _), a in zip(phantoms.keys, phantoms.attributes, strict=True)]
    assert phantoms.captions == expected


# ---- the autoencoder -------------------------------------------------------------------------------


class RandomImages:
    """What `normalise_latents` and `encode_all` ask of a PhantomSet: a length and batches."""

    def __init__(self, count: int) -> None:
        self.images = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int]) -> Tensor:
        return self.images[torch.as_tensor(list(indices))]


def tiny_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(VAEConfig(widths=(8, 16), resnets_per_level=1, norm_groups=4)).eval()


def test_reconstruction_loss_is_nothing_only_for_the_same_image():
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert float(autoencoder.reconstruction_loss(images, images.clone())) == 0.0
    for error in (torch.full((1,), 0.1), 0.1 * (torch.arange(16.0) % 2)):
        assert float(autoencoder.reconstruction_loss(images, images + error)) > 0.01
        assert float(autoencoder.reconstruction_loss(images, images - error)) > 0.01


def test_the_autoencoders_loss_is_a_function_of_seed_and_step(phantoms):
    vae = tiny_vae()
    losses = [
        autoencoder.autoencoder_loss(vae, phantoms, step, 2, seed) for seed, step in ((0, 0), (0, 0), (0, 1), (1, 0))
    ]
    assert losses[0].isfinite()
    assert losses[0].ndim == 0
    assert losses[0] == losses[1]
    assert losses[0] != losses[2] != losses[3] != losses[0]
    more_kl = autoencoder.autoencoder_loss(vae, phantoms, 0, 2, 0, kl_weight=1.0)
    assert more_kl > losses[0]
    losses[0].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vae.parameters())


@torch.no_grad()
def test_normalised_latents_have_unit_variance_and_the_same_images():
    vae, data = tiny_vae(), RandomImages(24)
    images, noise = data.images, torch.randn(24, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    before = vae.encode(images)
    decoded, sampled = vae.decode(before.mean), vae.decode(before.sample(noise))
    assert abs(float(before.mean.std()) * 0.18215 - 1) > 0.5  # there is something to do

    autoencoder.normalise_latents(vae, data, images=24, batch=8)
    after = vae.encode(images)
    latents = after.mean * 0.18215
    # Weights and activations are float32 and of size 1 to 10: 1e-6 of rounding, and ten times that is allowed.
    assert latents.mean(dim=(0, 2, 3)).abs().max() < 1e-5
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), rtol=1e-5, atol=0)
    torch.testing.assert_close(vae.decode(after.mean), decoded, rtol=1e-5, atol=1e-5)
    # The posterior went along: its samples decode to the same images as well.
    torch.testing.assert_close(vae.decode(after.sample(noise)), sampled, rtol=1e-5, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("images", [10, 2048])
def test_normalising_takes_a_number_of_images_that_is_no_multiple_of_the_batch(images):
    vae, data = tiny_vae(), RandomImages(10)
    autoencoder.normalise_latents(vae, data, images=images, batch=4)
    latents = vae.encode(data.images).mean * 0.18215
    torch.testing.assert_close(latents.std(dim=(0, 2, 3)), torch.ones(4), rtol=1e-5, atol=0)


@torch.no_grad()
def test_encoding_a_set_keeps_mean_and_standard_deviation():
    vae, data = tiny_vae(), RandomImages(10)
    encoded = autoencoder.encode_all(vae, data, batch=4)
    posterior = vae.encode(data.images)
    # Batches of another size add up in another order: float32 rounding.
    torch.testing.assert_close(encoded[:, :4], 0.18215 * posterior.mean, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(encoded[:, 4:], 0.18215 * (0.5 * posterior.logvar).exp(), rtol=1e-5, atol=1e-6)
    noise = torch.randn(10, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    mean, std = encoded.chunk(2, dim=1)
    scaled = DiagonalGaussian(mean, 2 * std.log()).sample(noise)
    torch.testing.assert_close(scaled, 0.18215 * posterior.sample(noise), rtol=1e-5, atol=1e-6)


# ---- the text encoder ------------------------------------------------------------------------------

CAPTIONS = [("a cat", "one cat"), ("a dog",), ("a cat",), ("no animal", "nothing")]


@pytest.fixture(scope="module")
def tokens() -> text_encoder.CaptionTokens:
    return text_encoder.CaptionTokens(CAPTIONS, Tokenizer())


def test_captions_are_tokenised_once_each(tokens):
    assert tokens.texts == ["a cat", "a dog", "no animal", "nothing", "one cat"]
    assert torch.equal(tokens.ids, Tokenizer()(tokens.texts))


def test_a_drawn_caption_is_one_of_the_images_own(tokens):
    images = np.arange(4)
    seen = {i: set() for i in range(4)}
    for step in range(50):
        drawn = tokens.draw(images, seed=0, step=step)
        assert torch.equal(drawn, tokens.draw(images, seed=0, step=step))
        for i, number in enumerate(drawn.tolist()):
            seen[i].add(tokens.texts[number])
    assert seen == {i: set(texts) for i, texts in enumerate(CAPTIONS)}  # all wordings: missed with odds of 4 in 2^50


class Logits:
    """A contrastive model that answers with a row of logits an image, one for each distinct caption of the batch."""

    def __init__(self, logits: Tensor, expected_ids: Tensor) -> None:
        self.logits, self.expected_ids = logits, expected_ids

    def __call__(self, latents: Tensor, ids: Tensor) -> Tensor:
        assert torch.equal(ids, self.expected_ids)
        return self.logits


def test_every_pair_that_belongs_together_is_a_target(tokens):
    # Images 0 and 2 show the caption 4, image 1 the caption 1: the columns of (images, distinct captions) are 1, 4.
    captions, columns = torch.tensor([4, 1, 4]), torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    model = Logits(columns, tokens.ids[[1, 4]])
    logits = columns[:, [1, 0, 1]]  # (image, caption of image)
    targets = torch.tensor([[0.5, 0, 0.5], [0, 1, 0], [0.5, 0, 0.5]])
    rows = -(targets * logits.log_softmax(dim=1)).sum(1).mean()
    columns_ = -(targets * logits.log_softmax(dim=0)).sum(0).mean()
    loss = text_encoder.contrastive_loss(model, torch.empty(3, 4, 1, 1), captions, tokens)
    torch.testing.assert_close(loss, (rows + columns_) / 2)


def test_a_perfect_model_is_left_with_the_ambiguity_of_equal_captions(tokens):
    captions = torch.tensor([0, 3, 0, 0])
    model = Logits(50.0 * torch.tensor([[1.0, 0], [0, 1], [1, 0], [1, 0]]), tokens.ids[[0, 3]])
    loss = text_encoder.contrastive_loss(model, torch.empty(4, 4, 1, 1), captions, tokens)
    # Three of four images cannot tell three equal captions apart: log 3 each. exp(-50) is below float32's rounding.
    assert float(loss) == pytest.approx(0.75 * math.log(3), rel=1e-6)


def contrastive_model() -> text_encoder.ContrastiveModel:
    torch.manual_seed(0)
    clip = CLIPTextEncoder(CLIPConfig(width=16, layers=1, heads=2, mlp_width=32))
    text_encoder.initialise(clip)
    return text_encoder.ContrastiveModel(clip, (4, 8, 8), width=8)


@torch.no_grad()
def test_the_two_towers_meet_in_scaled_cosines(tokens):
    model, latents = contrastive_model(), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    logits = model(latents, tokens.ids)
    assert logits.shape == (3, 5)
    assert logits.abs().max() <= (1 / 0.07) * 1.0001  # CLIP's first temperature; rounding of the cosine
    model.log_scale.fill_(20.0)
    assert model(latents, tokens.ids).abs().max() <= 100.01  # and its largest


@torch.no_grad()
def test_a_caption_is_read_at_its_end_token(tokens):
    # What follows the first end token is padding: a causal encoder's state there must not matter, nor be what is read.
    model, latents = contrastive_model(), torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    padded_otherwise = tokens.ids.clone()
    padded_otherwise[:, 20:-1] = 320
    # Cosines of float32 vectors times a scale of 14.
    torch.testing.assert_close(model(latents, padded_otherwise), model(latents, tokens.ids), rtol=0, atol=1e-4)
    other_text = tokens.ids.clone()
    other_text[:, 1] = 4558
    assert not torch.allclose(model(latents, other_text), model(latents, tokens.ids), atol=1e-2)


def test_the_contrastive_loss_reaches_every_weight_of_the_text_encoder(tokens):
    model = contrastive_model()
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    text_encoder.contrastive_loss(model, latents, torch.tensor([0, 1, 2, 0]), tokens).backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == set()


def test_the_text_encoder_begins_with_clips_standard_deviations():
    torch.manual_seed(0)
    clip = CLIPTextEncoder(CLIPConfig(width=64, layers=2, heads=4, mlp_width=256))
    text_encoder.initialise(clip)
    model, layer = clip.text_model, clip.text_model.encoder.layers[1]
    expected = {
        model.embeddings.token_embedding.weight: 0.02,
        model.embeddings.position_embedding.weight: 0.01,
        layer.self_attn.q_proj.weight: 64**-0.5,
        layer.self_attn.out_proj.weight: 64**-0.5 * 4**-0.5,
        layer.mlp.fc1.weight: 128**-0.5,
        layer.mlp.fc2.weight: 64**-0.5 * 4**-0.5,
    }
    for p, std in expected.items():
        assert p.std().item() == pytest.approx(std, rel=0.06)  # 4096 values: 1.1 % of noise, five times that
    assert all(
        not p.any() for name, p in clip.named_parameters() if name.endswith(("proj.bias", "fc1.bias", "fc2.bias"))
    )


# ---- the U-Net -------------------------------------------------------------------------------------


class FakeUNet:
    """Halves the latents and adds the time and the context's first value; remembers what it saw."""

    def __call__(self, x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.x_t, self.t = x_t, t
        return 0.5 * x_t + (t.float() / 1000 + context[:, 0, 0])[:, None, None, None]


X_0 = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
CONTEXT = torch.randn(4, 7, 16, generator=torch.Generator().manual_seed(1))


def test_the_diffusion_loss_is_what_it_says():
    unet = FakeUNet()
    loss = diffusion.diffusion_loss(unet, X_0, CONTEXT, SCHEDULE, torch.Generator().manual_seed(5))
    # The same draws in the same order: one shift for the batch's times, then the noise.
    generator = torch.Generator().manual_seed(5)
    shift = float(torch.rand((), generator=generator))
    eps = torch.randn(X_0.shape, generator=generator)
    terms = []
    for b in range(4):
        t = int((b / 4 + shift) % 1.0 * 1000)
        assert int(unet.t[b]) == t
        abar = float(SCHEDULE.alphas_cumprod[t])
        x_t = math.sqrt(abar) * X_0[b] + math.sqrt(1 - abar) * eps[b]
        torch.testing.assert_close(unet.x_t[b], x_t)
        terms.append((0.5 * x_t + t / 1000 + CONTEXT[b, 0, 0] - eps[b]).square().mean())
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_the_exact_noise_costs_nothing():
    def exact(x_t: Tensor, t: Tensor, context: Tensor) -> Tensor:
        abar = SCHEDULE.alphas_cumprod[t].view(-1, 1, 1, 1)
        return ((x_t - abar.sqrt() * X_0) / (1 - abar).sqrt()).float()

    # At t = 0 the noise is 3 % of x_t, so float32's rounding, 1e-7, is 4e-6 of it; squared.
    assert float(diffusion.diffusion_loss(exact, X_0, CONTEXT, SCHEDULE, torch.Generator().manual_seed(0))) < 1e-9


def test_the_times_of_a_batch_are_spread_evenly_and_every_one_is_reached():
    seen, generator = [], torch.Generator().manual_seed(0)
    for _ in range(500):
        unet = FakeUNet()
        diffusion.diffusion_loss(unet, X_0[:, :, :1, :1], CONTEXT, SCHEDULE, generator)
        gaps = unet.t.sort().values.diff()
        assert ((gaps - 250).abs() <= 1).all()  # a quarter of 1000, rounded down at both ends
        seen.append(unet.t)
    t = torch.cat(seen)
    assert (int(t.min()), int(t.max())) == (t.min().clamp(0, 9), t.max().clamp(990, 999))
    # Each is uniform on 0..999 on its own: a mean of 499.5. 500 independent shifts, and the mean over a batch strays
    # less than one draw's 289 / sqrt(500) = 13: four times that.
    for place in range(4):
        assert abs(float(torch.stack(seen)[:, place].float().mean()) - 499.5) < 52


def test_the_loss_of_a_real_network_is_finite_and_reaches_every_weight():
    torch.manual_seed(0)
    unet = UNet(UNetConfig(widths=(32, 64), resnets_per_level=1, attention=(False, True), context_width=16))
    loss = diffusion.diffusion_loss(unet, X_0, CONTEXT, SCHEDULE, torch.Generator().manual_seed(0))
    assert loss.isfinite()
    loss.backward()
    still = {name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == set()


@torch.no_grad()
def test_an_initial_network_predicts_the_same_whatever_it_sees():
    torch.manual_seed(0)
    unet = UNet(UNetConfig(widths=(32, 64), resnets_per_level=1, attention=(False, True), context_width=16))
    diffusion.initialise(unet)
    assert torch.equal(unet(X_0, 500, CONTEXT), unet.conv_out.bias.view(1, 4, 1, 1).expand_as(X_0))
    for name, p in unet.named_parameters():
        if name.endswith(("conv2.weight", "proj_out.weight")):
            assert not p.any(), name


def test_the_share_of_dropped_captions():
    captions = torch.arange(100_000) % 9
    dropped = diffusion.drop_captions(captions, 9, 0.1, torch.Generator().manual_seed(0))
    share = float((dropped == 9).float().mean())
    assert abs(share - 0.1) < 0.005  # a binomial's standard deviation is 0.00095: five times that
    assert torch.equal(dropped[dropped != 9], captions[dropped != 9])
    assert torch.equal(dropped, diffusion.drop_captions(captions, 9, 0.1, torch.Generator().manual_seed(0)))
    assert torch.equal(diffusion.drop_captions(captions, 9, 0.0, torch.Generator()), captions)
    assert (diffusion.drop_captions(captions, 9, 1.0, torch.Generator()) == 9).all()
