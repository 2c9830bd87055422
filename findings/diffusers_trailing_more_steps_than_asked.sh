#!/usr/bin/env bash
# diffusers' DDIM with trailing timesteps: one step more than was asked for, and steps to levels that are not visited.
#
# Guess: set_timesteps(N) gives N timesteps, and a step goes to the level of the next one.
# Behaviour (diffusers 0.35.2, torch 2.13.0, numpy 2.2.6): with timestep_spacing="trailing" 62 of the 1,000 possible N,
# 61 the first, give N + 1 timesteps, the last of which is -1: 1000/N is added up in floating point and falls just short.
# For 984 of them some step goes to t - 1000 // N where another timestep is visited next.
# Why it matters: trailing is the spacing that models with zero terminal SNR and few-step models are told to use. A
# progress bar, a schedule of prompts or a count of network calls made for N is off by one; alphas_cumprod[-1] is silently
# that of timestep 999, so the extra step asks the network about pure noise at the very end.
#
# Fails if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q diffusers==0.35.2 torch==2.13.0 numpy==2.2.6
"$work/venv/bin/python" - << 'PYTHON'
import diffusers
import torch
from diffusers import DDIMScheduler

print("diffusers", diffusers.__version__, "torch", torch.__version__)
scheduler = DDIMScheduler(timestep_spacing="trailing", beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
longer, elsewhere, last = [], 0, set()
for steps in range(1, 1001):
    scheduler.set_timesteps(steps)
    visited = scheduler.timesteps.tolist()
    if len(visited) != steps:
        longer.append(steps)
        last.add(visited[-1])
    reached = [t - 1000 // steps for t in visited[:-1]]
    elsewhere += reached != visited[1:]
print(f"{len(longer)} step counts give a timestep more: {longer[:6]} ..., the last one is {sorted(last)}")
print(f"{elsewhere} step counts have a step to a level that is not visited next")
assert (len(longer), longer[0], last, elsewhere) == (62, 61, {-1}, 984)
PYTHON
