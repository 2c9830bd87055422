"""The words of a prompt and the tokens that they are made of; and what stands around them."""

from collections.abc import Sequence
from dataclasses import dataclass

from ldm.tokenizer import Tokenizer

START, END, PADDING = "[start]", "[end]", "[padding]"


@dataclass(frozen=True)
class Word:
    """A piece of a prompt, and its places among the 77 tokens."""

    text: str
    tokens: tuple[int, ...]


def words(tokenizer: Tokenizer, prompt: str) -> list[Word]:
    """The start token, every word, the end token, and the end tokens that fill up to 77, as one.

    A word is what byte-pair encoding ends with "</w>": "hair" is one token, a rare word several.

    Raises:  ValueError: a prompt too long for the tokens, whose end is cut off.
    """
    ids = tokenizer.encode(prompt)
    if len(ids) > tokenizer.tokens - 2:
        raise ValueError(f"prompt: {len(ids)} tokens, expected at most {tokenizer.tokens - 2}; shorten it")
    found, begin = [Word(START, (0,))], 0
    for i, token in enumerate(ids):
        if tokenizer.pieces[token].endswith("</w>") or i == len(ids) - 1:
            found.append(Word(tokenizer.decode(ids[begin : i + 1]), tuple(range(begin + 1, i + 2))))
            begin = i + 1
    found.append(Word(END, (len(ids) + 1,)))
    padding = tuple(range(len(ids) + 2, tokenizer.tokens))
    return [*found, Word(PADDING, padding)] if padding else found


def own_words(found: Sequence[Word], names: Sequence[str]) -> list[int]:
    """Which of a prompt's words are some names, as positions in `found`.

    Raises:  ValueError: a name that is no word of the prompt.
    """
    texts = [word.text for word in found]
    if missing := [name for name in names if name not in texts]:
        raise ValueError(f"words: the prompt has no {missing[0]!r}; it has {', '.join(texts)}")
    return [texts.index(name) for name in names]
