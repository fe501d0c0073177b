"""Trackers during a run: TensorBoard, Weights & Biases, SwanLab."""
from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

from ms_diffsynth.training.hooks.contract import Hook
from ms_diffsynth.training.trackers import Tracked, Tracker, check_installed, tracker_class
from ms_diffsynth.training.trainer import Trainer

logger = logging.getLogger(__name__)


class Tracking(Hook):
    """Opens trackers when the run begins, gives them what the logger records, and closes them when it has ended.

    A tracker that fails while the run goes on is given up, with a warning: its server may be down.

    Args:
        names: of `registry.TRACKERS`.
        project: what the run belongs to, in services that have projects.

    Raises: ConfigError when a package is not installed.
    """

    def __init__(self, names: Sequence[str], project: str):
        check_installed(names)
        self.names, self.project = names, project
        self.open: dict[str, Tracker] = {}

    def start(self, trainer: Trainer) -> None:
        records = trainer.logger
        if not trainer.accelerator.is_main_process:
            return
        with open(records.output_path / "events.jsonl", "rb") as file:  # its first line tells when the run was begun
            begun = hashlib.sha256(file.readline() + records.output_path.name.encode()).hexdigest()[:21]
        run = Tracked(folder=records.output_path, name=records.output_path.resolve().name, project=self.project,
                      id=begun, settings=records.settings, after=records.num_steps, frame_rate=records.frame_rate)
        for name in self.names:
            self._try(name, lambda name=name: self.open.update({name: tracker_class(name)(run)}))
        records.listeners.append(self)
        trainer.at_exit.callback(self.close)

    def scalars(self, *values: Any) -> None:
        """As `Tracker.scalars`, for all of them."""
        for name, tracker in list(self.open.items()):
            self._try(name, lambda tracker=tracker: tracker.scalars(*values))

    def images(self, *values: Any) -> None:
        """As `Tracker.images`, for all of them."""
        for name, tracker in list(self.open.items()):
            self._try(name, lambda tracker=tracker: tracker.images(*values))

    def close(self) -> None:
        """Close what is open."""
        for name, tracker in list(self.open.items()):
            self._try(name, tracker.close)
        self.open.clear()

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self.open.pop(name, None)
            logger.warning("%s is given up: %s: %s. Training goes on; loss.csv and report.html have what it would have "
                           "shown.", name, type(error).__name__, error)
