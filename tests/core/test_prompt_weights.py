"""Weights of words: the grammar, what they do to contexts by hand, and the commands that take them."""

import json
from dataclasses import replace

import pytest
import torch
from ldm_tools.cli import main
from tiny_model import write_tiny_model

import ldm
from ldm.checkpoint import save
from ldm.prompt_weights import parse, weigh

DOWN = 1 / 1.1


@pytest.mark.parametrize(
    ("text", "pieces"),
    [
        ("", []),
        ("a lesion", [("a lesion", 1)]),
        ("a (big) lesion", [("a ", 1), ("big", 1.1), (" lesion", 1)]),
        ("a (big:1.3) lesion", [("a ", 1), ("big", 1.3), (" lesion", 1)]),
        ("a [big] lesion", [("a ", 1), ("big", DOWN), (" lesion", 1)]),
        ("((big))", [("big", 1.1 * 1.1)]),
        ("[[big]]", [("big", DOWN * DOWN)]),
        ("([big])", [("big", DOWN * 1.1)]),
        ("((a:2) b)", [("a", 2 * 1.1), (" b", 1.1)]),
        (r"\(big\) \[x\] \\", [(r"(big) [x] " + "\\", 1)]),
        (r"(a\):1.2)", [("a)", 1.2)]),
        ("(a: .5 )", [("a", 0.5)]),
        ("(a:-1)", [("a", -1)]),
        # Not closed: to the end. Not opened, or of the other kind: text
        ("(big lesion", [("big lesion", 1.1)]),
        ("a [b (c", [("a ", 1), ("b ", DOWN), ("c", 1.1 * DOWN)]),
        ("big) lesion:1.3)", [("big) lesion:1.3)", 1)]),
        ("(literal]", [("literal]", 1.1)]),
        ("(one)(two)", [("onetwo", 1.1)]),
        ("()", []),
        ("ratio 2:1, a: b", [("ratio 2:1, a: b", 1)]),
        ("a \\ b", [("a \\ b", 1)]),
    ],
)
def test_the_grammar(text, pieces):
    found = parse(text)
    assert [piece for piece, _ in found] == [piece for piece, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("(a:1.2.3)", "got ':1.2.3)', expected a number"),
        ("[cat:dog:0.5]", "is prompt editing"),
        ("[cat:10]", "is prompt editing"),
        ("[a|b]", "is prompt editing"),
        ("a BREAK b", "'BREAK' is a word of the web UI's"),
        ("a AND b", "'AND' is a word of the web UI's"),
        ("<lora:style:0.8> a", "give it as --lora"),
    ],
)
def test_what_is_not_read_is_refused(text, complaint):
    with pytest.raises(ValueError, match="--prompt-weights: ") as raised:
        parse(text)
    assert complaint in str(raised.value)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny model whose contexts have a mean, as those of trained text encoders do."""
    folder = tmp_path_factory.mktemp("weights")
    sd = ldm.load(write_tiny_model(folder / "untrained.safetensors"), backend="torch")
    with torch.no_grad():
        sd.clip.text_model.final_layer_norm.bias.add_(0.5)
    save(folder / "tiny.safetensors", {"clip": sd.clip, "vae": sd.vae, "unet": sd.unet})
    return folder / "tiny.safetensors"


@pytest.fixture(scope="module")
def sd(weights):
    plain = ldm.load(weights, backend="torch")
    return replace(plain, tokenizer=plain.tokenizer.reading_weights())


def by_hand(context, positions):
    """z w, times the old mean over the new one: (77, D), position -> weight."""
    factors = torch.ones(77)
    for position, weight in positions.items():
        factors[position] = weight
    weighed = context.double() * factors[:, None].double()
    return weighed * context.double().mean() / weighed.mean()


def test_a_context_by_hand(sd):
    ids = [sd.tokenizer.encode(word)[0] for word in ("a", "big", "red")]
    assert sd.tokenizer.encode("a (big:1.5) [red]") == ids
    plain = sd.clip(sd.tokenizer(["a big red"]))[0]
    ours = sd.encode_prompts(["a (big:1.5) [red]"])[0]
    torch.testing.assert_close(ours.double(), by_hand(plain, {2: 1.5, 3: DOWN}), rtol=1e-5, atol=1e-5)
    assert float(ours.mean()) == pytest.approx(float(plain.detach().mean()), rel=1e-4)


def test_each_chunk_and_each_prompt_has_its_own_mean(sd):
    text = "big " * 74 + "(red:1.4) (big:0.5)"  # the 75th token, and the first of the second chunk
    longer = replace(sd, prompt_chunks=2)
    both = longer.encode_prompts([text, "a (big:2)"])
    rows = sd.tokenizer.chunked([text], 2)[0]
    first, second = (sd.clip(row[None])[0] for row in rows)
    wanted = torch.cat([by_hand(first, {75: 1.4}), by_hand(second, {1: 0.5})])
    torch.testing.assert_close(both[0].double(), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both[1], longer.encode_prompts(["a (big:2)"])[0], rtol=1e-5, atol=1e-6)


def test_without_brackets_nothing_changes(sd, weights):
    plain = ldm.load(weights, backend="torch")
    prompts = ["a big red", "", "x" * 300]
    assert torch.equal(sd.encode_prompts(prompts), plain.encode_prompts(prompts))
    assert plain.tokenizer.encode("(big)") != plain.tokenizer.encode("big")  # and without the option it is text


def test_a_mean_that_cannot_be_brought_back_is_refused():
    with pytest.raises(ValueError, match="whose mean is zero"):
        weigh(torch.ones(1, 2, 3), [[0.0, 0.0]])


# ---- the commands ----------------------------------------------------------------------------------


def test_run_json_says_what_was_read_and_evaluation_reads_it_so(weights, tmp_path, capsys):
    out = tmp_path / "run"
    traverse = ["traverse", "--weights", str(weights), "--neutral", "a lesion", "--style", "big=a (lesion:1.4)"]
    traverse += ["--steps", "2", "--swap-steps", "1", "--guidance", "2", "--negative", "[grey]", "--bezier-points", "0"]
    assert main([*traverse, "--out", str(out), "--prompt-weights", "--no-images"]) == 0
    record = json.loads((out / "run.json").read_text())
    assert record["prompt_weights"] == {
        "a lesion": [["a lesion", 1.0]],
        "a (lesion:1.4)": [["a ", 1.0], ["lesion", 1.4]],
        "[grey]": [["grey", pytest.approx(DOWN)]],
    }
    assert main([*traverse, "--out", str(out), "--no-images"]) == 2  # the folder is of other settings
    assert main([*traverse, "--style", "same=(a lesion:1)", "--out", str(tmp_path / "b"), "--prompt-weights"]) == 2
    assert "same has the same tokens as the neutral prompt" in capsys.readouterr().err


def test_a_prompt_that_is_not_read_is_one_line(weights, tmp_path, capsys):
    command = ["generate", "--weights", str(weights), "--steps", "2", "--out", str(tmp_path / "a"), "--prompt-weights"]
    assert main([*command, "--prompt", "[a:b:0.5]"]) == 2
    assert "'[a:b:0.5]' is prompt editing" in capsys.readouterr().err.splitlines()[-1]


def test_evaluation_encodes_as_the_run_did(sd, weights, tmp_path):
    from argparse import Namespace

    from ldm_tools.evaluate.tasks import reading_as, task_of_run

    long = "a lesion, " + "and more of it " * 30
    out = tmp_path / "run"
    traverse = ["traverse", "--weights", str(weights), "--neutral", long, "--style", f"big={long} (big:1.3)"]
    options = ["--steps", "2", "--swap-steps", "1", "--guidance", "1", "--no-images", "--out", str(out)]
    assert main([*traverse, *options, "--prompt-weights", "--long-prompts"]) == 0
    chunks = json.loads((out / "run.json").read_text())["prompt_chunks"]
    plain = ldm.load(weights, backend="torch")
    again = reading_as(task_of_run(out, (1,)), Namespace(), plain)
    assert again.prompt_chunks == chunks == 2
    assert again.tokenizer.reads_weights
    assert not plain.tokenizer.reads_weights
