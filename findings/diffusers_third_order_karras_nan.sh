#!/usr/bin/env bash
# diffusers' DPM-Solver++ of order 3 on Karras levels that end at sigma_min: NaN from 15 steps on.
#
# Guess: three documented options of one scheduler, each of them an improvement, can be combined; 20 steps give an image.
# Behaviour (diffusers 0.42.1, torch 2.13.0, numpy 2.2.6): with use_karras_sigmas=True and final_sigmas_type="sigma_min"
# the smallest sigma stands twice at the end of `sigmas`, for the levels reach it and it is then appended once more. The
# last step has no length. Order 2 passes over that; order 3 divides by it, and all of the result is NaN for each of 15 to
# 50 steps. Up to 14 steps are finite, because below 15 the option lower_order_final, on by default, takes the last step
# with order 1.
# Why it matters: nothing is raised and nothing warned of; a pipeline turns NaN into a black image. Short trials with 10
# steps pass, the run with 20 or 50 does not.
#
# Fails if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q diffusers==0.42.1 torch==2.13.0 numpy==2.2.6
"$work/venv/bin/python" - << 'PYTHON'
import diffusers
import torch
from diffusers import DPMSolverMultistepScheduler

print("diffusers", diffusers.__version__, "torch", torch.__version__)
betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def not_finite(order: int) -> list[int]:
    counts = []
    for steps in range(2, 51):
        scheduler = DPMSolverMultistepScheduler(
            solver_order=order, use_karras_sigmas=True, final_sigmas_type="sigma_min", **betas
        )
        scheduler.set_timesteps(steps)
        assert scheduler.sigmas[-2] == scheduler.sigmas[-1]
        x = torch.ones(1) * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            x = scheduler.step(x * 0.5, t, x).prev_sample  # a stand-in for a network
        counts += [] if torch.isfinite(x).all() else [steps]
    return counts


for order, expected in ((2, []), (3, list(range(15, 51)))):
    found = not_finite(order)
    print(f"order {order}: not finite at {f'{found[0]} to {found[-1]} steps' if found else 'no number of steps'}, of 2 to 50")
    assert found == expected
PYTHON
