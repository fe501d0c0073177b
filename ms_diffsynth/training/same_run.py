"""Which checkpoint a run resumes from, and whether that is the same run."""
from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from ms_diffsynth.config import SETTINGS, flat
from ms_diffsynth.errors import CheckpointError, ConfigError, listing, naming, nearest
from ms_diffsynth.formats.json_text import parse_json
from ms_diffsynth.formats.weights import dtype_name
from ms_diffsynth.program import Cut
from ms_diffsynth.redact import without_secrets
from ms_diffsynth.storage.cache import digest_of
from ms_diffsynth.storage.checkpoint import Checkpoint, differences, latest, open_checkpoint_folder
from ms_diffsynth.storage.lock import lock_folder
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.options import TrainingOptions
from ms_diffsynth.training.prepared import CachedRows, PreparedRows
from ms_diffsynth.training.state import CHECKPOINTS, PREPARED, check_state, versions
from ms_diffsynth.training.two_stage import images_of

logger = logging.getLogger(__name__)

# What a script passes that shapes no number of a run; of the settings, `config.settings` says which may change.
_OF_SCRIPTS = ("num_workers", "find_unused_parameters")
MAY_CHANGE = frozenset((*_OF_SCRIPTS, *(n for n, setting in SETTINGS.items() if setting.metadata["may_change"])))


# -- what a run resumes from ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def holding(output_path: Path) -> Iterator[None]:
    """Hold the folder of a run for this process. Raises: OutputError when another run holds it."""
    with contextlib.ExitStack() as stack:
        with naming(f"output_path={output_path}"):
            stack.enter_context(lock_folder(output_path))
        if (output_path / CHECKPOINTS).is_dir():  # what a killed run left half written is in there
            stack.enter_context(lock_folder(output_path / CHECKPOINTS))
            for part in (output_path / CHECKPOINTS).glob(".tmp-*"):  # of any machine: no other run writes here
                if part.is_file():
                    part.unlink()
        shutil.rmtree(output_path / PREPARED, ignore_errors=True)  # of a killed run too
        yield


def check_folder(output_path: Path, resume: str) -> None:
    """What can be said before any model is loaded.

    Raises: CheckpointError when the run would mix with another one's checkpoints, or ``resume`` is not a folder.
    """
    found = checkpoints_in(output_path)
    if resume == "none" and found:
        raise CheckpointError(f"{output_path} holds checkpoints of another run, the last one {found[-1]}. Resume "
                              "it by --resume auto, or choose another output_path for a new run.")
    if resume in ("auto", "none"):
        return
    if not os.path.isdir(resume):
        raise CheckpointError(f"resume={resume}: there is no such folder.{nearest(resume, ['auto', 'none'])} Expected "
                              f"auto, none, or the path of a checkpoint such as {output_path / CHECKPOINTS}"
                              "/step-00000120.")
    if found and Path(resume).resolve().parent != (output_path / CHECKPOINTS).resolve():
        raise CheckpointError(f"{output_path} holds checkpoints of another run than {resume}, the last one {found[-1]}."
                              " Choose another output_path.")


def check_family(output_path: Path, resume: str, pipeline: str, accept: Collection[str] = ()) -> None:
    """Refuse the checkpoint of another family before any model is loaded; all else is compared when they are.

    Raises: CheckpointError.
    """
    names = checkpoints_in(output_path)
    if resume == "none" or (resume == "auto" and not names):
        return
    path = output_path / CHECKPOINTS / names[-1] if resume == "auto" else Path(resume)
    try:
        saved = parse_json((path / "state.json").read_bytes())["identity"]["pipeline"]
    except (OSError, ValueError, KeyError, TypeError):  # damaged: told when it is opened
        return
    if saved != pipeline and "pipeline" not in accept:
        raise CheckpointError(f"{path} was saved by another run than this one:\n  pipeline: \"{saved}\" when saved, "
                              f"\"{pipeline}\" now\nChoose another output_path to start afresh with --resume none.")


