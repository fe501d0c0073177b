"""The options of one training run: the settings of `config.settings` that configure the loop and what it is made of."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field, make_dataclass
from typing import Any

from ms_diffsynth.config import SETTINGS
from ms_diffsynth.errors import ConfigError, nearest
from ms_diffsynth.training.optim import optimizer_arguments

_Settings = make_dataclass("_Settings", [
    (s.name, s.kind, field(default=s.default)) for s in SETTINGS.values() if s.metadata["configures"] == "training"],
    frozen=True, kw_only=True)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(_Settings):
    """How long, how fast, how often: every setting that configures "training", and ``num_workers``.

    Every interval counts steps: one step is one optimizer update.

    Raises: ConfigError listing every value out of its range.
    """

    learning_rate: float = 1e-5  # the documents' defaults of `launch_training_task`
    num_epochs: int | None = 1
    num_workers: int = 1  # threads that load rows ahead for a module with its own forward

    @classmethod
    def of(cls, given: Any, defaults: dict[str, Any]) -> TrainingOptions:
        """Options from ``defaults``, overridden by the attributes that ``given`` (settings, or a parsed command line)
        has.
        """
        names = [f.name for f in dataclasses.fields(cls)]
        for name in defaults:
            if name not in names:
                raise ConfigError(f"launch_training_task has no option '{name}': it has {', '.join(names)}."
                                  f"{nearest(name, names)}")
        values = given.flat() if hasattr(given, "flat") else {n: getattr(given, n) for n in names if hasattr(given, n)}
        return cls(**defaults | {n: v for n, v in values.items() if n in names})

    def __post_init__(self):
        checked = set(SETTINGS) - {"learning_rate", "optimizer"}  # 0 is a probe; an optimizer may have been registered
        wrong = [f"{name}={value}: {expected}." for name, value in vars(self).items()
                 if name in checked and value is not None and (expected := SETTINGS[name].expected(value))]
        if self.max_train_steps is None and self.num_epochs is None:
            wrong.append("neither num_epochs nor max_train_steps is set: say how long to train.")
        for name in ("accept_changes", "optimizer_args"):
            if isinstance(value := getattr(self, name), str):
                wrong.append(f"{name}='{value}': expected a list, such as {value.split(',')}.")
        if wrong:
            raise ConfigError("\n".join(wrong))
        optimizer_arguments(self)
