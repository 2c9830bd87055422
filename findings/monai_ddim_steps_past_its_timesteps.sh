#!/usr/bin/env bash
# MONAI's DDIM visits one set of timesteps and steps between another.
#
# Guess: DDIM at timestep t steps to the level of the timestep that is visited next.
# Behaviour (monai 1.6.1, torch 2.14.1): set_timesteps(50) spreads the timesteps evenly over 999..0: 999, 979, 958, 938 ...
# But step() goes from t to t - 1000 // 50, from 979 to 959 where the network is asked next at 958: 19 of 49 steps go where
# nothing is visited, and with 10 or 30 steps all of them do.
# Why it matters: latents carry another noise level than the network is told, and a comparison of samplers between MONAI
# and another DDIM measures that, too. On Gaussian data of standard deviation 0.5, whose flow is exactly known, the two
# ways end 1.5 % apart at 50 steps and 19 % at 10. (Here MONAI's way ends nearer to the truth, 0.038 off against 0.052 at 50
# steps; that need not hold for other data.)
#
# Fails if any of that changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q monai==1.6.1 torch==2.14.1
"$work/venv/bin/python" - << 'PYTHON'
import monai
import torch
from monai.networks.schedulers import DDIMScheduler

print("monai", monai.__version__, "torch", torch.__version__)
scheduler = DDIMScheduler(
    num_train_timesteps=1000, schedule="scaled_linear_beta", beta_start=0.00085, beta_end=0.012, clip_sample=False
)
alphas, std = scheduler.alphas_cumprod.double(), 0.5


def eps_of(x, t):
    """What a perfect network predicts of data that are normal with standard deviation `std`."""
    a = alphas[t]
    return x * (1 - a).sqrt() / (a * std**2 + 1 - a)


def final(steps, follow):
    """The last sample from noise 1, over the exact one. Args: follow: step to the level that is visited next."""
    scheduler.set_timesteps(steps)
    visited = scheduler.timesteps.tolist()
    x, one = torch.ones((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    for t, then in zip(visited, [*visited[1:], None]):
        eps, a, b = eps_of(x, t), alphas[t], one if then is None else alphas[then]
        if follow:
            x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
        else:
            x, _ = scheduler.step(eps, t, x)
    a = alphas[visited[0]]
    return float(x * (a * std**2 + 1 - a).sqrt() / std)


expected = {10: (9, 0.077, 0.222), 30: (29, 0.044, 0.083), 50: (19, 0.038, 0.052)}
for steps, (not_next, by_step, by_next) in expected.items():
    scheduler.set_timesteps(steps)
    visited = scheduler.timesteps.tolist()
    reached = [t - 1000 // steps for t in visited[:-1]]
    missed = sum(a != b for a, b in zip(reached, visited[1:]))
    own, other = final(steps, False), final(steps, True)
    print(f"{steps} steps: visits {visited[:4]} ..., goes to {reached[:3]} ...: {missed} of {steps - 1} not visited next")
    print(f"  error by step() {abs(own - 1):.3f}, by steps to the next level {abs(other - 1):.3f}; apart {abs(own / other - 1):.3f}")
    assert missed == not_next
    assert abs(abs(own - 1) - by_step) < 1e-3 and abs(abs(other - 1) - by_next) < 1e-3
PYTHON
