"""Weights of words in a prompt, in AUTOMATIC1111's grammar, and what they do to a context.

    (word)  1.1 times    (word:1.3)  1.3 times    [word]  1 / 1.1 times    \\( \\) \\[ \\] \\\\  as text

Nested ones multiply. A bracket that is not closed lasts to the end; one that was not opened is text.

    z' = w z,  z'' = z' mean(z) / mean(z')        w a token's weight, 1 for start, end and padding
"""

# z are the contexts behind the last layer norm, its mean that over all tokens and channels of one chunk of one prompt.
# This is the web UI's "Original" emphasis on a prompt alone; there prompts of a batch share their mean.

import logging
import re
from collections.abc import Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

ROUND, SQUARE = 1.1, 1 / 1.1

Pieces = list[tuple[str, float]]  # a stretch of text and its weight

_TOKENS = re.compile(r"\\[()\[\]\\]|\(|\[|:\s*[+-]?[.\d]+\s*\)|\)|\]|\\|[^\\()\[\]:]+|:")
_OTHERS = (  # of the web UI's prompts, what is no weight
    (r"<\w+:[^<>]*>", "a network in the prompt; give it as --lora FILE:WEIGHT"),
    (r"\[[^\[\]]*:[^\[\]]*:\s*[\d.]+\s*\]|\[[^\[\]]*:\s*[\d.]+\s*\]|\[[^\[\]]*\|[^\[\]]*\]", "prompt editing"),
    (r"\b(BREAK|AND)\b", "a word of the web UI's; write it in lower case for the word itself"),
)


def parse(text: str) -> Pieces:
    """A prompt's stretches of equal weight, without the brackets; ValueError for other grammar of the web UI's."""
    for pattern, what in _OTHERS:
        if found := re.search(pattern, text):
            raise ValueError(f"--prompt-weights: {found[0]!r} is {what}; it is not read here")
    pieces: Pieces = []
    opened: dict[str, list[int]] = {"(": [], "[": []}
    for token in _TOKENS.findall(text):
        if token in opened:
            opened[token].append(len(pieces))
        elif token.startswith(":") and len(token) > 1 and opened["("]:
            _multiply(pieces, opened["("].pop(), _number(token))
        elif token == ")" and opened["("]:
            _multiply(pieces, opened["("].pop(), ROUND)
        elif token == "]" and opened["["]:
            _multiply(pieces, opened["["].pop(), SQUARE)
        else:
            pieces.append((token[1:] if token.startswith("\\") and len(token) > 1 else token, 1.0))
    for bracket, factor in (("(", ROUND), ("[", SQUARE)):
        for first in opened[bracket]:
            _multiply(pieces, first, factor)
    return _joined(pieces)


def _number(token: str) -> float:
    """Of ":1.3)"."""
    try:
        return float(token[1:-1])
    except ValueError:
        raise ValueError(f"--prompt-weights: got {token!r}, expected a number such as in (word:1.3)") from None


def _multiply(pieces: Pieces, first: int, factor: float) -> None:
    pieces[first:] = [(text, weight * factor) for text, weight in pieces[first:]]


def _joined(pieces: Pieces) -> Pieces:
    """Neighbours of the same weight as one."""
    joined: Pieces = []
    for text, weight in pieces:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + text, weight)
        else:
            joined.append((text, weight))
    return joined


def weigh(contexts: Tensor, weights: Sequence[Sequence[float]]) -> Tensor:
    """Multiply each token's vector and bring the mean back: (B, L, D), B lists of L weights -> (B, L, D)."""
    factors = torch.tensor(weights, dtype=torch.float32, device=contexts.device)[:, :, None]
    weighed = contexts.float() * factors
    mean, now = (x.float().mean(dim=(1, 2), keepdim=True) for x in (contexts, weighed))
    if not now.all():
        raise ValueError("--prompt-weights: these weights leave a context whose mean is zero; choose others")
    factor = mean / now
    if (odd := (factor - 1).abs().max()) > 0.5:
        logger.warning("--prompt-weights: bringing the mean back changes a whole context by %.0f %%", 100 * float(odd))
    return (weighed * factor).to(contexts.dtype)
