"""The words of a text encoder: which text has which row of its embedding table, as the files beside a model tell it.

A folder keeps them in tokenizer/: vocab.json and merges.txt, or tokenizer.json with both; words that were added since
in added_tokens.json, tokenizer_config.json or tokenizer.json. A file of ours keeps added words in its metadata.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from ldm.checkpoint.container import CheckpointError
from ldm.checkpoint.foreign import read_json
from ldm.config import CONTEXT_TOKENS

START, END = "<|startoftext|>", "<|endoftext|>"


@dataclass(frozen=True)
class Vocabulary:
    """Texts and their ids.

    ids: piece -> id, and merges: pairs of pieces in the order that they were learnt in; both None: CLIP's own.
    added: words that are taken whole from a text, as they are written -> the ids that stand for them.
    padding: the piece that fills a prompt up.
    """

    ids: Mapping[str, int] | None = None
    merges: tuple[tuple[str, str], ...] | None = None
    added: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    padding: str = END


def read_vocabulary(folder: Path) -> Vocabulary:
    """What a folder of a tokenizer tells.

    Raises: CheckpointError when it is another kind of tokenizer than CLIP's, or its files disagree.
    """
    whole, settings = read_json(folder / "tokenizer.json"), read_json(folder / "tokenizer_config.json")
    model = whole.get("model") or {}
    if not isinstance(model, dict):
        raise CheckpointError(f"{folder / 'tokenizer.json'}: not a tokenizer (its model is {model!r})")
    if whole and (model.get("type", "BPE") != "BPE" or model.get("end_of_word_suffix", "</w>") != "</w>"):
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: a {model.get('type')} tokenizer ending words in "
            f"{model.get('end_of_word_suffix')!r}, CLIP's is BPE and ends them in '</w>': get the model's own tokenizer"
        )
    try:
        ids = {str(piece): int(i) for piece, i in (read_json(folder / "vocab.json") or model.get("vocab", {})).items()}
        merges = _merges(folder, model.get("merges", []))
        added = _one_id_each(
            folder,
            chain(
                ((text, i) for text, i in read_json(folder / "added_tokens.json").items()),
                ((token["content"], i) for i, token in (settings.get("added_tokens_decoder") or {}).items()),
                ((token["content"], token["id"]) for token in whole.get("added_tokens", [])),
            ),
        )
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{folder}: not a tokenizer ({type(error).__name__}: {error})") from error
    if bool(ids) != bool(merges):
        lacking = "merges.txt" if ids else "vocab.json"
        raise CheckpointError(f"{folder}: no {lacking} in it: get the tokenizer's folder again")
    if wrong := [text for text, i in added.items() if ids.get(text, i) != i]:
        raise CheckpointError(f"{folder}: two ids for {wrong[0]!r}, {ids[wrong[0]]} and {added[wrong[0]]}")
    return Vocabulary(
        ids=ids or None,
        merges=merges or None,
        added={text: (i,) for text, i in added.items() if text not in ids},
        padding=_padding(folder, settings),
    )


def _merges(folder: Path, listed: Iterable[Any]) -> tuple[tuple[str, str], ...]:
    path = folder / "merges.txt"
    if path.exists():
        lines = path.read_text(encoding="utf-8").split("\n")
        listed = [line for line in lines if line.strip() and not line.startswith("#version")]
    pairs = [tuple(line.split()) if isinstance(line, str) else tuple(line) for line in listed]
    if wrong := [pair for pair in pairs if len(pair) != 2]:
        raise ValueError(f"a merge of {len(wrong[0])} pieces: {' '.join(map(str, wrong[0]))[:40]}")
    return tuple((str(first), str(second)) for first, second in pairs)


def _one_id_each(folder: Path, told: Iterable[tuple[Any, Any]]) -> dict[str, int]:
    added: dict[str, int] = {}
    for text, i in told:
        if added.setdefault(str(text), int(i)) != int(i):
            raise CheckpointError(f"{folder}: two ids for {text!r}, {added[str(text)]} and {i}")
    return added


def _padding(folder: Path, settings: Mapping[str, Any]) -> str:
    """The padding token: text, or a token with its text within."""
    token = read_json(folder / "special_tokens_map.json").get("pad_token", settings.get("pad_token"))
    return str(token.get("content", END)) if isinstance(token, dict) else str(token or END)


def write_vocabulary(folder: Path, words: Vocabulary) -> list[Path]:
    """The files that transformers reads a CLIP tokenizer from; a word of several rows is told as word, word_1 ...

    Args:    words: with its pieces and merges.
    """
    assert words.ids is not None
    assert words.merges is not None
    added = {
        f"{text}_{k}" if k else text: i for text, ids in words.added.items() for k, i in enumerate(ids)
    }  # as diffusers names the rows of an embedding
    special = {piece: words.ids[piece] for piece in (START, END) if piece in words.ids}
    flags = {"lstrip": False, "rstrip": False, "single_word": False}
    decoder = {
        str(i): {"content": text, **flags, "normalized": text in special, "special": text in special}
        for text, i in sorted({**special, **added}.items(), key=lambda item: item[1])
    }
    roles = {"bos_token": START, "eos_token": END, "unk_token": END}
    settings = {
        **roles,
        "pad_token": words.padding,
        "add_prefix_space": False,
        "added_tokens_decoder": decoder,
        "clean_up_tokenization_spaces": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": CONTEXT_TOKENS,
        "tokenizer_class": "CLIPTokenizer",
    }
    tokens = {role: {"content": text, **flags, "normalized": True} for role, text in roles.items()}
    files = {
        "vocab.json": json.dumps(dict(words.ids), ensure_ascii=False),
        "merges.txt": "#version: 0.2\n" + "".join(f"{first} {second}\n" for first, second in words.merges),
        "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        "special_tokens_map.json": json.dumps({**tokens, "pad_token": words.padding}, indent=2) + "\n",
        **({"added_tokens.json": json.dumps(added, indent=2, ensure_ascii=False) + "\n"} if added else {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("added_tokens.json", "tokenizer.json"):  # what an older one said
        (folder / name).unlink(missing_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in files]


def with_rows(added: Mapping[str, tuple[int, ...]], told: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """A tokenizer's words, where word, word_1, word_2 ... are the rows of one word that metadata tell."""
    words = dict(added)
    for text, ids in told.items():
        rows = [f"{text}_{k}" if k else text for k in range(len(ids))]
        if [words.get(row) for row in rows] == [(i,) for i in ids]:
            for row in rows:
                del words[row]
            words[text] = ids
    return words


def added_from_metadata(metadata: Mapping[str, str], key: str) -> dict[str, tuple[int, ...]]:
    """Added words as our own files tell them: a JSON of {text: ids} under `key` of the file's metadata."""
    try:
        return {str(text): tuple(map(int, ids)) for text, ids in json.loads(metadata.get(key, "{}")).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"its metadata {key!r} tells no words ({error})") from error


def added_to_metadata(added: Mapping[str, Iterable[int]]) -> str:
    """The inverse of `added_from_metadata`."""
    return json.dumps({text: list(ids) for text, ids in sorted(added.items())}, separators=(",", ":"))
