"""Images and their references, as they are trained: which is which, no check can tell, but a look does."""
from __future__ import annotations

from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.data.images import grid, side_by_side
from ms_diffsynth.pipelines.shared.edit import references
from ms_diffsynth.redact import redact
from ms_diffsynth.training.hooks.contract import Hook
from ms_diffsynth.training.trainer import Trainer

SHOWN = 3


class Pairs(Hook):
    """Writes ``pairs.png`` before the first step: three rows of ``dataset`` with references, which are on the left."""

    def __init__(self, dataset: UnifiedDataset):
        self.dataset = dataset

    def start(self, trainer: Trainer) -> None:
        dataset = self.dataset
        if not trainer.accelerator.is_main_process:
            return
        rows = [row for row, cells in enumerate(dataset.rows) if cells.get("edit_image")]
        shown = rows[:: max(1, len(rows) // SHOWN)][:SHOWN]
        if not shown:
            return
        pairs, prompts = [], []
        for row in shown:
            cells = dataset.cells(row, ["image", "edit_image", "prompt"])
            image = cells["image"]
            pairs.append([side_by_side(references(cells["edit_image"]), image.height), image])
            prompts.append(redact(f"reference | image to learn: {cells.get('prompt', '')}"))
        path = trainer.logger.write_image("pairs.png", grid(pairs, captions=prompts))
        trainer.progress.say(f"{len(rows)} of {len(dataset.rows)} rows have references; in {path} they are on the left")
