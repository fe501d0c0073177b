"""The options of one training run, and what of them cannot be meant."""
from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from ms_diffsynth.errors import ConfigError, nearest
from ms_diffsynth.train.optim import optimizer_arguments


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How long, how fast, how often. Every interval counts steps: one step is one optimizer update."""

    optimizer: str = "adamw"
    optimizer_args: tuple[str, ...] = ()  # such as ("d_coef=2",)
    learning_rate: float = 1e-5
    weight_decay: float = 1e-2
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float | None = 1.0
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    gradient_accumulation_steps: int = 1
    use_ema: bool = False
    ema_decay: float = 0.9999
    loss_scale: float = 1.0
    batch_size: int = 1  # of each rank
    zero_stage: int = 0  # 1: the ranks divide the moments, 2: accumulated gradients too
    num_epochs: int | None = 1
    max_train_steps: int | None = None
    num_workers: int = 1
    seed: int = 42
    save_steps: int | None = None
    sample_steps: int | None = None
    evaluation_steps: int | None = None
    evaluation_count: int = 64
    evaluation_reference: str | None = None  # a folder of pictures
    resume: str = "none"  # or "auto", or the path of a checkpoint
    accept_changes: tuple[str, ...] = ()  # what may differ from the checkpoint's run
    checkpoint_steps: int | None = None  # None: with every save; 0: never
    keep_checkpoints: int = 2
    grace_seconds: float = 60.0  # from a signal to the end

    @classmethod
    def of(cls, given: Any, defaults: dict[str, Any]) -> TrainingOptions:
        """Options from ``defaults``, overridden by the attributes that ``given`` (a parsed command line) has."""
        names = [f.name for f in dataclasses.fields(cls)]
        for name in defaults:
            if name not in names:
                raise ConfigError(f"launch_training_task has no option '{name}': it has {', '.join(names)}."
                                  f"{nearest(name, names)}")
        values = defaults | {n: getattr(given, n) for n in names if hasattr(given, n)}
        return cls(**values)

    def __post_init__(self):
        least = {"batch_size": 1, "gradient_accumulation_steps": 1, "num_epochs": 1, "max_train_steps": 1,
                 "loss_scale": 1, "evaluation_steps": 1, "checkpoint_steps": 0, "keep_checkpoints": 2}
        wrong = [f"{name}={value}: expected at least {limit}." for name, limit in least.items()
                 if (value := getattr(self, name)) is not None and value < limit]
        if self.zero_stage not in (0, 1, 2):
            wrong.append(f"zero_stage={self.zero_stage}: expected 0, 1 or 2.")
        if not self.grace_seconds > 0:
            wrong.append(f"grace_seconds={self.grace_seconds}: expected more than 0.")
        if self.max_train_steps is None and self.num_epochs is None:
            wrong.append("neither num_epochs nor max_train_steps is set: say how long to train.")
        if isinstance(self.accept_changes, str):
            wrong.append(f"accept_changes='{self.accept_changes}': expected a list of names, such as "
                         f"{self.accept_changes.split(',')}.")
        if isinstance(self.optimizer_args, str):
            wrong.append(f"optimizer_args='{self.optimizer_args}': expected a list, such as "
                         f"{self.optimizer_args.split(',')}.")
        if wrong:
            raise ConfigError("\n".join(wrong))
        optimizer_arguments(self)
