"""CLIP's byte-pair tokenizer: text to 77 token ids. [Sennrich et al. 2016; Radford et al. 2021]

The vocabulary is OpenAI's, from the open_clip package's data file; the algorithm is written out here.
SD1.5's conventions: lower case, start token 49406, end token 49407, padded with the END token (not with 0, as
open_clip's own tokenizer does), truncated so that the end token stays last.
"""

import gzip
import logging
import math
from collections.abc import Sequence
from copy import copy
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor

from ldm.checkpoint.vocabulary import Vocabulary
from ldm.config import CONTEXT_TOKENS
from ldm.prompt_weights import Pieces, parse

logger = logging.getLogger(__name__)

CUT_EXAMPLES = 3
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


def clip_vocabulary() -> Vocabulary:
    """CLIP's own. Ids in order: single characters, the same as ends of words, merged pairs, the two special tokens."""
    lines = gzip.decompress(vocabulary_file().read_bytes()).decode().split("\n")[1 : MERGES + 1]
    merges = tuple((first, second) for first, second in (line.split() for line in lines))
    singles = list(byte_characters().values())
    pieces = singles + [c + "</w>" for c in singles] + ["".join(pair) for pair in merges] + [START, END]
    return Vocabulary({piece: i for i, piece in enumerate(pieces)}, merges)


def clean(text: str) -> str:
    """Mends mis-decoded Unicode, folds white space, lower-cases."""
    # HTML entities: what ftfy unescapes, once, and only in lines without a "<", as SD1.5's own tokenizer does;
    # open_clip's unescapes twice more, and `R&AMP;D` or `5 &gt; 3 <b>` would have other ids.
    return regex.sub(r"\s+", " ", ftfy.fix_text(text)).strip().lower()


