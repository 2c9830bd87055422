"""How the labels of a data set become captions, and the prompts that a traversal of it would swap in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from ldm.data import captions


class Wording(Protocol):
    """What every data set brings along."""

    def captions(self, observations: pd.DataFrame, template: str) -> NDArray[np.object_]:
        """(N,) str, a row an image. Raises ValueError for an unknown template, or labels without a caption."""
        ...

    def prompts(self, observations: pd.DataFrame, template: str) -> list[str]:
        """The neutral prompt, then one for each label that some image shows; each once."""
        ...

    def only(self, columns: Sequence[str]) -> "Wording":
        """The same that names these labels alone."""
        ...


@dataclass(frozen=True)
class Radiographs:
    """ "Chest X-ray of a subject with A, B", or the neutral prompt where none of the labels is present."""

    words: Mapping[str, str]  # column of the observations -> words, in the order of the caption

    def captions(self, observations: pd.DataFrame, template: str) -> NDArray[np.object_]:
        """As of `Wording`."""
        return captions.findings_table(observations, self.words, template)

    def prompts(self, observations: pd.DataFrame, template: str) -> list[str]:
        """As of `Wording`."""
        shown = [name for name in self.words if name != "No Finding" and (observations[name] == 1).any()]
        stem = captions.CHEXPERT_STEMS[template]
        return [captions.CHEXPERT_NEUTRAL, *(f"{stem} {self.words[name]}" for name in shown)]

    def only(self, columns: Sequence[str]) -> "Radiographs":
        """As of `Wording`; also labels that captions do not name otherwise."""
        return Radiographs({name: self.words.get(name, name) for name in columns})


@dataclass(frozen=True)
class Dermoscopies:
    """ "a dermoscopic image with melanoma (MEL) showing hair, ruler"."""

    artifacts: tuple[str, ...] = captions.ISIC_CAPTION_ARTIFACTS  # those that captions name

    def captions(self, observations: pd.DataFrame, template: str) -> NDArray[np.object_]:
        """As of `Wording`."""
        return captions.isic_table(observations, template, self.artifacts)

    def prompts(self, observations: pd.DataFrame, template: str) -> list[str]:
        """As of `Wording`; the styles of every diagnosis."""
        shown = [name for name in captions.DIAGNOSES if name in observations and (observations[name] == 1).any()]
        return [
            prompt
            for diagnosis in shown
            for prompt in (
                captions.dermoscopy(diagnosis),
                *(captions.isic_style(diagnosis, artifact) for artifact in self.artifacts),
            )
        ]

    def only(self, columns: Sequence[str]) -> "Dermoscopies":
        """As of `Wording`; the diagnosis is always named."""
        return Dermoscopies(tuple(name for name in captions.ISIC_CAPTION_ARTIFACTS if name in columns))


@dataclass(frozen=True)
class Sentence:
    """A caption of one's own: `{labels}` are those present, `[...]` is left out where there are none.

    "a chest film[ with {labels}]" reads "a chest film with effusion, tube", or "a chest film".
    """

    text: str
    words: Mapping[str, str] = field(default_factory=dict)  # column of the observations -> words

    def __post_init__(self) -> None:
        """Raises ValueError for a text without `{labels}`, or with brackets that do not close."""
        if self.text.count("{labels}") != 1 or self.text.count("[") != self.text.count("]") or self.text.count("[") > 1:
            raise ValueError(f"caption: got {self.text!r}, expected {{labels}} once, and at most one part in [ ]")

    def of(self, shown: list[str]) -> str:
        """The caption of an image that shows these."""
        before, bracket, rest = self.text.partition("[")
        inside, _, after = rest.partition("]")
        if bracket and not shown:
            return (before + after).strip() if "{labels}" in inside else self._filled(before + inside + after, shown)
        return self._filled(before + inside + after, shown)

    @staticmethod
    def _filled(text: str, shown: list[str]) -> str:
        return text.replace("{labels}", ", ".join(shown) or "no findings")

    def captions(self, observations: pd.DataFrame, template: str) -> NDArray[np.object_]:
        """As of `Wording`; the template makes no difference."""
        words = list(self.words.values())
        present = observations[list(self.words)].to_numpy() == 1.0
        return captions.each_distinct(
            present, lambda row: self.of([name for name, here in zip(words, row, strict=True) if here])
        )

    def prompts(self, observations: pd.DataFrame, template: str) -> list[str]:
        """As of `Wording`."""
        shown = [word for name, word in self.words.items() if (observations[name] == 1).any()]
        return list(dict.fromkeys([self.of([]), *(self.of([word]) for word in shown)]))

    def only(self, columns: Sequence[str]) -> "Sentence":
        """As of `Wording`."""
        return Sentence(self.text, {name: self.words[name] for name in columns})
