"""Explorers to test the page with: phantoms that fade into their counterfactuals, and noise."""

import numpy as np

from ldm.phantom import render
from ldm.study.report.explorer import Domain, Explorer, Frame, MapPoint, PatientView, Trajectory

SIZE = 64
SWAP_STEPS = (40, 20, 5)
NASTY = "ein <b>\"Röntgenbild\"</b> & 'mehr' </script><script>alert(1)</script> {{data}} <!-- ü"


def phantom_trajectory(domain, seed, attribute, head, heads, kind):
    """Frames faded from a phantom to its counterfactual; the probability of `head` is the share of the way."""
    neutral = render(domain, seed, size=SIZE).to_uint8()
    truth = render(domain, seed, {attribute: True}, size=SIZE).to_uint8()

    def frame(label, frame_kind, share):
        image = np.rint(neutral + share * (truth.astype(float) - neutral)).astype(np.uint8)
        probabilities = tuple(share if i == head else 0.1 for i in range(heads))
        return Frame(label, frame_kind, share, image, probabilities, 0.2 * share, 1 - 0.1 * share)

    swaps = [frame(f"s = {s}", "swap", (i + 1) / 3) for i, s in enumerate(SWAP_STEPS)]
    curve = [frame(f"u = {u:.2f}", "curve", u) for u in (0.25, 0.5, 0.75, 1.0)] if kind == "generated" else []
    edits = sorted([*swaps, *curve], key=lambda f: f.position)
    return Trajectory(
        attribute=attribute,
        title=attribute.replace("_", " ").capitalize(),
        prompt=f"with {attribute}",
        frames=(frame("neutral", "neutral", 0.0), *edits),
        truth=truth if kind == "rendered" else None,
        swap_steps=SWAP_STEPS,
        cosines=np.array([[1, 0.5, np.nan], [0.5, 1, -0.25], [np.nan, -0.25, 1]]),
    )


def phantom_domain(name, attributes, patients, note=""):
    heads = tuple(attribute.replace("_", " ").capitalize() for attribute in attributes)
    return Domain(
        name=name,
        title=f"The {name}",
        neutral_prompt=NASTY,
        heads=heads,
        patients=tuple(
            PatientView(
                seed=seed,
                kind=kind,
                title=f"{kind} {seed}",
                trajectories=tuple(
                    phantom_trajectory(name, seed, attribute, i, len(heads), kind)
                    for i, attribute in enumerate(attributes)
                ),
            )
            for seed, kind in patients
        ),
        map=(
            *(MapPoint(p, "neutral", None, 10.0 * p, 0.0) for p in range(len(patients))),
            *(MapPoint(p, attributes[1], 20, 10.0 * p, 5.0) for p in range(len(patients))),
            MapPoint(None, "neutral", None, 3.0, 9.0),
        ),
        summary=[(heads[0], {"CFRT": "0.98", "LPIPS": "0.08"}), (heads[1], {"CFRT": "0.97"})],
        note=note,
    )


def noise_explorer(frames, size):
    rng = np.random.default_rng(0)
    kinds = ("neutral", *("swap",) * (frames - 1))
    images = rng.integers(0, 256, (frames, size, size, 3), dtype=np.uint8)
    sequence = tuple(
        Frame(f"frame {i}", kind, i / frames, image, (), None, None)
        for i, (kind, image) in enumerate(zip(kinds, images, strict=True))
    )
    trajectory = Trajectory("noise", "Noise", "noise", sequence, None, (), None)
    return Explorer(
        "Noise", "none", "", (Domain("d", "D", "", (), (PatientView(0, "generated", "0", (trajectory,)),)),)
    )
