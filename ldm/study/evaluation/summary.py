"""What the seeds say together: the stacked measurements of a cell become its part of metrics.json.

Letters: n seeds, A attributes, S swap steps, F frames, K heads, M averaged swap steps.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ldm.phantom.prompts import Cell
from ldm.study.evaluation.baselines import CURVE_METHODS, SWAP_METHODS
from ldm.study.evaluation.cells import CLASS_HEAD
from ldm.study.evaluation.trajectories import FRAMES, PATH_FIGURES
from ldm.study.metrics import directions, ground_truth, stats
from ldm.study.metrics.cfrt import READINGS, cfrt, successes
from ldm.study.metrics.perceptual import Unavailable

Arrays = Mapping[str, NDArray[np.float64]]  # name, as in `trajectories.measure` -> (n, ...)
Json = dict[str, Any]


class Votes:
    """Probabilities split into the heads that compete in the CFRT and the class that must not change."""

    def __init__(
        self,
        classifier_heads: Sequence[str],
        heads: Sequence[str],
        styles: Sequence[str],
        judges: Mapping[str, str] | None = None,
    ) -> None:
        """judges: style -> the head that looks for it, of those styles that have one; None: all, each its own."""
        self.judges = {style: style for style in styles} if judges is None else dict(judges)
        self.styles, self.heads = tuple(styles), tuple(heads)
        self.rows = [self.styles.index(style) for style in self.judges]
        self.columns = [list(classifier_heads).index(name) for name in heads]
        decides = CLASS_HEAD in classifier_heads and CLASS_HEAD not in heads
        self.decides = list(classifier_heads).index(CLASS_HEAD) if decides else None

    def arguments(self, neutral: NDArray[np.float64], edited: NDArray[np.float64]) -> Json:
        """What `cfrt` and `successes` take, from (n, K) and (n, A, S, K)."""
        decided, edited = self.decides is not None, edited[:, self.rows]
        return {
            "neutral": neutral[..., self.columns],
            "swapped": edited[..., self.columns],
            "heads": self.heads,
            "attributes": tuple(self.judges.values()),
            "decision_neutral": neutral[..., self.decides] >= 0.5 if decided else None,
            "decision_swapped": edited[..., self.decides] >= 0.5 if decided else None,
        }

    def of_styles(self, by_attribute: Mapping[str, Any]) -> dict[str, Any]:
        """What was counted of each attribute, under the name of its style."""
        return {style: by_attribute[attribute] for style, attribute in self.judges.items()}

    def cfrt(self, neutral: NDArray[np.float64], edited: NDArray[np.float64], **options: Any) -> dict[str, Json]:
        """`ldm.study.metrics.cfrt.cfrt` by style; of those that no head looks for, why there is none."""
        lacking = {"unavailable": "CFRT and flip rate were not measured: no classifier at hand knows the attribute"}
        counted = self.of_styles(cfrt(**self.arguments(neutral, edited), **options)) if self.judges else {}
        return {style: counted.get(style, lacking) for style in self.styles}


def summarise(
    cell: Cell,
    votes: Votes,
    swap_steps: Sequence[int],
    averaged: Sequence[int],
    measured: Arrays,
    lpips: object,
) -> Json:
    """The paper's figures of one cell.

    Args:    swap_steps: the S steps.  averaged: those that CFRT averages.  measured: of all seeds.
             lpips: an `Unavailable` says why its figures are missing.
    """
    neutral = measured["probabilities.neutral"]
    swaps = votes.cfrt(neutral, measured["probabilities.swaps"], swap_steps=swap_steps, averaged=averaged)
    curve = votes.cfrt(neutral, measured["probabilities.curve"], swap_steps=FRAMES)
    attributes = {}
    for a, name in enumerate(votes.styles):
        cosines = directions.cosine_summary(measured["cosines"][:, a], swap_steps)
        geometries = [dict(zip(PATH_FIGURES, row, strict=True)) for row in measured["path"][:, a]]
        attributes[name] = {
            "title": cell.title_of(name),
            "prompt": cell.styles[name],
            "swaps": swaps[name],
            "interpolations": curve[name],
            "lpips": {"unavailable": str(lpips)} if isinstance(lpips, Unavailable) else _distance(measured, "lpips", a),
            "ssim": _distance(measured, "ssim", a),
            "directions": {
                "swap_steps": cosines["swap_steps"],
                "n": cosines["n"],
                "matrix": cosines["mean"],
                "against": cosines["row"]["against"],
                "row": cosines["row"]["value"],
                "row_interval": cosines["row"]["interval"],
            },
            "path": directions.non_linearity(geometries, 1 + len(swap_steps)),
            **_strength(votes, name, measured["probabilities.swaps"][:, a], swap_steps),
        }
    return {
        "title": cell.title,
        "neutral_prompt": cell.neutral,
        "n": len(neutral),
        "averaged": list(averaged),
        "attributes": attributes,
    }


def _distance(measured: Arrays, name: str, a: int) -> Json:
    """The mean over all swap steps, or frames, and seeds; and of each swap step alone."""
    swaps, curve = measured[f"{name}.swaps"][:, a], measured[f"{name}.curve"][:, a]
    return {
        "swaps": {**stats.mean(swaps.mean(axis=1)), "per_swap_step": _means(swaps)},
        "interpolations": stats.mean(curve.mean(axis=1)),
    }


def compare_baselines(
    votes: Votes, swap_steps: Sequence[int], averaged: Sequence[int], measured: Arrays, methods: Arrays
) -> dict[str, Json]:
    """Every baseline's report, by attribute, each with its difference to ours on the same seeds.

    Args:    measured: ours, of the seeds that the baselines have.  methods: see `baselines.measure_baselines`.
    Returns: attribute -> method -> the report of `cfrt`, and difference: reading -> baseline minus ours, with a
             bootstrap interval over the seeds.
    """
    neutral = measured["probabilities.neutral"]
    columns = [list(swap_steps).index(s) for s in averaged]
    ours = {
        **dict.fromkeys(SWAP_METHODS, measured["probabilities.swaps"][:, :, columns]),
        **dict.fromkeys(CURVE_METHODS, measured["probabilities.curve"]),
    }
    compared: dict[str, Json] = {name: {} for name in votes.styles}
    for method, edited in methods.items():
        reports = votes.cfrt(neutral, edited, swap_steps=FRAMES if method in CURVE_METHODS else averaged)
        theirs = votes.of_styles(successes(**votes.arguments(neutral, edited)))
        mine = votes.of_styles(successes(**votes.arguments(neutral, ours[method])))
        for name, report in reports.items():
            difference = {
                reading: stats.paired_cluster_bootstrap(
                    theirs[name][reading], mine[name][reading], np.arange(len(neutral))
                )
                for reading in READINGS
            }
            compared[name][method] = {**report, "difference": difference}
    return compared


def summarise_truth(
    votes: Votes, swap_steps: Sequence[int], averaged: Sequence[int], measured: Arrays
) -> dict[str, Json]:
    """Ground truth by attribute, with the floor of autoencoder and inversion beside it.

    CFRT here is counted against the retraced image; its ceiling is that of the rendered pairs.
    """
    original, neutral = measured["probabilities.original"], measured["probabilities.neutral"]
    swaps = votes.cfrt(neutral, measured["probabilities.swaps"], swap_steps=swap_steps, averaged=averaged)
    ceiling = votes.cfrt(original, measured["probabilities.truth"][:, :, None])
    reports = {}
    for a, name in enumerate(votes.styles):
        curves = {
            "skill": measured["skill"],
            "leakage": measured["leakage"],
            "retrieval": measured["retrieved"],
            "oracle": measured["oracle"],
        }
        reports[name] = {
            "n": len(neutral),
            "swaps": swaps[name],
            "ceiling": ceiling[name],
            "share_of_ceiling": {
                reading: ground_truth.share_of_ceiling(
                    swaps[name]["cfrt"][reading]["value"], ceiling[name]["cfrt"][reading]["value"]
                )
                for reading in READINGS
            },
            "per_swap_step": {
                "swap_steps": list(swap_steps),
                "flip_rate": swaps[name]["per_swap_step"]["flip_rate"],
                **{curve: _means(values[:, a]) for curve, values in curves.items()},
                "interval": {
                    curve: [_interval(column, curve) for column in values[:, a].T] for curve, values in curves.items()
                },
            },
            "floor": {
                "psnr": stats.mean(measured["floor.psnr_db"])["value"],
                "latent": stats.mean(measured["floor.latent"])["value"],
                "skill": stats.mean(measured["floor.skill"][:, a])["value"],
                "leakage": stats.mean(measured["floor.leakage"][:, a])["value"],
                "retrieval": stats.share(measured["floor.retrieved"][:, a])["value"],
                "oracle": stats.share(measured["floor.oracle"])["value"],
            },
            **_strength(votes, name, measured["probabilities.swaps"][:, a], swap_steps),
        }
    return reports


def _strength(votes: Votes, style: str, probabilities: NDArray[np.float64], swap_steps: Sequence[int]) -> Json:
    """How an attribute's probability, out of (n, S, K), rises as swaps come earlier; nothing where none was judged."""
    if style not in votes.judges or len(swap_steps) < 2:
        return {}
    k = votes.columns[votes.heads.index(votes.judges[style])]
    return {
        "strength_correlation": stats.mean(ground_truth.edit_strength_correlations(probabilities[..., k], swap_steps))
    }


def _means(values: NDArray[np.float64]) -> list[float | None]:
    return [stats.mean(column)["value"] for column in values.T]


def _interval(values: NDArray[np.float64], curve: str) -> list[float | None]:
    """Of a share for what is counted, of a mean for what is measured."""
    return (stats.share if curve in ("retrieval", "oracle") else stats.mean)(values)["interval"]
