"""CLIP's byte-pair tokenizer: text to 77 token ids. [Sennrich et al. 2016; Radford et al. 2021]

The vocabulary is OpenAI's, from the open_clip package's data file; the algorithm is written out here.
SD1.5's conventions: lower case, start token 49406, end token 49407, padded with the END token (not with 0, as
open_clip's own tokenizer does), truncated so that the end token stays last.
"""

import gzip
import html
from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor

from ldm.config import CONTEXT_TOKENS

START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2  # the vocabulary file lists more than CLIP uses

# What becomes one piece before merging: special tokens, English clitics, runs of letters, single digits, the rest.
PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def vocabulary_file() -> Path:
    """open_clip's vocabulary, found without importing the package (which would import all of its models)."""
    spec = find_spec("open_clip")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError("open_clip is not installed: its vocabulary file is needed; pip install open_clip_torch")
    return Path(spec.submodule_search_locations[0]) / "bpe_simple_vocab_16e6.txt.gz"


def byte_characters() -> dict[int, str]:
    """A printable character for each of the 256 bytes: itself where it is printable, else one from 256 upwards."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


def clean(text: str) -> str:
    """Mends mis-decoded Unicode, unescapes HTML twice, folds white space, lower-cases."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return regex.sub(r"\s+", " ", text).strip().lower()


class Tokenizer:
    """`tokenizer(["a prompt", ...])` -> (B, 77) int64."""

    def __init__(self, tokens: int = CONTEXT_TOKENS) -> None:
        self.tokens = tokens
        self.bytes = byte_characters()
        lines = gzip.decompress(vocabulary_file().read_bytes()).decode().split("\n")[1 : MERGES + 1]
        merges = [tuple(line.split()) for line in lines]
        self.rank = {pair: i for i, pair in enumerate(merges)}
        singles = list(self.bytes.values())
        # Ids in order: single characters, the same as ends of words, merged pairs, the two special tokens.
        vocabulary = singles + [c + "</w>" for c in singles] + ["".join(pair) for pair in merges] + [START, END]
        self.ids = {piece: i for i, piece in enumerate(vocabulary)}
        self.pieces = vocabulary
        self.start, self.end = self.ids[START], self.ids[END]
        self._merge = lru_cache(maxsize=65536)(self._merge_uncached)

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start, end and padding."""
        ids: list[int] = []
        for piece in PIECES.findall(clean(text)):
            if piece in (START, END):
                ids.append(self.ids[piece])
            else:
                ids += [self.ids[part] for part in self._merge("".join(self.bytes[b] for b in piece.encode()))]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; special tokens are written out."""
        back = {character: byte for byte, character in self.bytes.items()}
        text = "".join(self.pieces[i] for i in ids)
        text = text.replace(START, f"{START} ").replace(END, f"{END} ").replace("</w>", " ")
        return bytes(b for c in text for b in ([back[c]] if c in back else c.encode())).decode(errors="replace").strip()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Token ids of some prompts.

        Args:    texts: B prompts. A single string is refused: it would be read as a list of characters.
        Returns: (B, 77) int64: start, text (truncated if need be), end, then end again up to 77.
        """
        if isinstance(texts, str):
            raise ValueError(f'texts: a single string "{texts[:40]}", expected a list of prompts: ["{texts[:40]}"]')
        rows = []
        for text in texts:
            ids = [self.start, *self.encode(text)[: self.tokens - 2], self.end]
            rows.append(ids + [self.end] * (self.tokens - len(ids)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(rows), self.tokens)

    def _merge_uncached(self, word: str) -> tuple[str, ...]:
        """Byte-pair merging of one word: again and again the neighbouring pair that was learnt first."""
        parts = (*word[:-1], word[-1] + "</w>")
        while len(parts) > 1:
            best = min(pairwise(parts), key=lambda pair: self.rank.get(pair, len(self.rank)))
            if best not in self.rank:
                break
            merged: list[str] = []
            for part in parts:
                if merged and (merged[-1], part) == best:
                    merged[-1] += part
                else:
                    merged.append(part)
            parts = tuple(merged)
        return parts
