"""A made-up metrics.json of the full shape, for the tests of tables and figures. No number in it was measured."""

from typing import Any

import numpy as np

from ldm.study.metrics.directions import STRAIGHT, walk_geometry

SWAP_STEPS = [5, 10, 15, 20, 25, 30, 35, 40, 45]
READINGS = ("own_head_signed", "own_head_abs", "single_f", "strict")
CELLS = {
    "chest": ("Chest X-ray", {"pleural_effusion": "Pleural effusion", "support_devices": "Support devices"}),
    **{
        key: (title, {"hair": "Hair", "gel_bubble": "Gel bubbles", "ruler": "Ruler", "ink": "Ink"})
        for key, title in (("mel", "Melanoma"), ("nv", "Melanocytic nevus"))
    },
}
BASELINES = ("linear_direction", "chord", "constant_blend", "ramp_blend", "random_direction")


def made_up_results() -> dict[str, Any]:
    """The same numbers at every call, all of them invented."""
    rng = np.random.default_rng(3)
    return {
        "command": "ldm evaluate run",
        "model": {"weights_sha256": "0" * 64, "dtype": "float32"},
        "sampling": {
            **{"steps": 50, "guidance": 3.0, "swap_steps": SWAP_STEPS},
            **{"averaged": [5, 10, 15], "interpolation_frames": [30, 49]},
        },
        "classifiers": {f"{data}_classifier": _classifier(rng, data) for data in LABELS},
        "cells": {
            cell: {
                **{"title": title, "neutral_prompt": f"a {title}", "n": 200},
                "attributes": {key: _attribute(rng, key, name) for key, name in names.items()},
            }
            for cell, (title, names) in CELLS.items()
        },
        "datasets": {
            data: {
                part: {"images": images, **{name: images // (i + 3) for i, name in enumerate(names)}}
                for part, images in (("train", 12_004), ("validation", 2_119), ("test", 2_493))
            }
            for data, names in LABELS.items()
        },
    }


LABELS = {
    "chexpert": ["pleural_effusion", "support_devices"],
    "isic": ["melanoma", "hair", "gel_bubble", "ruler", "ink"],
}


def _classifier(rng: np.random.Generator, data: str) -> dict[str, Any]:
    scores = {
        name: {
            **{"n": 2000, "positives": int(rng.integers(500, 900)), "ece": float(rng.uniform(0.002, 0.02))},
            **{key: _share(rng.uniform(0.96, 0.995), 2000) for key in ("accuracy", "f1", "auroc")},
        }
        for name in LABELS[data]
    }
    return {"file": "judge.safetensors", "model": "tinynet_e", "data": data, "phantoms": True, "attributes": scores}


def _attribute(rng: np.random.Generator, key: str, title: str) -> dict[str, Any]:
    edit = np.clip(1.2 - np.array(SWAP_STEPS) / rng.uniform(38, 50), 0, 1)  # how far each swap step edits
    cosines = np.exp(-np.abs(np.subtract.outer(SWAP_STEPS, SWAP_STEPS)) / rng.uniform(12, 25))
    distances = {
        kind: {"value": value, "interval": [value * 0.95, value * 1.05], "per_swap_step": (2 * value * edit).tolist()}
        for kind, value in (("swaps", 0.0812), ("interpolations", 0.0923))
    }
    return {
        **{"title": title, "prompt": f"with {title}"},
        "swaps": _report(rng, 0.98, edit),
        "interpolations": _report(rng, 0.96, edit),
        "lpips": {"unavailable": "LPIPS was not measured: no weights; `ldm evaluate --fetch` gets them"},
        "ssim": distances,
        "directions": {
            **{"swap_steps": SWAP_STEPS, "matrix": cosines.tolist(), "row": cosines[-1].tolist(), "n": 200},
            "row_interval": [[c - 0.02, c + 0.02] for c in cosines[-1]],
        },
        "path": _path(rng),
        "strength_correlation": {"value": 0.61, "interval": [0.55, 0.67]},
        "baselines": {name: _report(rng, rng.uniform(0.4, 0.9), 0.7 * edit, n=8) for name in BASELINES},
        "truth": {
            "n": 100,
            "per_swap_step": {
                "swap_steps": SWAP_STEPS,
                "skill": (0.75 * edit).tolist(),
                "leakage": (0.05 + 0.3 * (1 - edit) ** 2).tolist(),
                "retrieval": np.clip(1.0 - 0.06 * edit, 0, 1).tolist(),
                "flip_rate": edit.tolist(),
                "oracle": edit.tolist(),
                "interval": {
                    "skill": _around(0.75 * edit),
                    "leakage": _around(0.05 + 0.3 * (1 - edit) ** 2),
                    "retrieval": [[0.6, 1.0]] * len(SWAP_STEPS),
                    "oracle": _around(edit),
                },
            },
            "floor": {
                **{"psnr": 31.4, "latent": 0.012},
                **{"skill": 0.85, "leakage": 0.04, "retrieval": 0.99, "oracle": 0.97},
            },
            "strength_correlation": {"value": 0.83, "interval": [0.78, 0.87]},
            "share_of_ceiling": {name: {"value": 0.97, "interval": [0.94, 0.99]} for name in READINGS},
        },
    }


def _path(rng: np.random.Generator) -> dict[str, Any]:
    levels = {"arc_over_chord": 1.6, "total_turning": 5.6, "line_residual": 0.15, "first_direction": 0.85}
    walk = walk_geometry(len(SWAP_STEPS) + 1)
    found: dict[str, Any] = {
        measure: {
            **{"straight": STRAIGHT[measure], "walk": walk[measure], "n": 200},
            **{"value": value, "interval": [0.9 * value, 1.1 * value]},
        }
        for measure, value in levels.items()
    }
    found["first_direction"]["departs"] = {"below": 0.95, "n": 200, **_share(rng.uniform(0.5, 0.9), 200)}
    return found


def _report(rng: np.random.Generator, level: float, edit: np.ndarray, n: int = 200) -> dict[str, Any]:
    shares = {name: level * f for name, f in zip(READINGS, (1.0, 0.99, 0.97, 0.85), strict=True)}
    return {
        "cfrt": {
            name: {**_share(share, n), "n": n, "ties": int(rng.integers(3)), "dropped": 0, "chance": 0.25}
            for name, share in shares.items()
        },
        "flip_rate": {**_share(0.95 * level, n), "n": n},
        "target_change": {"value": 0.8 * level, "interval": [0.8 * level - 0.02, 0.8 * level + 0.02]},
        "largest_off_target": {"attribute": "ruler", "value": 0.021},
        "per_swap_step": {
            "swap_steps": SWAP_STEPS,
            **{name: (0.25 + (share - 0.25) * edit).tolist() for name, share in shares.items()},
            **{
                "flip_rate": edit.tolist(),
                "target_change": (0.8 * edit).tolist(),
                "off_target": (0.02 * edit).tolist(),
            },
            "interval": {
                **{name: _around(0.25 + (share - 0.25) * edit) for name, share in shares.items()},
                **{"flip_rate": _around(edit), "target_change": _around(0.8 * edit)},
            },
        },
    }


def _around(values: np.ndarray) -> list[list[float]]:
    return np.stack([values - 0.04, values + 0.04], axis=1).clip(0, 1).tolist()


def _share(value: float, n: int) -> dict[str, Any]:
    half = 1.96 * float(np.sqrt(value * (1 - value) / n)) + 0.005
    return {"value": float(value), "interval": [float(value) - half, min(float(value) + half, 1.0)]}
