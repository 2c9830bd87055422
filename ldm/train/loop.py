"""The training loop that every network here goes through; `ldm.train.learner` takes its steps.

A run is a function of its seed: the loss of step k must draw its batch and noise from (seed, k) alone, so that a run
that was stopped and restarted equals one that was not.
"""

import json
import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn
from tqdm import tqdm

from ldm.train.learner import Learner, NotFinite, Recipe, Taken
from ldm.train.state import put_back, write_state

log = logging.getLogger(__name__)

JOURNAL_EVERY = 50  # steps
Step = TypeVar("Step", bound=Taken)


def train(
    name: str,
    taking: Iterable[Step],
    start: int,
    steps: int,
    *,
    after: Callable[[int, Step, bool], str],
    due: Callable[[int], bool],
    save: Callable[[int], object],
    stop: Callable[[], bool] = lambda: False,
    quiet: bool = False,
) -> int:
    """Take the steps that are left of a run, and save it now and then, at the end, and when told to stop.

    Args:    taking: takes a step whenever it is asked for the next, from step `start` on.
             after: called with the steps done, the one just taken, and whether the run is due to be saved; says what
             the progress bar shows.  due: whether to save after so many steps.  save: called with the steps done.
             stop: asked before the first step and after each whether to save and leave.
    Returns: how many steps are done: `steps`, or fewer when told to stop.
    """
    done, stopping, taking = start, stop(), iter(taking)
    with tqdm(desc=name, initial=start, total=steps, unit="step", mininterval=5, disable=quiet) as bar:
        while done < steps and not stopping:
            taken = next(taking)
            done += 1
            stopping = stop()  # asked once a step: who leaves has saved
            saving = due(done) or done == steps
            bar.set_postfix_str(after(done, taken, saving and not stopping), refresh=False)
            if saving or stopping:
                save(done)
            bar.update()
    return done


def fit(name: str, module: nn.Module, loss_at: Callable[[int], Tensor], recipe: Recipe, folder: Path) -> None:
    """Train `module` in place and leave it with its final weights: the moving average where one is kept.

    Args:    loss_at: step -> scalar loss, drawing from (seed, step) only.
             folder: holds NAME.safetensors (the newest state; a run that is there is continued) and NAME.jsonl (one
             line per 50 steps: step, mean loss, lr, seconds of this process).
    Raises:  ValueError: when the loss or its gradient is not finite, naming the step.
    """
    learner, state = Learner(module, recipe), folder / f"{name}.safetensors"
    start = put_back(state, learner) if state.exists() else 0
    module.train()
    recent: list[float] = []
    began = time.monotonic()

    def after(done: int, taken: Taken, saving: bool) -> str:
        recent.append(taken.loss)
        if done % JOURNAL_EVERY == 0 or done == recipe.steps:
            row = {"step": done, "loss": sum(recent) / len(recent), "lr": recipe.lr_at(done - 1)}
            journal.write(json.dumps(row | {"seconds": round(time.monotonic() - began, 1)}) + "\n")
            journal.flush()
            recent.clear()
        return f"loss {taken.loss:.4f}"

    with (folder / f"{name}.jsonl").open("a") as journal:
        try:
            train(
                name,
                (learner.learn(step, loss_at(step)) for step in range(start, recipe.steps)),
                start,
                recipe.steps,
                after=after,
                due=lambda done: done % recipe.save_every == 0,
                save=lambda done: write_state(state, learner, done),
            )
        except NotFinite as error:
            raise ValueError(f"{name}: {error}; try a lower learning rate") from None
    if learner.ema is not None:
        learner.set_weights(learner.ema.values)
    module.eval()
