"""Exact resume: what of a run is saved, which checkpoint it goes on from, and whether that is the same run.

Every random number is drawn on the host, keyed by the seed and the number of the sample (`draws`), and the order
of the data is computed (`data.loader`). So the state is what a step changes, and a few whole numbers.
"""
from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import time
from collections.abc import Collection, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Parameter, ops

from ms_diffsynth import __version__, runtime
from ms_diffsynth.config import SETTINGS
from ms_diffsynth.config.setting import without_secrets
from ms_diffsynth.errors import CheckpointError, ConfigError, OutputError, listing, nearest
from ms_diffsynth.formats.weights import FLOATS
from ms_diffsynth.nn.names import load_state, to_numpy
from ms_diffsynth.program import Cut
from ms_diffsynth.storage.cache import digest_of
from ms_diffsynth.storage.checkpoint import (
    Checkpoint,
    differences,
    latest,
    open_checkpoint_folder,
    remove_old_checkpoints,
    save_checkpoint,
)
from ms_diffsynth.storage.lock import lock_folder
from ms_diffsynth.storage.rank_files import Part, write_part
from ms_diffsynth.train.distributed import Accelerator
from ms_diffsynth.train.logger import ModelLogger
from ms_diffsynth.train.module import DiffusionTrainingModule
from ms_diffsynth.train.options import TrainingOptions
from ms_diffsynth.train.prepared import CachedRows, PreparedRows
from ms_diffsynth.train.step import TrainStep
from ms_diffsynth.train.two_stage import pictures_of

logger = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"  # folder in the folder of a run

# Settings that shape no number of a run: places of files, which are known by what they hold, saving, samples, logging.
# Any other may change only when it is accepted, one of a script's own too.
MAY_CHANGE = frozenset("""
    model_paths model_id_with_origin_paths tokenizer_path tokenizer_1_path tokenizer_2_path tokenizer_3_path
    dataset_base_path
    dataset_metadata_path class_base_path class_metadata_path cache_dir output_path remove_prefix_in_ckpt
    trust_template_code trust_template_sha256 num_epochs max_train_steps num_workers find_unused_parameters
    device_memory zero_stage resume accept_changes checkpoint_steps keep_checkpoints grace_seconds save_steps
    evaluation_steps evaluation_count evaluation_reference
    sample_count sample_steps sample_prompts sample_template_inputs sample_seed num_inference_steps sampler
    sample_height sample_width enable_tensorboard_log push_to_hub hub_model_id hub_private_repo hub""".split())


# What every run had before there were these settings, so that checkpoints written then can be gone on from.
BEFORE = {"optimizer": "adamw", "optimizer_args": [], "adapter": "lora"}


