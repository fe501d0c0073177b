"""What a hook is: something that happens before the first step, between two steps, or after the last one."""
from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ms_diffsynth.training.trainer import Trainer


class Hook:
    """Called by `training.trainer.Trainer` on every rank, in the order in which hooks are given, at the end in reverse.

    A hook reads ``trainer.logger.num_steps`` for the number of steps made, writes through ``trainer.logger``, and says
    something by ``trainer.progress.say``. What takes longer than a step belongs into ``with trainer.looking():``, which
    gives it up when a signal comes, and gives the networks their moving averages. What only one rank does is kept to
    ``trainer.accelerator.is_main_process``. A hook may raise `errors.UserError`, which ends the run.
    """

    def start(self, trainer: Trainer) -> None:
        """Before the first step; of a resumed run ``trainer.resumed_from`` is the checkpoint."""

    def after_step(self, trainer: Trainer) -> None:
        """After each step, which is an optimizer update."""

    def end(self, trainer: Trainer) -> None:
        """After the last step, or after the step at which a signal stopped the run."""


class Look(Hook):
    """A hook that looks at the weights before the first step, every N steps and at the end, once at each of them.

    ``every``: steps; None looks before the first step and at the end. A subclass has ``last_look``, and ``look``, which
    a signal may end at any place.
    """

    every: int | None

    def start(self, trainer: Trainer) -> None:
        self.after_step(trainer)

    def after_step(self, trainer: Trainer) -> None:
        if is_due(self.every, trainer.logger.num_steps):
            self.look_once(trainer)

    def end(self, trainer: Trainer) -> None:
        self.look_once(trainer)

    def look_once(self, trainer: Trainer) -> None:
        """Look, unless that is done at this step."""
        if self.last_look(trainer) == trainer.logger.num_steps:
            return
        with trainer.looking() as is_wanted:
            if is_wanted:
                self.look(trainer)

    def last_look(self, trainer: Trainer) -> int:
        """The step of the last look; -1 before the first."""
        raise TypeError(f"{type(self).__name__} has no last_look: implement it.")

    def look(self, trainer: Trainer) -> None:
        """Look, on the first rank, at the weights or at their moving average."""
        raise TypeError(f"{type(self).__name__} has no look: implement it.")


def is_due(every: int | None, step: int) -> bool:
    """Whether something that happens every N steps is due after ``step`` of them; None: only before the first."""
    return step % every == 0 if every else step == 0
