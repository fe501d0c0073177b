"""Validation loss: the loss of held-out images at fixed noise levels and fixed noise, so that steps can be compared.

The loss of a training step depends on which noise levels it drew more than on what was learned. Here each held-out
image is looked at, alone, at the same levels with the same noise every time. So the numbers do not depend on the batch
size, on the mode, on split training or on the number of devices.
"""
from __future__ import annotations

import time
from typing import Any

import numpy as np

from ms_diffsynth import runtime
from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.launch.worker import still
from ms_diffsynth.pipeline import UnitSequence
from ms_diffsynth.training.hooks.contract import Look
from ms_diffsynth.training.hooks.rows import read_rows, write_rows
from ms_diffsynth.training.prepared import PreparedRows
from ms_diffsynth.training.state import run_folder
from ms_diffsynth.training.trainer import Trainer

FILE = "validation.csv"
LEVELS = 8


class Validation(Look):
    """Adds a row to ``validation.csv`` before the first step, every N steps and at the end: the mean loss, and the mean
    at each noise level, of all held-out images. The bar shows the mean as ``val``.

    The loss is that of the task, with its weights, without prior preservation. With a moving average it is that of the
    averaged weights.

    Args:
        dataset: the held-out rows: a data set, or prepared rows.
        every: steps.

    Raises: ConfigError for a module with a forward of its own, which draws its noise itself.
    """

    def __init__(self, dataset: Any, every: int):
        self.dataset, self.every = dataset, every
        self.rows: list[dict[str, float]] = []

    def start(self, trainer: Trainer) -> None:
        module, pipe = trainer.module, trainer.module.pipe
        if module.has_own_forward:
            raise ConfigError(f"validation_steps={self.every} with {type(module).__name__}.forward: a forward of your "
                              "own draws its noise itself. Remove forward, or validation_steps.")
        task = pipe.objective.validated()
        self.task, self.random = task, trainer.draws
        self.cut = module.training_cut(task, outputs=("sample_losses", *task.metrics))
        if not isinstance(self.dataset, PreparedRows):
            self.dataset = PreparedRows(self.dataset, module, self.cut)
        planned = trainer.get_ready({"validation": self.dataset})
        self.loss_of = CompiledStep(UnitSequence(self.cut, pipe).positional, "the validation loss",
                                    trainer.accelerator.mode, planned=planned, announce=pipe.announce)
        if task.level_draw is None:
            self.levels, self.names = [None], ["loss"]
        else:  # positions on the training grid, evenly spread over it, and the columns of their losses
            self.levels = [int((k + 0.5) / LEVELS * len(pipe.sigmas)) for k in range(LEVELS)]
            self.names = [f"sigma_{pipe.sigmas[level]:.4f}" for level in self.levels]
        self.columns = tuple(dict.fromkeys(["step", "loss", *task.metrics, *self.names]))
        if trainer.resumed_from is not None:
            rows = read_rows(run_folder(trainer.resumed_from) / FILE, trainer.logger.num_steps)
            if rows and set(rows[0]) == set(self.columns):  # otherwise they are of other levels
                self.rows = rows
        super().start(trainer)

    def last_look(self, trainer: Trainer) -> int:
        return self.rows[-1]["step"] if self.rows else -1

    def look(self, trainer: Trainer) -> None:
        """Add the row of the present weights. Raises: OutputError."""
        step, began = trainer.logger.num_steps, time.perf_counter()
        # what the cut returns (sample_losses first), levels, all over the held-out images
        means = np.mean([self._losses(row) for row in range(self.dataset.rows)], axis=0, dtype=np.float64)
        loss, metrics = float(means[0].mean()), dict(zip(self.task.metrics, means[1:].mean(axis=1).tolist()))
        self.rows.append({"step": step, "loss": loss, **metrics, **dict(zip(self.names, means[0].tolist()))})
        write_rows(trainer.logger.output_path / FILE, self.columns, [
            {name: f"{v:.9g}" if isinstance(v, float) else v for name, v in row.items()} for row in self.rows])
        trainer.logger.scalars({"validation_loss": loss, **metrics}, step)
        trainer.logger.event("validation", loss=loss, **metrics, images=self.dataset.rows,
                             seconds=round(time.perf_counter() - began, 2))
        trainer.progress.shown["val"] = f"{loss:.4f}"
        first = f", {self.rows[0]['loss']:.4f} at step {self.rows[0]['step']}" if len(self.rows) > 1 else ""
        also = "".join(f", {name} {value:.2f}" for name, value in metrics.items())
        trainer.progress.say(f"step {step}: validation loss {loss:.4f} of {self.dataset.rows} "
                             f"{trainer.module.pipe.medium}s{first}{also}")

    def _losses(self, row: int) -> np.ndarray:
        """The loss of one row, and each further metric, at each level: [1 + metrics, levels]."""
        still()
        pipe, prepared = self.dataset.module.pipe, self.dataset[row]
        slots = {name: array[None] for name, array in prepared.slots.items()}
        shape, losses = (1, *pipe.latent_shape(*prepared.size)), []
        for k, level in enumerate(self.levels):
            random = self.random.of(np.array([row * len(self.levels) + k]))
            for name in self.cut.draws:
                slots[name] = (np.array([level], np.int32) if name == self.task.level_draw else
                               self.task.draw(name, shape, len(pipe.sigmas),
                                              lambda stream, *what, of=random: of(f"validation/{stream}", *what)))
            losses.append(self.loss_of(*[runtime.to_device(slots[name]) for name in (*self.cut.cache,
                                                                                      *self.cut.draws)]))
        return np.array([[float(value.asnumpy()[0]) for value in values] for values in losses]).T
