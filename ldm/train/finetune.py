"""Fine-tuning the U-Net on images and their captions; the autoencoder stays as it is, and so does the text encoder
unless it is asked to learn along. [paper, stage one]

    go on from the newest state -> step, log, now and then validate, draw samples, save -> until done or told to stop

`ldm.train.objective` says what a step learns from, `ldm.train.unet_learner` takes it.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass

from PIL import Image

from ldm.schedule import Schedule
from ldm.train.learner import NotFinite
from ldm.train.loop import train
from ldm.train.objective import Examples, Material
from ldm.train.run_folder import RunFolder
from ldm.train.unet_learner import Timed, UNetLearner
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
    learner: UNetLearner,
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
    start = folder.resume(learner)
    with closing(Log(folder.path, start, processes.first)) as log:
        watcher = _Watcher(learner, schedule, len(material), rounds, log, start)
        if rounds.held_out and not start:
            log.note(0, {"validation": watcher.validation()})
        try:
            return train(
                "fine-tuning",
                (learner.step(step, material, schedule) for step in range(start, recipe.steps)),
                start,
                recipe.steps,
                after=watcher.after,
                due=lambda done: done % rounds.save_every == 0,
                save=lambda done: folder.save(done, learner),
                stop=lambda: processes.any(stop()),
                quiet=not processes.first,
            )
        except NotFinite as error:
            last = f"the last good checkpoint is {folder.checkpoint(steps[-1])}" if (steps := folder.steps()) else ""
            raise ValueError(f"{error}; {last or 'there is no checkpoint yet'}; try a lower --lr") from None


@dataclass(frozen=True, eq=False)
class _Watcher:
    """What happens beside the steps."""

    learner: UNetLearner
    schedule: Schedule
    count: int  # images in the material
    rounds: Rounds
    log: Log
    start: int

    def after(self, done: int, taken: Timed, saving: bool) -> str:
        """Log a step; validate where the run is saved; draw samples. Returns what the progress bar shows."""
        recipe, rounds = self.learner.recipe, self.rounds
        images = recipe.batch * recipe.accumulate
        rate = images * (done - self.start) / self.learner.seconds
        row: dict[str, float | dict[str, float]] = {
            "epoch": done * images / self.count,
            "loss": taken.loss,
            "grad_norm": taken.grad_norm,
            "lr": recipe.lr_at(done - 1),
            "images_per_s": rate,
            "outside": taken.outside,
        }
        if saving and rounds.held_out:
            row["validation"] = self.validation()
        self.log.note(done, row)
        if rounds.sample is not None and rounds.sample_every and done % rounds.sample_every == 0:
            with self.learner.as_saved():
                self.log.picture(done, rounds.sample())
        return f"{rate:.1f} images/s, loss {taken.loss:.4f}"

    def validation(self) -> dict[str, float]:
        """The loss on the held-out images, with the weights that a checkpoint has."""
        learner = self.learner
        with learner.as_saved():
            return validate(
                learner.whole,
                self.rounds.held_out,
                self.schedule,
                learner.recipe,
                learner.processes.device,
                learner.unet.prediction,
            )


def compare_speed(learner: UNetLearner, schedule: Schedule, cached: Material, uncached: Material) -> dict[str, float]:
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
