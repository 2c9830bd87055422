"""`ldm train-small`: from a folder to a checkpoint, stopped in every stage, and what it refuses."""

import argparse
from dataclasses import replace

import numpy as np
import pytest
import torch
from ldm_tools import cli
from ldm_tools.train_small import command, copies, options
from lookalikes import chexpert, isic, picture, radiograph, write_csv
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from ldm import pipeline
from ldm.config import CLIPConfig, Config, UNetConfig, VAEConfig
from ldm.data import isic as isic_reader
from ldm.data.images import load_image
from ldm.files import read_json
from ldm.study import classifier
from ldm.train import loop

SIZE = 32
TINY = Config(
    CLIPConfig(width=16, layers=1, heads=2, mlp_width=32),
    VAEConfig(latent_channels=8, widths=(8, 8, 8), resnets_per_level=1, norm_groups=4),
    UNetConfig(
        latent_channels=8,
        sample_size=8,
        widths=(16, 16),
        resnets_per_level=1,
        attention=(True, False),
        heads=2,
        context_width=16,
        norm_groups=8,
    ),
)
STEPS = ("--autoencoder-steps", "3", "--decoder-steps", "3", "--text-steps", "3", "--unet-steps", "3")


@pytest.fixture
def small(monkeypatch):
    """Networks and batches that train in a second."""
    monkeypatch.setattr(command, "config_of", lambda size, channels: TINY)
    monkeypatch.setattr(command, "BATCHES", {"autoencoder": 2, "text": 8, "unet": 4})
    monkeypatch.setattr(copies, "SAMPLE_STEPS", 2)
    for name in ("AUTOENCODER", "DECODER", "TEXT_ENCODER", "UNET"):
        monkeypatch.setattr(command, name, replace(getattr(command, name), save_every=1))


@pytest.fixture
def skin(tmp_path):
    """30 dermoscopies, a hand-labelled file beside them."""
    names = [f"ISIC_{i:07d}" for i in range(30)]
    root = isic(tmp_path / "skin", {name: "MEL" if i % 3 else "NV" for i, name in enumerate(names)})
    columns = ("image", "dark_corner", "hair", "gel_border", "gel_bubble", "ruler", "ink", "patches")
    rows = [
        dict.fromkeys(columns[1:], 0) | {"image": f"{name}.png", "hair": i % 2, "ruler": int(i % 5 == 0)}
        for i, name in enumerate(names)
    ]
    write_csv(root / "isic_bias.csv", columns, rows, separator=";")
    rng = np.random.default_rng(0)
    folder = root / isic_reader.IMAGES
    folder.mkdir()
    for name in names:
        Image.fromarray(rng.integers(0, 255, (SIZE, SIZE, 3), np.uint8)).save(folder / f"{name}.jpg")
    return root


@pytest.fixture
def chest(tmp_path):
    """Twenty radiographs of as many patients, and two with nothing but devices."""
    labels = [{"no_finding": 1.0} if i % 2 else {"pneumonia": 1.0} for i in range(20)] + 2 * [{"support_devices": 1.0}]
    rows = [
        radiograph(f"CheXpert-v1.0-small/train/patient{i:05d}/study1/view1_frontal.jpg", **label)
        for i, label in enumerate(labels)
    ]
    root = chexpert(tmp_path / "CheXpert-v1.0-small", rows)
    for i, row in enumerate(rows):
        picture(root.parent / str(row["Path"]), (SIZE, SIZE), 10 * i)
    return root


def run(*arguments: object) -> int:
    return cli.main(["train-small", *map(str, arguments), "--size", str(SIZE)])


