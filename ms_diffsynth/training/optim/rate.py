"""The learning rate of every optimizer step, computed on the host."""
from __future__ import annotations

import math
from dataclasses import dataclass

from ms_diffsynth.errors import ConfigError, nearest

SCHEDULES = ("constant", "linear", "cosine")


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    """The learning rate of every optimizer step, computed on the host.

    Rises linearly from 0 over ``warmup_steps``, then stays (``constant``), falls linearly to 0 (``linear``) or as half
    a cosine (``cosine``) until ``total_steps``; 0 after that.

    Raises: ConfigError for an unknown schedule or impossible numbers of steps.
    Source: diffusers 0.39, optimization.py, get_scheduler; step k of there is step k here, counted from 0. With a
    warm-up the first update therefore has learning rate 0.
    """

    schedule: str = "constant"
    base: float = 1e-4
    warmup_steps: int = 0
    total_steps: int = 0

    def __post_init__(self):
        wrong = []
        if self.schedule not in SCHEDULES:
            wrong.append(f"lr_scheduler='{self.schedule}': expected one of {', '.join(SCHEDULES)}."
                         f"{nearest(self.schedule, SCHEDULES)}")
        if not (self.base >= 0 and math.isfinite(self.base)):
            wrong.append(f"learning_rate={self.base}: expected a finite number, at least 0. Try 1e-4.")
        if self.warmup_steps < 0:
            wrong.append(f"lr_warmup_steps={self.warmup_steps}: expected at least 0.")
        elif self.total_steps and self.warmup_steps > self.total_steps:
            wrong.append(f"lr_warmup_steps={self.warmup_steps}: expected at most the {self.total_steps} steps of the "
                         "run. Train longer or warm up for fewer steps.")
        elif self.schedule in SCHEDULES[1:] and self.total_steps <= self.warmup_steps:
            wrong.append(f"total steps={self.total_steps}: expected more than lr_warmup_steps={self.warmup_steps} for "
                         f"lr_scheduler={self.schedule}. Train longer or warm up for fewer steps.")
        if wrong:
            raise ConfigError("\n".join(wrong))

    def __call__(self, step: int) -> float:
        """The learning rate of optimizer step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.base * step / self.warmup_steps
        if self.schedule == "constant":
            return self.base
        progress = min((step - self.warmup_steps) / (self.total_steps - self.warmup_steps), 1.0)
        return self.base * (1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2)
