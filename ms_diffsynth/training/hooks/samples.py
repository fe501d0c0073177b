"""Sample images before the first step, every N steps and at the end, always of the same prompts and seeds."""
from __future__ import annotations

from collections.abc import Callable

from PIL import Image

from ms_diffsynth.training.hooks.contract import Hook, is_due
from ms_diffsynth.training.trainer import Trainer


class Samples(Hook):
    """Writes ``samples/step-N.png``, and at the end ``samples/before_after.png``.

    Args:
        sampler: makes the images with the current weights.
        captions: what is written under them.
        every: steps; None makes them before the first step and at the end.
    """

    def __init__(self, sampler: Callable[[], list[Image.Image]], captions: list[str], every: int | None = None):
        self.sampler, self.captions, self.every = sampler, captions, every

    def start(self, trainer: Trainer) -> None:
        self.after_step(trainer)

    def after_step(self, trainer: Trainer) -> None:
        if is_due(self.every, trainer.logger.num_steps):
            self._make(trainer)

    def end(self, trainer: Trainer) -> None:
        self._make(trainer)
        if trainer.accelerator.is_main_process:
            trainer.logger.write_comparison(self.captions)

    def _make(self, trainer: Trainer) -> None:
        logger = trainer.logger
        if logger.num_steps in logger.samples:
            return
        with trainer.looking() as is_wanted:
            if is_wanted:
                path = logger.log_samples(logger.num_steps, self.sampler(), self.captions)
                trainer.progress.say(f"samples: {path}")
