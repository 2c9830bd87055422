"""The files of a tokenizer: every form in which a word may have been added, and what cannot be read."""

import json

import pytest
import torch
from ldm_tools.cli import main
from safetensors.torch import save_file
from tiny_checkpoints import part, write_folder
from tiny_run import write_weights

import ldm
from ldm.checkpoint import CheckpointError, convert, identify, load_parts
from ldm.checkpoint.vocabulary import Vocabulary, read_vocabulary
from ldm.tokenizer import clip_vocabulary

WORDS = {"<cat-toy>": 49408, "<cat-toy>_1": 49409}
CLIPS = clip_vocabulary()
DECODER = {str(i): {"content": text, "special": False, "normalized": True} for text, i in WORDS.items()}
LISTED = [{"id": i, "content": text, "special": False} for text, i in WORDS.items()]


def tokenizer_json(**changes):
    model = {"type": "BPE", "vocab": CLIPS.ids, "merges": [list(pair) for pair in CLIPS.merges]}
    return {"version": "1.0", "model": model | {"end_of_word_suffix": "</w>"} | changes, "added_tokens": LISTED}


def write(folder, **files):
    """Files of a tokenizer: JSON under `name.json`, lines under `merges.txt`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if name == "merges":
            (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(map(" ".join, content)) + "\n")
        else:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "files",
    [
        {"vocab": CLIPS.ids, "merges": CLIPS.merges, "added_tokens": WORDS},
        {"vocab": CLIPS.ids, "merges": CLIPS.merges, "tokenizer_config": {"added_tokens_decoder": DECODER}},
        {"vocab": CLIPS.ids | WORDS, "merges": CLIPS.merges},
        {"tokenizer": tokenizer_json()},  # all that transformers 5 writes
        {"tokenizer": tokenizer_json(merges=[" ".join(pair) for pair in CLIPS.merges])},  # as its older versions did
        {"tokenizer": tokenizer_json(), "added_tokens": WORDS, "tokenizer_config": {"added_tokens_decoder": DECODER}},
    ],
    ids=["added_tokens.json", "tokenizer_config.json", "vocab.json", "tokenizer.json", "older", "all of them"],
)
def test_every_form_tells_the_same_words(tmp_path, files):
    read = read_vocabulary(write(tmp_path / "tokenizer", **files))
    assert {**read.ids, **{text: ids[0] for text, ids in read.added.items()}} == CLIPS.ids | WORDS
    assert read.merges == CLIPS.merges


def test_added_words_alone_are_added_to_clips(tmp_path):
    read = read_vocabulary(write(tmp_path, added_tokens=WORDS))
    assert read == Vocabulary(added={text: (i,) for text, i in WORDS.items()})


@pytest.mark.parametrize("token", ["!", {"content": "!", "special": True}])
def test_another_padding_is_honoured(tmp_path, token):
    assert read_vocabulary(write(tmp_path / "a", special_tokens_map={"pad_token": token})).padding == "!"
    assert read_vocabulary(write(tmp_path / "b", tokenizer_config={"pad_token": token})).padding == "!"
    assert read_vocabulary(write(tmp_path / "c", tokenizer_config={"pad_token": None})).padding == "<|endoftext|>"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"vocab": CLIPS.ids}, "no merges.txt in it"),
        ({"merges": CLIPS.merges}, "no vocab.json in it"),
        ({"tokenizer": tokenizer_json(type="Unigram")}, "a Unigram tokenizer .*, CLIP's is BPE"),
        ({"tokenizer": tokenizer_json(end_of_word_suffix="")}, "ending words in ''"),
        ({"tokenizer": {"model": {"vocab": [1, 2]}}}, "not a tokenizer"),
        ({"vocab": CLIPS.ids, "merges": [("a", "b", "c")]}, "a merge of 3 pieces"),
        ({"added_tokens": [1]}, "not a configuration"),
        ({"added_tokens": WORDS, "tokenizer": {"added_tokens": [{"content": "<cat-toy>", "id": 7}]}}, "two ids for"),
        ({"vocab": {"<cat-toy>": 3}, "merges": CLIPS.merges, "added_tokens": WORDS}, "two ids for '<cat-toy>', 3 and"),
    ],
)
def test_what_is_no_tokenizer_of_clips_is_refused(tmp_path, files, message):
    with pytest.raises(CheckpointError, match=message) as error:
        read_vocabulary(write(tmp_path / "tokenizer", **files))
    assert "\n" not in str(error.value)


def folder_with_words(path):
    """A diffusers folder whose text encoder has two rows more than its vocabulary of 60 pieces."""
    write_folder(path)
    tensors = part("clip")
    table = tensors["text_model.embeddings.token_embedding.weight"]
    tensors["text_model.embeddings.token_embedding.weight"] = torch.cat([table, torch.ones(2, 64)])
    save_file(tensors, path / "text_encoder" / "model.safetensors", metadata={"format": "pt"})
    write(path / "tokenizer", added_tokens={"<cat>": 60, "<dog>": 61})
    return path


def test_a_folders_words_come_along(tmp_path):
    folder = folder_with_words(tmp_path / "a")
    words = {"<cat>": (60,), "<dog>": (61,)}
    assert load_parts(folder).vocabulary.added == words
    for inside in (folder / "text_encoder", folder / "text_encoder" / "model.safetensors"):
        assert identify(inside).vocabulary.added == words
    save_file(part("unet"), tmp_path / "unet.safetensors")
    assert load_parts(tmp_path / "unet.safetensors", base=folder).vocabulary.added == words  # with the text encoder


def test_words_outlive_a_conversion_there_and_back(tmp_path):
    folder = folder_with_words(tmp_path / "a")
    for layout, source, target in (("single", "a", "b"), ("folder", "b", "c"), ("single", "c", "d")):
        convert(tmp_path / source, tmp_path / target, layout=layout)
        assert load_parts(tmp_path / target).vocabulary == identify(folder).vocabulary


def test_a_vocabulary_that_a_file_has_no_place_for_is_not_converted(tmp_path):
    folder = write_folder(tmp_path / "a")
    write(folder / "tokenizer", vocab={"a</w>": 0, "b</w>": 1}, merges=[("a", "b</w>")])
    with pytest.raises(CheckpointError, match="a vocabulary of its own, 2 pieces"):
        convert(folder, tmp_path / "b", layout="single")


def test_a_folder_that_is_converted_to_has_a_tokenizer(tmp_path):
    """Its ids in transformers 4.57.6 were ours, of the 510 prompts of tokenizer_entities.json and those of <cat>."""
    base = tmp_path / "model.safetensors"
    write_weights(base)
    word = tmp_path / "<cat>.safetensors"
    save_file({"emb_params": torch.ones(2, 32)}, word)
    folder, back = tmp_path / "folder", tmp_path / "back.safetensors"
    assert main(["convert", str(base), str(folder), "--layout", "folder", "--embedding", str(word)]) == 0
    names = {"vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    assert {path.name for path in (folder / "tokenizer").iterdir()} == names
    read = read_vocabulary(folder / "tokenizer")
    assert (read.ids, read.merges, read.padding) == (CLIPS.ids, CLIPS.merges, "<|endoftext|>")
    assert read.added == {"<cat>": (49408,), "<cat>_1": (49409,)}  # as diffusers names the rows
    assert json.loads((folder / "tokenizer" / "vocab.json").read_text()) == CLIPS.ids
    told = {"<cat>": (49408, 49409)}
    assert ldm.load(folder, backend="torch").tokenizer.encode("a <cat>") == [320, 49408, 49409]
    assert main(["convert", str(folder), str(back), "--layout", "single"]) == 0
    assert identify(back).vocabulary.added == identify(folder).vocabulary.added == told
    # Without the word, nothing is left of it
    assert main(["convert", str(base), str(folder), "--layout", "folder", "--force"]) == 0
    assert read_vocabulary(folder / "tokenizer").added == {}
    assert ldm.load(folder, backend="torch").tokenizer.encode("a") == [320]
