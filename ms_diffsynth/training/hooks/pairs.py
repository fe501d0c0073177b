"""A look at images and their references before the first step."""
from __future__ import annotations

from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.data.pairs import pairs_sheet, rows_with_references
from ms_diffsynth.training.hooks.contract import Hook
from ms_diffsynth.training.trainer import Trainer


class Pairs(Hook):
    """Writes ``pairs.png`` before the first step: three rows of ``dataset`` with references, which are on the left."""

    def __init__(self, dataset: UnifiedDataset):
        self.dataset = dataset

    def start(self, trainer: Trainer) -> None:
        dataset = self.dataset
        if not trainer.accelerator.is_main_process:
            return
        sheet = pairs_sheet(dataset)
        if sheet is None:
            return
        count, path = len(rows_with_references(dataset)), trainer.logger.write_image("pairs.png", sheet)
        trainer.progress.say(f"{count} of {len(dataset.rows)} rows have references; in {path} they are on the left")