def find_checkpoint(output_path: Path, resume: str) -> Checkpoint | None:
    """The checkpoint to resume from, verified; None for a run that starts.

    Raises: CheckpointError, as `check_folder` does, and when the one that was asked for, or every one, is damaged.
    """
    check_folder(output_path, resume)
    if resume not in ("auto", "none"):
        with naming(f"resume={resume}"):
            return open_checkpoint_folder(resume)
    found = latest(output_path / CHECKPOINTS)
    if found is None and (names := checkpoints_in(output_path)):
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
    """Rename the checkpoints after the one a run resumes from, so that they are never mixed with its own."""
    moved = []
    for name in checkpoints_in(output_path):
        if int(name.removeprefix("step-")) > checkpoint.step:
            folder = output_path / CHECKPOINTS
            names = [f"aside-{name}", *(f"aside-{name}-{k}" for k in range(2, 1000))]
            moved.append(next(folder / n for n in names if not (folder / n).exists()))
            (folder / name).rename(moved[-1])
    if moved:
        logger.warning("later checkpoints than %s are kept under other names and never used: %s. Delete them when you "
                       "do not need them.", checkpoint.path, listing(moved))
    return moved


def checkpoints_in(output_path: Path) -> list[str]:
    names = [path.name for path in (output_path / CHECKPOINTS).glob("step-*")]
    return sorted((n for n in names if n.removeprefix("step-").isdigit()), key=lambda n: int(n.removeprefix("step-")))


# -- whether it is the same run --------------------------------------------------------------------------------------


def identity(accelerator: Accelerator, module: DiffusionTrainingModule, cut: Cut | None, options: TrainingOptions,
             args: Any, dataset: Any, class_dataset: Any) -> dict[str, Any]:
    """Everything that shapes the numbers of a run, flat: settings, data, files of the frozen weights.

    Names of outputs, intervals of saving and places of files are not in it: data and weights are known by what they
    hold. How long to train is in it only where the learning rate depends on it.
    """
    pipe = module.pipe
    settings = {k: v for k, v in (flat(args) | dataclasses.asdict(options)).items() if k not in MAY_CHANGE}
    settings["optimizer_args"] = sorted(options.optimizer_args)
    if options.lr_scheduler != "constant":
        settings |= {"num_epochs": options.num_epochs, "max_train_steps": options.max_train_steps}
    settings["batch_size"] = options.batch_size * accelerator.num_processes  # more ranks may take smaller batches
    settings |= dataclasses.asdict(pipe.objective)
    settings |= {"task": module.task, "mode": accelerator.mode, "device": accelerator.device,
                 "dtype": dtype_name(pipe.dtype), "fuse": module.fuse, "pipeline": type(pipe).__name__,
                 "adapter": module.adapter.name}
    data = {f"{name}.{part}": value for name, found in (("data", dataset), ("class_data", class_dataset))
            if found is not None for part, value in _content(found).items()}
    models = set(pipe.sources) if cut is None else {*cut.models("step")}
    if cut is not None and not isinstance(dataset, CachedRows):
        models |= {*cut.models("prepare")}  # otherwise the digest of the cache's rows speaks for them
    digests = {f"weights.{name}": digest for name in sorted(models) if (digest := pipe.weights_digest(name))}
    return json.loads(json.dumps(without_secrets(settings | data | digests)))


def check_same_everywhere(accelerator: Accelerator, identity: Mapping[str, Any]) -> None:
    """Refuse ranks that would not train the same: a machine may have older images, other weights, another setting.

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
    return {"rows": len(dataset), "pictures": images_of(dataset), "digest": digest}


def check_identity(checkpoint: Checkpoint, now: Mapping[str, Any], accept: Collection[str]) -> list[str]:
    """What differs between the run that saved a checkpoint and this one, and was accepted.

    Args:
        accept: names of fields; ``data`` accepts every ``data.digest``, ``data.rows`` and so on.

    Returns: a line for each field. Raises: CheckpointError listing what was not accepted; ConfigError for a name that
        is none.
    """
    check_state(checkpoint)
    # what every run had before there was a setting, so that checkpoints written then can be resumed from
    defaults = {n: SETTINGS[n].default for n in now if n in SETTINGS and SETTINGS[n].default is not dataclasses.MISSING}
    saved = json.loads(json.dumps(defaults)) | checkpoint.state["identity"]
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
            f" or accept the change by --accept_changes {','.join(names)}, or choose another output_path to start "
            "afresh with --resume none.")
    if versions() != checkpoint.state["versions"]:
        logger.warning("other versions than when %s was saved, so the same bits are not promised: %s", checkpoint.path,
                       listing(differences(checkpoint.state["versions"], versions())))
    return differences(saved, now)
