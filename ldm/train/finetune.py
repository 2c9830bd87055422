"""Fine-tuning the U-Net on images and their captions; the autoencoder stays as it is, and so does the text encoder
unless it is asked to learn along. [paper, stage one]

    go on from the newest state -> step, log, now and then validate, draw samples, save -> until done or told to stop

It has a loop of its own beside `ldm.train.loop.fit`, which trains small networks from scratch with a cosine: this one
accumulates gradients, is shared by processes, can be stopped at any step, and writes checkpoints of a whole model.
`ldm.train.objective` says what a step learns from, `ldm.train.learner` takes it.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from PIL import Image
from tqdm import tqdm

from ldm.schedule import Schedule
from ldm.train.learner import Learner, NotFinite, Taken
from ldm.train.objective import Examples, Material
from ldm.train.state import RunFolder
from ldm.train.watch import Log, validate

COMPARED_STEPS = 3  # with the cache, and as many without


@dataclass(frozen=True, eq=False)
class Rounds:
    """What is done besides training, and how often in steps."""

    save_every: int
    held_out: Sequence[Examples] = ()  # batches to validate on when the run is saved, as of `validation_examples`
    sample_every: int = 0  # 0: never
    sample: Callable[[], Image.Image] | None = None  # what the learner's networks draw, as of `draw_samples`


def finetune(
    learner: Learner,
    schedule: Schedule,
    material: Material,
    folder: RunFolder,
    rounds: Rounds,
    stop: Callable[[], bool] = lambda: False,
) -> int:
    """Train, going on from the folder's newest state; save every so many steps and at the end.

    Args:    stop: asked after each step whether to save and leave; all processes do when any is told to.
    Returns: how many steps are done: recipe.steps, or fewer when told to stop.
    Raises:  ValueError: when a loss or gradient is not finite: the step, the images, the last good checkpoint.
    """
    recipe, processes = learner.recipe, learner.processes
    done = start = folder.resume(learner)
    images, seconds = recipe.batch * recipe.accumulate, 0.0
    progress = tqdm(total=recipe.steps, initial=start, desc="fine-tuning", unit="step", disable=not processes.first)
    with closing(Log(folder.path, start, processes.first)) as log, progress:
        if rounds.held_out and not start:
            log.note(0, {"validation": _validation(learner, schedule, rounds)})
        stopping = processes.any(stop())
        while done < recipe.steps and not stopping:
            taken = _step(learner, done, material, schedule, folder)
            done, seconds = done + 1, seconds + taken.seconds
            rate = images * (done - start) / seconds
            progress.update()
            progress.set_postfix_str(f"{rate:.1f} images/s, loss {taken.loss:.4f}")
            stopping = processes.any(stop())  # asked once a step: who leaves has saved
            due = done % rounds.save_every == 0 or done == recipe.steps
            row: dict[str, float | dict[str, float]] = {
                "epoch": done * images / len(material),
                "loss": taken.loss,
                "grad_norm": taken.grad_norm,
                "lr": recipe.lr_at(done - 1),
                "images_per_s": rate,
                "outside": taken.outside,
            }
            if due and rounds.held_out and not stopping:
                row["validation"] = _validation(learner, schedule, rounds)
            log.note(done, row)
            if due or stopping:
                folder.save(done, learner)
            if rounds.sample is not None and rounds.sample_every and done % rounds.sample_every == 0:
                with learner.as_saved():
                    log.picture(done, rounds.sample())
    return done


def _step(learner: Learner, step: int, material: Material, schedule: Schedule, folder: RunFolder) -> Taken:
    try:
        return learner.step(step, material, schedule)
    except NotFinite as error:
        steps = folder.steps()
        last = f"the last good checkpoint is {folder.checkpoint(steps[-1])}" if steps else "there is no checkpoint yet"
        raise ValueError(f"{error}; {last}; try a lower --lr") from None


def _validation(learner: Learner, schedule: Schedule, rounds: Rounds) -> dict[str, float]:
    with learner.as_saved() as network:
        return validate(network, rounds.held_out, schedule, learner.recipe, learner.processes.device)


def compare_speed(learner: Learner, schedule: Schedule, cached: Material, uncached: Material) -> dict[str, float]:
    """Steps with and without the cache in turn, once the run is saved: it trains on, and the result is thrown away.

    Returns: images a second of either, their ratio, and the share of a step spent outside network and optimiser.
    """
    seconds: dict[str, list[float]] = {"cached": [], "uncached": []}
    outside: dict[str, list[float]] = {"cached": [], "uncached": []}
    for step in range(1 + COMPARED_STEPS):  # the first warms up
        for name, material in (("cached", cached), ("uncached", uncached)):
            taken = learner.step(step, material, schedule)
            if step:
                seconds[name].append(taken.seconds)
                outside[name].append(taken.outside)
    images = learner.recipe.batch * learner.recipe.accumulate
    rates = {f"images_per_s_{name}": images / statistics.median(values) for name, values in seconds.items()}
    shares = {f"outside_{name}": statistics.median(values) for name, values in outside.items()}
    return {**rates, "ratio": rates["images_per_s_cached"] / rates["images_per_s_uncached"], **shares}
