"""`ldm traverse --fast`: branches that follow the neutral path, and ask the network at a few of their steps only.

A branch differs from the neutral path by little, and its x_0 by something that changes slowly. Let D_i be what the
network said of that difference at step i; alpha and std are a `Level`'s, those of the next one alpha' and std'. Between
two questions

    D_t = D_j + (alpha_t - alpha_j) / (alpha_j - alpha_i) (D_j - D_i)     i, j the last two; after the first D_t = D_i
    x0_t = x0_neutral,t + D_t                                             the neutral path asks at every step
    x_prev = alpha' x0_t + std' (x_t - alpha x0_t) / std                  DDIM's step

What it keeps of the trajectories is measured by `ldm bench traverse --fast`, and told in ldm/samplers/README.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ldm.conditioning import constant
from ldm.finite import NotFinite, is_finite
from ldm.samplers import Level, Step
from ldm.traversal.plan import SWAP_STEPS
from ldm.traversal.prompt_tree import Branch, Paths, Sample, TreeResult, check_arguments, walk


def asked(at: int, steps: int) -> tuple[int, ...]:
    """The steps at which a branch asks that forks after `at`: three and a sixth of its own, evenly spread; few: all."""
    own = steps - at
    questions = min(own, 3 + own // 6)
    return tuple(at + own * k // questions for k in range(questions))


def evaluations(swap_steps: Sequence[int] = SWAP_STEPS, steps: int = 50, *, fast: bool) -> int:
    """Of the network, for a seed and one attribute, neutral image included; guidance doubles what each costs."""
    return steps + sum(len(asked(at, steps)) if fast else steps - at for at in swap_steps)


def followed_rows(tree: Branch, steps: int) -> int:
    """Network evaluations one seed costs, as `prompt_tree.unet_rows`: the root asks at every step."""
    return steps + sum(len(asked(branch.at, steps)) for branch, parent in walk(tree) if parent is not None)


def follow_tree(
    sample: Sample,
    x_T: Tensor,
    tree: Branch,
    seeds: Sequence[int],
    levels: Sequence[Level],
    *,
    keep: Sequence[str] = (),
    progress: Callable[[int], object] | None = None,
) -> TreeResult:
    """Denoise a prompt tree as `traverse_tree` does, all branches but the root asking seldom.

    Args:    sample: DDIM without eta.  levels: the S + 1 noise levels that it visits; others: as of `traverse_tree`.
             keep: x0_pred and eps of a step without a question are those supposed.
    Raises:  ValueError: as `traverse_tree`; NotFinite: NaN or Inf in a result.
    """
    steps = len(levels) - 1
    check_arguments(tree, x_T, seeds, steps, keep)
    questions = {branch.name: asked(branch.at, steps) for branch, _ in walk(tree)} | {tree.name: range(steps)}
    paths, differences = Paths(x_T, keep), Differences(levels)
    for index in range(steps):
        if index == steps - 1:  # where, on a GPU, `sample` looks as well, and would blame this step for earlier ones
            check_finite(paths.latents)
        paths.fork_all(tree, index)
        asking = [name for name in paths.latents if index in questions[name]]
        x_t, _ = paths.batch(asking)
        contexts = constant(paths.contexts(asking), steps)
        step = next(sample(contexts, [*seeds] * len(asking), x_T=x_t, start=index, history=()))
        paths.move(asking, step)
        root, *branches = step.x0_pred.split(len(x_T))
        differences.see(index, root, dict(zip(asking[1:], branches, strict=True)))
        for name, latents in paths.latents.items():
            if name not in asking:
                paths.move([name], differences.step(name, index, latents))
        if progress is not None:
            progress(len(x_t))
    paths.fork_all(tree, steps)
    check_finite(paths.latents)
    return paths.result(tree)


def check_finite(latents: Mapping[str, Tensor]) -> None:
    """Raises NotFinite naming the first branch whose latents hold NaN or Inf."""
    if bad := [name for name, tensor in latents.items() if not is_finite(tensor)]:
        raise NotFinite(f"{bad[0]}: got NaN or Inf in its latents; leave out --fast to see at which step")


class Differences:
    """What the network last said of every branch's difference from the root, in x_0."""

    def __init__(self, levels: Sequence[Level]) -> None:
        self.levels = levels
        self._root: Tensor  # its x0_pred at this step, (B, C, H, W)
        self._seen: dict[str, list[tuple[float, Tensor]]] = {}  # branch -> (alpha, D) of its last two questions

    def see(self, index: int, root: Tensor, branches: Mapping[str, Tensor]) -> None:
        """The x0_pred of a step, the root's and those of branches that asked: each (B, C, H, W)."""
        self._root = root
        for name, x0 in branches.items():
            self._seen[name] = [*self._seen.get(name, [])[-1:], (self.levels[index].alpha, x0 - root)]

    def step(self, name: str, index: int, x_t: Tensor) -> Step:
        """A step without a question, from x_t (B, C, H, W); the root's own of this index has been seen."""
        now, then = self.levels[index], self.levels[index + 1]
        x0 = self._root + self._supposed(name, now.alpha)
        eps = (x_t - now.alpha * x0) / now.std
        return Step(index, now.t, x_t, eps, x0, then.alpha * x0 + then.std * eps, evaluations=0)

    def _supposed(self, name: str, alpha: float) -> Tensor:
        """D at a noise level, on the line through the last two; the last, where they are one."""
        (alpha_i, first), (alpha_j, last) = self._seen[name][0], self._seen[name][-1]
        return last if alpha_i == alpha_j else last + (alpha - alpha_j) / (alpha_j - alpha_i) * (last - first)