# -- where a run goes on ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def holding(output_path: Path) -> Iterator[None]:
    """Hold the folder of a run for this process. Raises: OutputError when another run holds it."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(lock_folder(output_path))
        if (output_path / CHECKPOINTS).is_dir():  # what a killed run left half written is in there
            stack.enter_context(lock_folder(output_path / CHECKPOINTS))
            for part in (output_path / CHECKPOINTS).glob(".tmp-*"):  # of any machine: nobody else writes here
                if part.is_file():
                    part.unlink()
        yield


def check_folder(output_path: Path, resume: str) -> None:
    """What can be said before any model is loaded.

    Raises: CheckpointError when the run would mix with another one's checkpoints, or ``resume`` is no folder.
    """
    found = _checkpoints_in(output_path)
    if resume == "none" and found:
        raise CheckpointError(f"{output_path} holds checkpoints of another run, the last one {found[-1]}. Go on with "
                              "it by --resume auto, or choose another output_path for a new run.")
    if resume in ("auto", "none"):
        return
    if not os.path.isdir(resume):
        raise CheckpointError(f"resume={resume}: there is no such folder.{nearest(resume, ['auto', 'none'])} Expected "
                              f"auto, none, or the path of a checkpoint such as {output_path / CHECKPOINTS}"
                              "/step-00000120.")
    if found and not _is_within(Path(resume), output_path):
        raise CheckpointError(f"{output_path} holds checkpoints of another run than {resume}, the last one {found[-1]}."
                              " Choose another output_path.")


def find_checkpoint(output_path: Path, resume: str) -> Checkpoint | None:
    """The checkpoint to go on from, verified; None for a run that starts.

    Raises: CheckpointError, as `check_folder` does, and when the one that was asked for, or every one, is damaged.
    """
    check_folder(output_path, resume)
    if resume not in ("auto", "none"):
        return open_checkpoint_folder(resume)
    found = latest(output_path / CHECKPOINTS)
    if found is None and (names := _checkpoints_in(output_path)):
        raise CheckpointError(f"none of the {len(names)} checkpoints in {output_path / CHECKPOINTS} can be used "
                              f"({listing(names)}); what is wrong with each is said above. Choose another output_path "
                              "to start afresh.")
    return found


def find_for_all(accelerator: Accelerator, output_path: Path, resume: str) -> Checkpoint | None:
    """What `find_checkpoint` gives the first rank, opened and verified by every rank."""
    found = find_checkpoint(output_path, resume) if accelerator.is_main_process else None
    main = accelerator.gather_text("" if found is None else str(found.path))[0]
    if main and not accelerator.is_main_process:
        found = open_checkpoint_folder(main)
    return found


def set_later_aside(output_path: Path, checkpoint: Checkpoint) -> list[Path]:
    """Rename the checkpoints after the one a run goes on from, so that they are never mixed with its own."""
    moved = []
    for name in _checkpoints_in(output_path):
        if int(name.removeprefix("step-")) > checkpoint.step:
            folder = output_path / CHECKPOINTS
            names = [f"aside-{name}", *(f"aside-{name}-{k}" for k in range(2, 1000))]
            moved.append(next(folder / n for n in names if not (folder / n).exists()))
            (folder / name).rename(moved[-1])
    if moved:
        logger.warning("later checkpoints than %s are kept under other names and never used: %s. Delete them when you "
                       "do not need them.", checkpoint.path, listing(moved))
    return moved


def run_folder(checkpoint: Checkpoint) -> Path:
    """The folder of the run that saved a checkpoint."""
    return checkpoint.path.parent.parent


def _checkpoints_in(output_path: Path) -> list[str]:
    names = [path.name for path in (output_path / CHECKPOINTS).glob("step-*")]
    return sorted((n for n in names if n.removeprefix("step-").isdigit()), key=lambda n: int(n.removeprefix("step-")))


def _is_within(checkpoint: Path, output_path: Path) -> bool:
    return checkpoint.resolve().parent == (output_path / CHECKPOINTS).resolve()


# -- whether it is the same run --------------------------------------------------------------------------------------


def identity(accelerator: Accelerator, module: DiffusionTrainingModule, cut: Cut | None, options: TrainingOptions,
             args: Any, dataset: Any, class_dataset: Any) -> dict[str, Any]:
    """Everything that shapes the numbers of a run, flat: settings, data, files of the frozen weights.

    Names of outputs, intervals of saving and places of files are not in it: data and weights are known by what they
    hold. How long to train is in it only where the learning rate depends on it.
    """
    pipe = module.pipe
    given = {**vars(args)} if hasattr(args, "__dict__") else {}
    settings = {k: v for k, v in (given | dataclasses.asdict(options)).items() if k not in MAY_CHANGE}
    settings["optimizer_args"] = sorted(options.optimizer_args)
    if options.lr_scheduler != "constant":
        settings |= {"num_epochs": options.num_epochs, "max_train_steps": options.max_train_steps}
    settings["batch_size"] = options.batch_size * accelerator.num_processes  # more ranks may take smaller batches
    settings |= dataclasses.asdict(pipe.objective)
    settings |= {"task": module.task, "mode": accelerator.mode, "device": accelerator.device,
                 "dtype": runtime.dtype_name(pipe.dtype), "fuse": module.fuse, "pipeline": type(pipe).__name__,
                 "adapter": module.adapter.name}
    data = {f"{name}.{part}": value for name, found in (("data", dataset), ("class_data", class_dataset))
            if found is not None for part, value in _content(found).items()}
    models = set(pipe.sources) if cut is None else {*cut.models("step")}
    if cut is not None and not isinstance(dataset, CachedRows):
        models |= {*cut.models("prepare")}  # otherwise the digest of the cache's rows speaks for them
    digests = {f"weights.{name}": digest for name in sorted(models) if (digest := pipe.weights_digest(name))}
    return json.loads(json.dumps(without_secrets(settings | data | digests)))


def check_same_everywhere(accelerator: Accelerator, identity: Mapping[str, Any]) -> None:
    """Refuse ranks that would not train the same: a machine may have older pictures, other weights, another setting.

    Raises: ConfigError naming the fields in which a rank differs from the first.
    """
    names = sorted(identity)
    digests = [text.split() for text in accelerator.gather_text(" ".join(digest_of(identity[n])[:8] for n in names))]
    wrong = [f"rank {rank}: {listing([n for n, a, b in zip(names, digests[0], own) if a != b] or ['the fields'])}"
             for rank, own in enumerate(digests) if own != digests[0]]
    if wrong:
        raise ConfigError(f"the ranks would not train the same; unlike rank 0 are {'; '.join(wrong)}. Expected the "
                          "same settings, data and weights on every machine: copy them, or use storage that all see.")


def _content(dataset: Any) -> dict[str, Any]:
    """What a data set holds. One that has neither ``fingerprint()`` nor ``operators()`` is known by its length."""
    if isinstance(dataset, CachedRows):
        digest = digest_of([row.key for row in dataset.planned])
    else:
        dataset = dataset.dataset if isinstance(dataset, PreparedRows) else dataset
        digest = dataset.fingerprint() if hasattr(dataset, "fingerprint") else None
    return {"rows": len(dataset), "pictures": pictures_of(dataset), "digest": digest}


def check_identity(checkpoint: Checkpoint, now: Mapping[str, Any], accept: Collection[str]) -> list[str]:
    """What differs between the run that saved a checkpoint and this one, and was accepted.

    Args:
        accept: names of fields; ``data`` accepts every ``data.digest``, ``data.rows`` and so on.

    Returns: a line for each field. Raises: CheckpointError listing what was not accepted; ConfigError for a name that
        is none.
    """
    saved = BEFORE | checkpoint.state["identity"]
    fields = {*saved, *now}
    groups = {field.partition(".")[0] for field in fields}
    unknown = [name for name in accept if name not in fields | groups | SETTINGS.keys()]
    if unknown:
        raise ConfigError(f"accept_changes names {listing(unknown)}: expected names of settings, data or weights."
                          f"{nearest(unknown[0], fields | groups)}")
    accepted = {field for field in fields if field in accept or field.partition(".")[0] in accept}
    refused = differences(saved, now, accepted)
    if refused:
        names = dict.fromkeys(line.partition(":")[0].partition(".")[0] for line in refused)
        raise CheckpointError(
            f"{checkpoint.path} was saved by another run than this one:\n  " + "\n  ".join(refused) + "\nSet them back,"
            f" or go on with the change by --accept_changes {','.join(names)}, or choose another output_path to start "
            "afresh with --resume none.")
    if versions() != checkpoint.state["versions"]:
        logger.warning("other versions than when %s was saved, so the same bits are not promised: %s", checkpoint.path,
                       listing(differences(checkpoint.state["versions"], versions())))
    return differences(saved, now)


def versions() -> dict[str, str]:
    """What may change the last bit of a number."""
    return {"ms_diffsynth": __version__} | {name: version(name) for name in ("mindspore", "mindone", "numpy")}


# -- the state -------------------------------------------------------------------------------------------------------


def parameters_of(step: TrainStep) -> dict[str, dict[str, Parameter]]:
    """Every Parameter that a step changes, by group and name, but for moments that the ranks have divided.

    Accumulators are empty between two steps.
    """
    groups = {"weights": {p.name: p for p in step.weights}}
    if not step.optimizer.is_divided:
        groups["moments"] = step.optimizer.state_tensors()
    if step.ema is not None:
        groups["ema"] = step.ema.state_tensors()
    if step.loss_scaler is not None:
        groups["loss_scale"] = {n: p for n, p in vars(step.loss_scaler).items() if isinstance(p, Parameter)}
    return groups


def restore(step: TrainStep, checkpoint: Checkpoint, now: Mapping[str, Any]) -> None:
    """Give a step the state of a checkpoint, in place, so that what is compiled sees it.

    Args:
        now: the present `identity`. A loss scale that it changes is not restored; a moving average that was not kept
            before starts from the weights.

    Raises: CheckpointError when the checkpoint has no weights or no moments, or holds what is not finite; WeightError
        when they are of others.
    """
    own = {group: parameters for group, parameters in parameters_of(step).items() if group != "moments"}
    lost = [name for name in ("weights", "moments") if name not in checkpoint.groups]
    if lost:
        raise CheckpointError(f"{checkpoint.path} has no {' and no '.join(lost)}: it has {listing(checkpoint.groups)}. "
                              "Resume from a checkpoint of a training run.")
    if now.get("loss_scale") != checkpoint.state["identity"].get("loss_scale"):
        own.pop("loss_scale", None)
    for name, parameters in own.items():
        if name in checkpoint.groups:
            load_state(parameters, _Finite(checkpoint, name))
    step.optimizer.load_state_tensors(_Finite(checkpoint, "moments"))
    if step.ema is not None and "ema" not in checkpoint.groups:
        for average, weight in zip(step.ema.average, step.ema.parameters):
            ops.assign(average, weight.astype(average.dtype))


class _Finite:
    """The arrays of a group, each read and looked at when it is asked for. Raises: CheckpointError."""

    def __init__(self, checkpoint: Checkpoint, group: str):
        self.checkpoint, self.group, self.arrays = checkpoint, group, checkpoint.open(group)
        self.shapes = self.arrays.shapes

    def __getitem__(self, name: str) -> np.ndarray:
        array = self.arrays[name]
        if array.dtype.name in FLOATS and not np.isfinite(array).all():
            raise CheckpointError(f"{self.checkpoint.path} holds numbers in {self.group} that are not finite: {name}. "
                                  "Training cannot go on from them: resume from an earlier checkpoint.")
        return array


class Checkpoints:
    """The checkpoints of a run: when one is due, and saving it.

    Attributes:
        last: the folder of the newest; None before the first.
    """

    def __init__(self, accelerator: Accelerator, records: ModelLogger, options: TrainingOptions,
                 identity: Mapping[str, Any], captions: list[str]):
        self.accelerator = accelerator
        self.records, self.options, self.identity, self.captions = records, options, identity, captions
        self.folder = records.output_path / CHECKPOINTS
        self.last: Path | None = None
        self._saved_at = -1

    def is_due(self, is_last: bool) -> bool:
        """Whether the state after this step is to be saved, and is not yet. At the end it is, unless it never is."""
        step, every = self.records.num_steps, self.options.checkpoint_steps
        if every == 0 or step == self._saved_at:
            return False
        return is_last or (self.records.saved_at == step if every is None else step % every == 0)

    def save(self, step: TrainStep, state: Mapping[str, Any]) -> None:
        """Save all that a step changes and ``state``; older checkpoints than the last few go. Every rank must call it.

        Raises: OutputError, on every rank when one of them cannot write its part.
        """
        self._saved_at = self.records.num_steps
        if not step.optimizer.is_divided:
            if self.accelerator.is_main_process:
                self._commit(step, state, {})
            return
        parts = self._write_parts(*step.optimizer.state_pieces())
        said = ""
        if self.accelerator.is_main_process:
            try:
                self._commit(step, state, {"moments": parts})
            except OutputError as error:
                said = str(error)
                for part in parts:
                    (self.folder / part.file).unlink(missing_ok=True)
        if failed := self.accelerator.gather_text(said)[0]:
            raise OutputError(failed)

    def _commit(self, step: TrainStep, state: Mapping[str, Any], parts: dict[str, list[Part]]) -> None:
        """Write everything but the parts, take those in, and remove older checkpoints. Raises: OutputError."""
        began, records = time.perf_counter(), self.records
        records.sync()
        groups = {group: {name: to_numpy(p) for name, p in parameters.items()}
                  for group, parameters in parameters_of(step).items()}
        state = {**state, **records.state(), "captions": without_secrets(self.captions), "identity": self.identity,
                 "versions": versions()}
        self.last = save_checkpoint(self.folder, records.num_steps, groups | {"pictures": records.pictures()}, state,
                                    parts)
        remove_old_checkpoints(self.last, self.options.keep_checkpoints)
        records.event("checkpoint", file=f"{CHECKPOINTS}/{self.last.name}", bytes=_size(self.last),
                      seconds=round(time.perf_counter() - began, 4))

    def _write_parts(self, pieces: Mapping[str, np.ndarray], shapes: Mapping[str, list[int]]) -> list[Part]:
        """Write this rank's part of the moments. Returns: what every rank wrote. Raises: OutputError on every rank."""
        part, said = None, ""
        try:
            part = write_part(self.folder, pieces, shapes)
            said = json.dumps(dataclasses.asdict(part))
        except OutputError as error:
            said = str(error)
        heard = self.accelerator.gather_text(said)
        failed = [f"rank {rank}: {text}" for rank, text in enumerate(heard) if not text.startswith("{")]
        if failed:
            if part is not None:
                (self.folder / part.file).unlink()
            raise OutputError(f"the checkpoint of step {self.records.num_steps} was not saved: {listing(failed)}")
        return [Part(**json.loads(text)) for text in heard]

    def restore(self, checkpoint: Checkpoint) -> None:
        """What the records knew. Pictures are only comparable to others of the same captions."""
        state = checkpoint.state
        if run_folder(checkpoint).resolve() == self.records.output_path.resolve():
            self.last, self._saved_at = checkpoint.path, checkpoint.step
            self.records.restore(state)
        if self.accelerator.is_main_process and state["captions"] == without_secrets(self.captions):
            self.records.restore_pictures(checkpoint.read("pictures"), self.captions)


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())
