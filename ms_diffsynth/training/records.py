"""What is told of each step: its row of loss.csv, the bar, and the end after too many that were not finite."""
from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
from mindspore import Tensor

from ms_diffsynth.data.loader import Batch
from ms_diffsynth.errors import TrainingError, listing
from ms_diffsynth.progress import Progress
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.prepared import name_row, rows_of
from ms_diffsynth.training.step import StepResult, TrainStep

MOST_SKIPPED_IN_A_ROW = 20
MOST_RISE = 10.0  # times the moving average: a finite loss above it is told


class StepReport:
    """Measures and reports steps, each one late: until the next has begun, the device may still be at work.

    Args:
        dataset, class_dataset: what the rows of a step that was not finite are called by.
        medium: what a row is: image or video.

    Attributes:
        skipped, skipped_in_a_row: steps that were not finite.
    """

    def __init__(self, logger: ModelLogger, progress: Progress, step: TrainStep, dataset: Any,
                 class_dataset: Any = None, medium: str = "image"):
        self.medium = medium
        self.logger, self.progress, self.step = logger, progress, step
        self.dataset, self.class_dataset = dataset, class_dataset
        self.skipped = self.skipped_in_a_row = 0
        self._average, self._averaged = 0.0, 0  # moving average of the loss, and how many are in it
        self._losses: list[Tensor] = []  # of the micro-steps of the present step
        self._batches: list[Batch] = []  # the same
        self._clock, self._rows = (0.0, 0.0), 0  # when the present step began, and what was compiled until then
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)  # rows and seconds of the last steps
        self._pending: tuple[StepResult, list[Tensor], list[Batch], dict[str, Any]] | None = None

    def begin(self) -> None:
        """A micro-step begins; the first one of a step ends the time of the step before."""
        if not self._losses:
            self._end_clock()
            self._clock, self._rows = (time.perf_counter(), self.step.compile_seconds), 0

    def add(self, result: StepResult, batch: Batch, rows: int) -> None:
        """Count a micro-step on ``batch``, which had ``rows`` rows in all processes."""
        self._losses.append(result.loss)
        self._batches.append(batch)
        self._rows += rows

    def end(self, result: StepResult, record: dict[str, Any]) -> None:
        """The step that ``record`` is about was the last one added; what it gave is read by `flush`."""
        self._pending = (result, self._losses, self._batches, record)
        self._losses, self._batches = [], []

    def flush(self) -> None:
        """Report the pending step, if there is one. Raises: TrainingError when too many in a row were not finite."""
        if self._pending is None:
            return
        result, losses, batches, record = self._pending
        numbers = numbers_of(result, losses)  # waits for the device
        self._end_clock()
        self._pending = None
        record |= numbers
        self.logger.log_step(record)
        if record["is_skipped"]:
            self.skipped += 1
            self.skipped_in_a_row += 1
            rows = self._rows_of(batches)
            self.logger.event("skipped", at=record["step"], loss=record["loss"], grad_norm=record["grad_norm"],
                              rows=rows)
            self.progress.say(f"step {record['step']} was not finite and changed nothing: loss {record['loss']:.4g}, "
                              f"gradient norm {record['grad_norm']:.4g}; {listing(map(name_row, rows))}")
        else:
            self.skipped_in_a_row = 0
            loss, before = record["loss"], self._average
            if self._averaged >= 20 and loss > MOST_RISE * before > 0:  # a broken image, or a run that diverges
                rows = self._rows_of(batches)
                self.logger.event("loss_rose", at=record["step"], loss=loss, average=before, rows=rows)
                self.progress.say(f"step {record['step']} has a loss of {loss:.4g}, {loss / before:.0f} times the "
                                  f"average before it; {listing(map(name_row, rows))}")
            self._averaged += 1
            self._average += (loss - before) * max(0.02, 1 / self._averaged)
        self._show(record)
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise TrainingError(f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient (last: step "
                                f"{record['step']}, loss {record['loss']}, gradient norm {record['grad_norm']}). "
                                "Nothing was updated in them. Expected finite numbers: lower learning_rate, look for "
                                "broken images or weights (events.jsonl names the rows, ms-diffsynth replay the "
                                "first tensor), and on Ascend prefer bfloat16 to float16.")

    def _rows_of(self, batches: list[Batch]) -> list[dict[str, Any]]:
        return [row for batch in batches for row in rows_of(batch, self.dataset, self.class_dataset)]

    def _end_clock(self) -> None:
        """Note how long the pending step took: from its begin to the next one's, compilations excepted."""
        if self._pending is None or "seconds" in self._pending[-1]:
            return
        began, compiled = self._clock
        compiling = self.step.compile_seconds - compiled
        self._pending[-1]["seconds"] = seconds = max(time.perf_counter() - began - compiling, 0.0)
        if not compiling:
            self._recent.append((self._rows, seconds))

    def _show(self, record: dict[str, Any]) -> None:
        rows, seconds = (sum(values) for values in zip((0, 0.0), *self._recent))
        self.progress.advance(**({f"{self.medium}s/s": _rate(rows / seconds)} if seconds else {}),
                              loss=f"{record['loss']:.4f}", lr=f"{record['learning_rate']:.1e}",
                              **({"skipped": str(self.skipped)} if self.skipped else {}))


def _rate(value: float) -> str:
    """Three digits, so that half an image a second is not 0.5 or 0."""
    return f"{value:.2f}" if value < 10 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def numbers_of(result: StepResult, losses: list[Tensor]) -> dict[str, Any]:
    """What loss.csv says of the numbers of a step: the last result of its micro-steps, and the losses of all."""
    last, norm, is_finite = result.numbers.asnumpy()
    return {"loss": float(np.mean([*(loss.asnumpy() for loss in losses[:-1]), last])), "grad_norm": float(norm),
            "is_skipped": int(not is_finite)}