def test_two_folders_become_one_model(small, skin, chest, tmp_path):
    out = tmp_path / "model.safetensors"
    only = ("--only", "No Finding", "--only", "Pneumonia")
    assert run(skin, chest, "--out", out, *STEPS, *only, "--shares", 3, 1, "--samples", 2) == 0
    sd = pipeline.load(out)
    assert sd.latent_shape == (8, 8, 8)
    with safe_open(out, framework="pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float16}  # noqa: SIM118 no mapping
    work = tmp_path / "model-training"
    record = read_json(work / "report.json")
    assert record["settings"]["images"] == {"skin": 30, "CheXpert-v1.0-small": 20}
    assert set(record["psnr"]) == set(record["memorisation"]) == {"skin", "chest"}
    assert record["memorisation"]["skin"]["samples"] == 2 * 10
    for name in ("samples_skin", "nearest_skin", "samples_chest", "nearest_chest"):
        assert (work / f"{name}.png").exists()


def test_what_is_left_out_is_not_learned_and_does_not_move_the_split(small, skin, tmp_path):
    def learned_and_held(*option):
        parser = argparse.ArgumentParser()
        options.add_arguments(parser)
        work = ("--work", str(tmp_path / "-".join(["work", *option])))
        args = parser.parse_args(
            [str(skin), "--out", str(tmp_path / "m.safetensors"), "--size", str(SIZE), *work, *option]
        )
        args.work.mkdir()
        return [{image.tobytes() for image in part.pixels} for part in command.sets([command.read(skin, args)], args)]

    data = isic_reader.read(skin)
    hairy = {
        load_image(file, SIZE).tobytes()
        for file, hair in zip(data.files, data.observations["hair"], strict=True)
        if hair == 1
    }
    for less, whole in zip(learned_and_held("--without", "hair"), learned_and_held(), strict=True):
        assert whole & hairy
        assert less == whole - hairy


def test_a_decoder_alone_that_shall_look_alike(small, skin, tmp_path):
    """What --start brings is kept but for the decoder, which another loss leads elsewhere."""
    torch.manual_seed(0)
    network = classifier.build("test_efficientnet", 1)
    judge = classifier.Classifier("test_efficientnet", ["hair"], SIZE, (0.5,) * 3, (0.5,) * 3, network, {})
    classifier.save(tmp_path / "judge.safetensors", judge)
    first, pixels, alike = (tmp_path / f"{name}.safetensors" for name in ("first", "pixels", "alike"))
    assert run(skin, "--out", first, *STEPS, "--samples", 0) == 0
    more = ("--autoencoder-steps", 0, "--decoder-steps", 3, "--text-steps", 0, "--unet-steps", 0, "--samples", 0)
    assert run(skin, "--out", pixels, *more, "--start", first) == 0
    assert run(skin, "--out", alike, *more, "--start", first, "--perceptual", tmp_path / "judge.safetensors") == 0
    before, one, other = (load_file(path) for path in (first, pixels, alike))
    changed = {name.split(".")[1] for name, tensor in before.items() if not torch.equal(tensor, one[name])}
    assert changed == {"decoder", "post_quant_conv"}
    assert not torch.equal(
        one["first_stage_model.decoder.conv_in.weight"], other["first_stage_model.decoder.conv_in.weight"]
    )


def test_what_is_taken_over_as_it_is(small, skin, tmp_path):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    kept = ("--autoencoder-steps", "0", "--decoder-steps", "0", "--text-steps", "0", "--unet-steps", "3")
    assert run(skin, "--out", first, *STEPS, "--samples", 0) == 0
    assert run(skin, "--out", second, *kept, "--samples", 0, "--start", first) == 0
    before, after = load_file(first), load_file(second)
    changed = {name.split(".")[0] for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert changed == {"model"}


class Stopped(Exception):
    pass


@pytest.mark.parametrize("stage", ["autoencoder", "decoder", "text_encoder", "unet1_3"])
def test_a_run_that_was_stopped_goes_on_to_the_same_weights(small, skin, tmp_path, monkeypatch, stage):
    whole, cut = tmp_path / "whole.safetensors", tmp_path / "cut.safetensors"
    assert run(skin, "--out", whole, *STEPS, "--samples", 0) == 0
    save = loop.write_state

    def save_and_stop(path, learner, step):
        save(path, learner, step)
        if path.stem == stage and step == 2:
            raise Stopped

    with monkeypatch.context() as patched:
        patched.setattr(loop, "write_state", save_and_stop)
        with pytest.raises(Stopped):
            run(skin, "--out", cut, *STEPS, "--samples", 0)
    assert not cut.exists()
    assert run(skin, "--out", cut, *STEPS, "--samples", 0) == 0
    learned, again = load_file(whole), load_file(cut)
    for name, tensor in learned.items():  # the gradient of a key's bias is rounding alone, which memory's layout moves
        torch.testing.assert_close(again[name].float(), tensor.float(), rtol=0, atol=1e-6, msg=name)


def test_parts_of_a_batch_side_by_side_learn_the_same(small, skin, tmp_path):
    alone, beside = tmp_path / "alone.safetensors", tmp_path / "beside.safetensors"
    assert run(skin, "--out", alone, *STEPS, "--samples", 0) == 0
    assert run(skin, "--out", beside, *STEPS, "--samples", 0, "--threads", 2) == 0
    ones, twos = (pipeline.load(path).unet.state_dict() for path in (alone, beside))
    for name, one in ones.items():  # three steps of 1e-3 at most, in the same direction but for rounding
        assert (one - twos[name]).abs().max() < 5e-3, name


def test_a_round_more_goes_on_with_a_model_that_is_done(small, skin, tmp_path):
    out, more = tmp_path / "model.safetensors", tmp_path / "more.safetensors"
    work = ("--work", tmp_path / "work", "--samples", 0)
    assert run(skin, "--out", out, *STEPS, *work) == 0
    assert run(skin, "--out", more, *STEPS, "2", *work) == 0
    before, after = pipeline.load(out), pipeline.load(more)
    assert all(torch.equal(a, b) for a, b in zip(before.vae.parameters(), after.vae.parameters(), strict=True))
    assert not torch.equal(before.unet.conv_out.weight, after.unet.conv_out.weight)


def test_it_takes_over_what_fits(small, skin, tmp_path, caplog):
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    assert run(skin, "--out", first, *STEPS, "--samples", 0) == 0
    caplog.set_level("INFO")
    assert run(skin, "--out", second, *STEPS, "--samples", 0, "--start", first) == 0
    assert "tensors of vae taken over" in caplog.text
    assert first.read_bytes() != second.read_bytes()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("--size", "40"), "--size: got 40, expected a multiple of 32"),
        (("--out", "model.bin"), "--out: got model.bin, expected NAME.safetensors"),
        (("--shares", "1", "2"), "--shares: got [1.0, 2.0], expected 1 numbers above 0"),
        (("--boost", "hair"), "--boost: got 'hair', expected TEXT=FACTOR"),
        (("--only", "Hare"), "--only: no folder has a label 'Hare'"),
        (("--unet-steps", "0"), "--unet-steps: got 0 without --start"),
        (("--unet-steps", "0", "5", "--start", "m.safetensors"), "--unet-steps: got [0, 5], expected 1 or more"),
        (("--text-steps", "0"), "--text-steps: got 0 without --start"),
        (("--without", "Hare"), "--without: no folder has a label 'Hare'"),
        (("--without", "MEL", "--without", "NV"), "skin shows MEL or NV"),
        (("--min-snr", "-1"), "--min-snr: got -1.0, expected 0 or more"),
    ],
)
def test_what_it_refuses_in_one_line(skin, tmp_path, capsys, arguments, complaint):
    assert cli.main(["train-small", str(skin), "--out", str(tmp_path / "m.safetensors"), *arguments]) == 2
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "m-training" / "train.npy").exists()


def test_another_runs_folder_is_not_gone_on_with(small, skin, tmp_path, capsys):
    out = tmp_path / "model.safetensors"
    assert run(skin, "--out", out, *STEPS, "--samples", 0) == 0
    assert run(skin, "--out", out, *STEPS, "--samples", 0) == 2
    assert "exists; pass --force" in capsys.readouterr().err
    assert run(skin, "--out", out, *STEPS, "--samples", 0, "--force", "--seed", 1) == 2
    assert "was begun with" in capsys.readouterr().err
