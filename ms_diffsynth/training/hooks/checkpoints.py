"""Saving: weights after an epoch and at the end, and checkpoints of all that is needed to resume."""
from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ms_diffsynth.errors import OutputError, listing
from ms_diffsynth.launch.worker import beat
from ms_diffsynth.nn.names import to_numpy
from ms_diffsynth.redact import without_secrets
from ms_diffsynth.storage.checkpoint import remove_old_checkpoints, save_checkpoint
from ms_diffsynth.storage.rank_files import Part, write_part
from ms_diffsynth.training.hooks.contract import Hook
from ms_diffsynth.training.same_run import set_later_aside
from ms_diffsynth.training.state import CHECKPOINTS, parameters_of, run_folder, versions
from ms_diffsynth.training.trainer import Trainer


class Checkpoints(Hook):
    """Saves the weights (`training.logger.ModelLogger` names the files) and then, when it is due, a checkpoint: all
    that a step changes, with the records, the first and the last sample images, and the run's identity.

    Args:
        save_steps: the logger saves weights every N steps; None: after every epoch.
        checkpoint_steps: checkpoints every N steps; None: with every save of weights; 0: never.
        keep: how many checkpoints stay.
        captions: of the sample images, which are only comparable to others of the same captions.
        changes: what a resumed run changed, and was accepted.
    """

    def __init__(self, save_steps: int | None, checkpoint_steps: int | None, keep: int, captions: Sequence[str] = (),
                 changes: Sequence[str] = ()):
        self.save_steps, self.checkpoint_steps, self.keep = save_steps, checkpoint_steps, keep
        self.captions, self.changes = list(captions), list(changes)
        self._saved_at = -1

    def start(self, trainer: Trainer) -> None:
        checkpoint, logger = trainer.resumed_from, trainer.logger
        if checkpoint is None:
            return
        logger.event("resumed", checkpoint=str(checkpoint.path), changes=self.changes)
        trainer.progress.say(f"resumed from {checkpoint.path}" + "".join(f"\n  accepted: {c}" for c in self.changes))
        if trainer.accelerator.is_main_process:
            set_later_aside(logger.output_path, checkpoint)
        if run_folder(checkpoint).resolve() == logger.output_path.resolve():
            logger.checkpoint, self._saved_at = checkpoint.path, checkpoint.step
            logger.restore(checkpoint.state)
        if trainer.accelerator.is_main_process and checkpoint.state["captions"] == without_secrets(self.captions):
            logger.restore_images(checkpoint.read("pictures"), self.captions)

    def after_step(self, trainer: Trainer) -> None:
        if trainer.is_epoch_end and self.save_steps is None:
            trainer.report.flush()
            trainer.logger.on_epoch_end(trainer.accelerator, trainer.module, trainer.epoch)
        if not trainer.is_done:  # at the end it is saved with the last sample images
            self._save(trainer, is_last=False)

    def end(self, trainer: Trainer) -> None:
        trainer.logger.on_training_end(trainer.accelerator, trainer.module, self.save_steps)
        self._save(trainer, is_last=True)

    def _save(self, trainer: Trainer, is_last: bool) -> None:
        """Save all that is needed to resume after this step, if that is due. Every rank must call it.

        Raises: OutputError, on every rank when one of them cannot write its part.
        """
        logger, every, step = trainer.logger, self.checkpoint_steps, trainer.step
        at = logger.num_steps
        is_due = is_last or (logger.saved_at == at if every is None else bool(every) and at % every == 0)
        if every == 0 or not is_due or at == self._saved_at:
            return
        self._saved_at = at
        beat(at + 1, "checkpoint")
        trainer.report.flush()
        folder = logger.output_path / CHECKPOINTS
        is_divided, is_main = step.optimizer.is_divided, trainer.accelerator.is_main_process
        parts = {"moments": self._write_parts(trainer, folder)} if is_divided else {}
        said = ""
        if is_main:
            try:
                self._commit(trainer, folder, parts)
            except OutputError as error:
                if not is_divided:
                    raise
                said = str(error)
                for part in parts["moments"]:
                    (folder / part.file).unlink(missing_ok=True)
        if is_divided and (failed := trainer.accelerator.gather_text(said)[0]):
            raise OutputError(failed)

    def _commit(self, trainer: Trainer, folder: Path, parts: Mapping[str, list[Part]]) -> None:
        """Write everything but the parts, take those in, and remove older checkpoints. Raises: OutputError."""
        began, logger, report = time.perf_counter(), trainer.logger, trainer.report
        logger.sync()
        groups = {group: {name: to_numpy(p) for name, p in parameters.items()}
                  for group, parameters in parameters_of(trainer.step).items()}
        epoch, position = divmod(trainer.step.batches, len(trainer.loader))
        state = {"step": trainer.step.batches, "epoch": epoch, "position": position, "skipped": report.skipped,
                 "skipped_in_a_row": report.skipped_in_a_row, **logger.state(),
                 "captions": without_secrets(self.captions), "identity": trainer.identity, "versions": versions()}
        groups["pictures"] = logger.first_and_last()
        logger.checkpoint = save_checkpoint(folder, logger.num_steps, groups, state, parts)
        remove_old_checkpoints(logger.checkpoint, self.keep)
        size = sum(path.stat().st_size for path in logger.checkpoint.iterdir())
        logger.event("checkpoint", file=f"{CHECKPOINTS}/{logger.checkpoint.name}", bytes=size,
                     seconds=round(time.perf_counter() - began, 4))

    @staticmethod
    def _write_parts(trainer: Trainer, folder: Path) -> list[Part]:
        """Write this rank's part of the moments. Returns: what every rank wrote. Raises: OutputError on every rank."""
        pieces: Mapping[str, np.ndarray]
        pieces, shapes = trainer.step.optimizer.state_pieces()
        part, said = None, ""
        try:
            part = write_part(folder, pieces, shapes)
            said = json.dumps(dataclasses.asdict(part))
        except OutputError as error:
            said = str(error)
        heard = trainer.accelerator.gather_text(said)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(heard) if not text.startswith("{")]
        if failed:
            if part is not None:
                (folder / part.file).unlink()
            raise OutputError(f"the checkpoint of step {trainer.logger.num_steps} was not saved: {listing(failed)}")
        return [Part(**json.loads(text)) for text in heard]