class Tokenizer:
    """`tokenizer(["a prompt", ...])` -> (B, 77) int64.

    vocabulary: the model's, with the words that were added to it; None: CLIP's.
    reads_weights: whether brackets are weights, see `ldm.prompt_weights`, and no text.
    """

    reads_weights = False

    def __init__(self, tokens: int = CONTEXT_TOKENS, vocabulary: Vocabulary | None = None) -> None:
        given = vocabulary or Vocabulary()
        words = given if given.ids else clip_vocabulary()
        assert words.ids is not None
        assert words.merges is not None
        self.tokens = tokens
        self.bytes = byte_characters()
        self.ids = dict(words.ids)
        self.rank = {pair: i for i, pair in enumerate(words.merges)}
        for piece in (START, END):
            if piece not in self.ids:
                raise ValueError(f"the vocabulary has no {piece}: it is not CLIP's; get the model's own tokenizer")
        self.start, self.end = self.ids[START], self.ids[END]
        self.added = {START: (self.start,), END: (self.end,), **given.added}
        self.pieces = {i: piece for piece, i in self.ids.items()}
        self.pieces |= {ids[0]: f"{text}</w>" for text, ids in given.added.items() if len(ids) == 1}
        self.padding = self.ids.get(given.padding, self.end)
        texts = sorted(self.added, key=len, reverse=True)  # of two that begin alike, the longer
        self._added_texts = regex.compile("(" + "|".join(map(regex.escape, texts)) + ")")
        self._judged: set[str] = set()  # by say_cut
        self._merge = lru_cache(maxsize=65536)(self._merge_uncached)

    @property
    def rows(self) -> set[int]:
        """Every id that some text has: the rows of the embedding table that can be reached."""
        return {*self.ids.values(), *(i for ids in self.added.values() for i in ids)}

    def require_rows(self, count: int) -> None:
        """Raises ValueError unless a table of embeddings with so many rows has one for each id, and no other."""
        unreached, beyond = sorted(set(range(count)) - self.rows), [i for i in self.rows if not 0 <= i < count]
        if unreached:
            raise ValueError(
                f"the text encoder has {count} rows, and {len(unreached)} of them ({unreached[0]}) have no word that "
                "reaches them: put its tokenizer's folder beside it, or give the word as --embedding"
            )
        if beyond:
            raise ValueError(
                f"the text encoder has {count} rows, its tokenizer words for {len(self.rows)}: they are of two models"
            )

    def reading_weights(self) -> "Tokenizer":
        """The same tokenizer, for which brackets are weights."""
        other = copy(self)
        other.reads_weights, other._judged = True, set()
        return other

    def pieces_of(self, text: str) -> Pieces:
        """A text's stretches and their weights: one of weight 1, unless weights are read."""
        return parse(text) if self.reads_weights else [(text, 1.0)]

    def encode(self, text: str) -> list[int]:
        """The ids of a text, without start, end and padding."""
        return [i for piece, _ in self.pieces_of(text) for i in self._encode_piece(piece)]

    def weights(self, texts: Sequence[str], chunks: int = 1) -> list[list[list[float]]]:
        """The weights of the tokens of `chunked`: B times chunks times 77."""
        room, every = self.tokens - 2, []
        for text in texts:
            own = [weight for piece, weight in self.pieces_of(text) for _ in self._encode_piece(piece)]
            cut = [own[begin : begin + room] for begin in range(0, chunks * room, room)]
            every.append([[1.0, *row, *[1.0] * (self.tokens - 1 - len(row))] for row in cut])
        return every

    def _encode_piece(self, text: str) -> list[int]:
        ids: list[int] = []
        for stretch in self._added_texts.split(text):  # added words are taken as they are written, before cleaning
            ids += self.added[stretch] if stretch in self.added else self._encode_plain(stretch)
        return ids

    def _encode_plain(self, text: str) -> list[int]:
        ids: list[int] = []
        for piece in PIECES.findall(clean(text)):
            if piece in (START, END):
                ids.append(self.ids[piece])
            else:
                parts = self._merge("".join(self.bytes[b] for b in piece.encode()))
                ids += [self.ids.get(part, self.end) for part in parts]  # of CLIP's vocabulary every part has an id
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of some ids; special tokens are written out."""
        back = {character: byte for byte, character in self.bytes.items()}
        text = "".join(self.pieces[i] for i in ids)
        text = text.replace(START, f"{START} ").replace(END, f"{END} ").replace("</w>", " ")
        return bytes(b for c in text for b in ([back[c]] if c in back else c.encode())).decode(errors="replace").strip()

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """(B, 77) int64 of B prompts: start, text (cut if need be), end, padding; ValueError for a single string."""
        return self.chunked(texts, 1)[:, 0]

    def chunked(self, texts: Sequence[str], chunks: int) -> Tensor:
        """(B, chunks, 77) int64: 75 tokens of a text after the other, each with start, end and padding of its own.

        What is left at the end is cut off; `say_cut` says what. [AUTOMATIC1111's way, without its regard for commas]
        """
        if isinstance(texts, str):
            raise ValueError(f'texts: a single string "{texts[:40]}", expected a list of prompts: ["{texts[:40]}"]')
        room, rows = self.tokens - 2, []
        for text in texts:
            ids = self.encode(text)
            for begin in range(0, chunks * room, room):
                row = [self.start, *ids[begin : begin + room], self.end]
                rows.append(row + [self.padding] * (self.tokens - len(row)))
        return torch.tensor(rows, dtype=torch.int64).reshape(len(texts), chunks, self.tokens)

    def chunks_for(self, texts: Sequence[str]) -> int:
        """How many chunks hold the longest of some texts."""
        return max((math.ceil(len(self.encode(text)) / (self.tokens - 2)) for text in texts), default=1) or 1

    def say_cut(self, texts: Sequence[str], chunks: int = 1) -> None:
        """Log, once for each text, what of it lies beyond the tokens that are read: all in one line."""
        room = chunks * (self.tokens - 2)
        new = [text for text in dict.fromkeys(texts) if text not in self._judged]
        self._judged.update(new)
        if cut := {text: ids for text in new if len(ids := self.encode(text)) > room}:
            lost = "; ".join(
                f'"{text[:40]}{"..." * (len(text) > 40)}" ({len(ids)} tokens) loses "{self.decode(ids[room:])}"'
                for text, ids in list(cut.items())[:CUT_EXAMPLES]
            )
            logger.warning("%d of %d texts are longer than %d tokens: %s", len(cut), len(new), room, lost)

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
