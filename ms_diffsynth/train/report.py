"""What is told of each step: its row of loss.csv, the bar, and the end after too many that were not finite."""
from __future__ import annotations

import time
from collections import deque
from typing import Any

import numpy as np
from mindspore import Tensor

from ms_diffsynth.errors import TrainingError
from ms_diffsynth.train.logger import ModelLogger
from ms_diffsynth.train.progress import Progress
from ms_diffsynth.train.step import StepResult, TrainStep

MOST_SKIPPED_IN_A_ROW = 20


class StepReport:
    """Measures and reports steps, each one late: until the next has begun, the device may still be at work.

    Attributes:
        skipped, skipped_in_a_row: steps that were not finite.
    """

    def __init__(self, logger: ModelLogger, progress: Progress, step: TrainStep):
        self.logger, self.progress, self.step = logger, progress, step
        self.skipped = self.skipped_in_a_row = 0
        self._losses: list[Tensor] = []  # of the micro-steps of the present step
        self._clock, self._rows = (0.0, 0.0), 0  # when the present step began, and what was compiled until then
        self._recent: deque[tuple[int, float]] = deque(maxlen=20)  # rows and seconds of the last steps
        self._pending: tuple[StepResult, list[Tensor], dict[str, Any]] | None = None

    def begin(self) -> None:
        """A micro-step begins; the first one of a step ends the time of the step before."""
        if not self._losses:
            self._end_clock()
            self._clock, self._rows = (time.perf_counter(), self.step.compile_seconds), 0

    def add(self, result: StepResult, rows: int) -> None:
        """Count a micro-step on ``rows`` rows."""
        self._losses.append(result.loss)
        self._rows += rows

    def end(self, result: StepResult, record: dict[str, Any]) -> None:
        """The step that ``record`` is about was the last one added; what it gave is read by `flush`."""
        self._pending = (result, self._losses, record)
        self._losses = []

    def flush(self) -> None:
        """Report the pending step, if there is one. Raises: TrainingError when too many in a row were not finite."""
        if self._pending is None:
            return
        result, losses, record = self._pending
        is_skipped = not bool(result.is_finite.asnumpy())
        self._end_clock()
        self._pending = None
        record |= {"loss": float(np.mean([loss.asnumpy() for loss in losses])),
                   "grad_norm": float(result.grad_norm.asnumpy()), "is_skipped": int(is_skipped)}
        self.logger.log_step(record)
        if is_skipped:
            self.skipped += 1
            self.logger.event("skipped", at=record["step"], loss=record["loss"], grad_norm=record["grad_norm"])
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if is_skipped else 0
        self._show(record)
        if self.skipped_in_a_row >= MOST_SKIPPED_IN_A_ROW:
            raise TrainingError(f"{self.skipped_in_a_row} steps in a row had a non-finite loss or gradient (last: step "
                                f"{record['step']}, loss {record['loss']}, gradient norm {record['grad_norm']}). "
                                "Nothing was updated in them. Expected finite numbers: lower learning_rate, look for "
                                "broken pictures or weights, and on Ascend prefer bfloat16 to float16.")

    def _end_clock(self) -> None:
        """Note how long the pending step took: from its begin to the next one's, compilations excepted."""
        if self._pending is None or "seconds" in self._pending[2]:
            return
        began, compiled = self._clock
        compiling = self.step.compile_seconds - compiled
        self._pending[2]["seconds"] = seconds = max(time.perf_counter() - began - compiling, 0.0)
        if not compiling:
            self._recent.append((self._rows, seconds))

    def _show(self, record: dict[str, Any]) -> None:
        rows, seconds = (sum(values) for values in zip((0, 0.0), *self._recent))
        self.progress.advance(loss=f"{record['loss']:.4f}", lr=f"{record['learning_rate']:.1e}",
                              **({"samples/s": f"{rows / seconds:.1f}"} if seconds else {}),
                              **({"skipped": str(self.skipped)} if self.skipped else {}))
