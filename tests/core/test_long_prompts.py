"""Prompts of more than 75 tokens: what is lost is said, a style that is lost is refused, and on request all is read."""

import json
import logging

import pytest
import torch
from ldm_tools.cli import main
from safetensors.torch import load_file
from tiny_model import write_tiny_model

import ldm
from ldm.tokenizer import Tokenizer

REPORT = "chest x-ray of a patient, " + ", ".join(["no acute finding in the lungs"] * 12)
FINDING = " and a large pleural effusion on the left"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("long") / "tiny.safetensors")


@pytest.fixture(scope="module")
def sd(weights):
    return ldm.load(weights, backend="torch")


def test_the_words_that_are_cut_off_are_said_once(caplog):
    tokenizer = Tokenizer()
    with caplog.at_level(logging.WARNING):
        tokenizer.say_cut(["short", "a " * 75, REPORT + FINDING])
        tokenizer.say_cut([REPORT + FINDING])
    (record,) = caplog.records
    assert "1 of 3 texts are longer than 75 tokens" in record.message
    assert f"({len(tokenizer.encode(REPORT + FINDING))} tokens) loses " in record.message
    assert record.message.endswith('and a large pleural effusion on the left"')


def test_many_are_counted_with_examples(caplog):
    with caplog.at_level(logging.WARNING):
        Tokenizer().say_cut([REPORT + f" {i}" for i in range(20)])
    (record,) = caplog.records
    assert "20 of 20 texts" in record.message
    assert record.message.count(" loses ") == 3


def test_encoding_prompts_says_it(weights, caplog):
    sd = ldm.load(weights, backend="torch")
    with caplog.at_level(logging.WARNING):
        sd.encode_prompts([REPORT + FINDING, ""])
    assert "pleural effusion on the left" in caplog.text


def test_chunks_are_prompts_of_their_own_joined(sd):
    from dataclasses import replace

    text = REPORT + FINDING
    ids = sd.tokenizer.encode(text)
    chunks = sd.tokenizer.chunks_for([text, "short"])
    assert chunks == -(-len(ids) // 75) >= 2
    rows = sd.tokenizer.chunked([text, "short"], chunks)
    assert rows.shape == (2, chunks, 77)
    read = [i for row in rows[0] for i in row[1:-1].tolist()][: len(ids)]
    assert read == ids
    assert rows[1, 0].tolist() == sd.tokenizer(["short"])[0].tolist()
    assert rows[1, 1].tolist() == sd.tokenizer([""])[0].tolist()
    longer = replace(sd, prompt_chunks=chunks)
    context = longer.encode_prompts([text, "short"])
    assert context.shape == (2, chunks * 77, 16)
    for i in range(chunks):
        assert torch.equal(context[0, 77 * i : 77 * (i + 1)], sd.clip(rows[:1, i])[0])
    *_, last = longer.sample(context, [0, 1], steps=2, guidance_scale=3.0)
    assert last.x_prev.isfinite().all()
    assert torch.equal(replace(sd, prompt_chunks=1).encode_prompts(["short"]), sd.encode_prompts(["short"]))


def test_what_fits_is_one_chunk():
    tokenizer = Tokenizer()
    assert tokenizer.chunks_for([]) == tokenizer.chunks_for([""]) == tokenizer.chunks_for(["word " * 75]) == 1
    assert tokenizer.chunks_for(["word " * 76]) == 2


def test_a_style_that_is_cut_off_is_refused_and_read_on_request(weights, tmp_path, capsys):
    common = ["traverse", "--weights", str(weights), "--neutral", REPORT, "--steps", "3", "--swap-steps", "1"]
    common += ["--bezier-points", "0", "--no-images", "--style", f"effusion={REPORT + FINDING}"]
    assert main([*common, "--out", str(tmp_path / "short")]) == 2
    error = capsys.readouterr().err
    assert "--style: effusion has the same tokens as the neutral prompt: what it adds is cut off" in error
    assert main([*common, "--out", str(tmp_path / "long"), "--long-prompts"]) == 0
    latents = load_file(tmp_path / "long" / "latents.safetensors")
    neutral, style = (next(t for name, t in latents.items() if end in name) for end in ("neutral", "effusion/s01"))
    assert not torch.equal(neutral, style)
    assert json.loads((tmp_path / "long" / "run.json").read_text())["prompt_chunks"] == 2


def test_the_same_style_is_refused(weights, tmp_path, capsys):
    arguments = ["--neutral", "a", "--style", "same=A", "--steps", "3", "--swap-steps", "1"]
    assert main(["traverse", "--weights", str(weights), *arguments, "--out", str(tmp_path)]) == 2
    assert "same has the same tokens as the neutral prompt: it is the same text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        (["--prompt", "a (big:1.5) lesion", "--guidance", "2"], "weights of words have no meaning here"),
        (["--prompt", "a", "--guidance", "1", "--negative", "blurry"], "--negative: it has no effect at --guidance 1"),
    ],
)
def test_what_would_be_read_otherwise_is_hinted_at(weights, tmp_path, caplog, options, hint):
    with caplog.at_level(logging.WARNING):
        assert main(["generate", "--weights", str(weights), "--steps", "2", *options, "--out", str(tmp_path)]) == 0
    assert hint in caplog.text
