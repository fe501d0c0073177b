"""Replay: one recorded step of a run again, to the bit; and where it stopped being finite, when it did.

A step depends on the checkpoint before it, the order of the data and the draws, and all three come from the run's
folder and the seed. So the steps from the last checkpoint on are made as they were, in the run's own mode. A step that
is not finite is then made once more, eagerly, under `debug.probes`.
"""
from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import Tensor

from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.config import flat
from ms_diffsynth.data.loader import Batch
from ms_diffsynth.data.paths import path_problem
from ms_diffsynth.debug.probes import MOST, Finding, Probes
from ms_diffsynth.errors import CheckpointError, ConfigError, listing
from ms_diffsynth.formats.json_text import NotJSON, parse_json, read_json, shown
from ms_diffsynth.nn.names import load_state, to_numpy
from ms_diffsynth.redact import without_secrets
from ms_diffsynth.run.build import DataSets
from ms_diffsynth.run.task import rows_of_run
from ms_diffsynth.storage.checkpoint import Checkpoint, differences, latest, open_checkpoint_folder
from ms_diffsynth.storage.files import write_file
from ms_diffsynth.storage.lock import lock_folder
from ms_diffsynth.training import same_run
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.logger import ModelLogger, _text
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.options import TrainingOptions
from ms_diffsynth.training.prepared import CachedRows, name_row, prepare_row, rows_of
from ms_diffsynth.training.records import numbers_of
from ms_diffsynth.training.state import CHECKPOINTS, parameters_of, run_folder, versions
from ms_diffsynth.training.trainer import Trainer

logger = logging.getLogger(__name__)

COMPARED = ("loss", "learning_rate", "grad_norm", "is_skipped")  # columns of loss.csv


@dataclass(frozen=True, kw_only=True)
class Replay:
    """What a replayed step gave.

    Attributes:
        after: the step whose state it was made from; 0 for the initial weights. start: that state, in words.
        mode: the run's own.
        recorded, found: the numbers of the step in loss.csv, and now; texts, as they are written there.
        compared: how many steps on the way to it, and itself, loss.csv has. differences: every number of these that is
            not the recorded one.
        rows: of each micro-step, see `training.prepared.rows_of`.
        eager: the numbers of the step made eagerly; None when it was finite. findings: what was not finite in that.
    """

    step: int
    after: int
    start: str
    mode: str
    recorded: dict[str, str]
    found: dict[str, str]
    compared: int
    differences: list[str]
    rows: list[list[dict[str, Any]]]
    eager: dict[str, str] | None
    findings: list[Finding]

    @property
    def is_finite(self) -> bool:
        """Whether the step was finite, as the guard of the training step sees it."""
        return self.found["is_skipped"] == "0"

    @property
    def is_reproduced(self) -> bool:
        """Whether every number is the recorded one, to the bit."""
        return not self.differences

    def record(self) -> dict[str, Any]:
        """Everything as JSON values."""
        findings = [dataclasses.asdict(f) | {"rows": self._rows_of(f)} for f in self.findings]
        own = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return own | {"is_finite": self.is_finite, "is_reproduced": self.is_reproduced, "findings": findings,
                      "versions": versions()}

    def describe(self) -> str:
        """The same for a reader."""
        state = "finite" if self.is_finite else "not finite, so it changed nothing"
        lines = [f"step {self.step} in {self.mode} mode, from {self.start}",
                 f"  loss {self.found['loss']}, gradient norm {self.found['grad_norm']}: {state}"]
        if self.is_reproduced:
            others = self.compared - 1
            way = f", and so are {others} steps on the way to it" if others > 1 else ", and so is the step before it"
            lines.append(f"  equal to loss.csv to the bit{way if others else ''}")
        lines += [f"  differs from loss.csv: {line}" for line in self.differences[:10]]
        for number, rows in enumerate(self.rows, 1):
            which = f"micro-step {number}" if len(self.rows) > 1 else "rows"
            lines.append(f"  {which}: {listing(map(name_row, rows))}")
        if self.findings:
            first, *others = self.findings
            lines += [f"first not finite, when it is run eagerly: {first.describe()}", f"  {first.statistics()}"]
            if first.name == "gradient norm":
                lines.append("  every gradient is finite, the sum of their squares is not")
            if rows := self._rows_of(first):
                lines.append(f"  in {listing(map(name_row, rows))}")
            lines += [f"  then {finding.describe()}" for finding in others[:3]]
        elif self.eager is not None:
            lines.append(f"run eagerly, all of it is finite (loss {self.eager['loss']}, gradient norm "
                         f"{self.eager['grad_norm']}): a number is at the edge of its range, and the modes round "
                         "differently")
        return "\n".join(lines)

    def _rows_of(self, finding: Finding) -> list[dict[str, Any]]:
        return [self.rows[finding.micro_step - 1][row] for row in finding.rows]


def replay_training_step(accelerator: Accelerator, dataset: Any, model: DiffusionTrainingModule,
                         output_path: str | Path, step: int, class_dataset: Any = None, args: Any = None,
                         **options: Any) -> Replay:
    """Make step ``step`` of the run in ``output_path`` again, and write ``replay-step-N.json`` there, nothing else.

    Args:
        step: counted from 1, as in loss.csv.
        accelerator, dataset, model, class_dataset, args, options: what `launch_training_task` was given.

    ``model`` must be as it was when the run began; afterwards it has the weights of the step.

    Returns: the result. Raises: ConfigError for an unknown run or step; OutputError when the run is still running;
        CheckpointError when it cannot be this run, or when nothing is left that it can start from.
    """
    folder = Path(output_path)
    if accelerator.num_processes > 1:
        raise ConfigError(f"a replay in {accelerator.num_processes} processes: expected one. Give it the batch_size of "
                          "all ranks of the run.")
    if not (folder / "loss.csv").is_file():
        raise ConfigError(f"{folder} does not contain a run: loss.csv is missing. Give the output_path of a run.")
    given = TrainingOptions.of(args, {"gradient_accumulation_steps": accelerator.gradient_accumulation_steps} | options)
    with lock_folder(folder):
        recorded = _recorded(folder)
        if step not in recorded:
            known = f"{min(recorded)} to {max(recorded)}" if recorded else "none"
            raise ConfigError(f"step={step}: {folder / 'loss.csv'} has the steps {known}. Expected one of them.")
        records = ModelLogger(folder)
        records.is_writing = False
        sets = rows_of_run(accelerator, model, records, DataSets(dataset, class_dataset), args)
        cut = None if model.has_own_forward else model.training_cut()
        identity = same_run.identity(accelerator, model, cut, given, args, sets.instance, sets.classes)
        checkpoint = find_start(folder, step)
        _check_same(identity, given, accelerator, folder, checkpoint, args)
        trainer = Trainer(accelerator, sets.instance, model, records, given, class_dataset=sets.classes,
                          identity=identity, resume_from=checkpoint)
        try:
            replay = _replay(trainer, recorded, step, checkpoint)
        finally:
            trainer.progress.end()
            trainer.at_exit.close()
        write_file(folder / f"replay-step-{step}.json", (json.dumps(without_secrets(replay.record()), indent=1)
                                                         + "\n").encode())
    return replay


def find_start(folder: Path, step: int) -> Checkpoint | None:
    """The newest sound checkpoint before a step, also that of another run from which this one was resumed.

    Returns: None for a run that began at its first step, and has none. Raises: CheckpointError when there is none, and
        the run began later.
    """
    names = [name for name in same_run.checkpoints_in(folder) if int(name.removeprefix("step-")) < step]
    for name in reversed(names):
        try:
            return open_checkpoint_folder(folder / CHECKPOINTS / name)
        except CheckpointError as error:
            logger.warning("checkpoint skipped: %s", error)
    events = folder / "events.jsonl"
    first = events.read_text(errors="replace").partition("\n")[0] if events.is_file() else ""
    try:
        other = parse_json(first).get("checkpoint") if first else None  # of another run, which this one continued
    except NotJSON as error:
        raise CheckpointError(f"{events} line 1 {error}: expected an event of the run. Copy the run's folder "
                              "again.") from None
    if other is not None and (not isinstance(other, str) or path_problem(other)):
        raise CheckpointError(f"{events} line 1 names the checkpoint {shown(other)}: expected a path. Copy the run's "
                              "folder again.")
    if other is None:
        return None
    found = open_checkpoint_folder(other)
    if found.step >= step:
        raise CheckpointError(f"the run in {folder} was resumed from {other}, so step {step} is not its own. Replay it "
                              f"in {run_folder(found)}.")
    return found


def _recorded(folder: Path) -> dict[int, dict[str, str]]:
    """The rows of loss.csv by step; one that was torn is left out."""
    with open(folder / "loss.csv", newline="", encoding="utf-8", errors="replace") as file:
        try:
            rows = list(csv.DictReader(line.replace("\0", "") for line in file))
        except csv.Error as error:
            raise ConfigError(f"{folder / 'loss.csv'} is not the record of a run ({error}). Copy the run's folder "
                              "again.") from None
    sound = [row for row in rows if None not in row and None not in row.values() and {"step", *COMPARED} <= row.keys()
             and row["step"].isascii() and row["step"].isdigit() and len(row["step"]) < 12]
    return {int(row["step"]): {name: row[name] for name in COMPARED} for row in sound}


def settings_of(folder: Path) -> dict[str, Any]:
    """What training_args.json of a run says; nothing where there is none. Raises: ConfigError when it is damaged."""
    file = folder / "training_args.json"
    if not file.is_file():
        return {}
    remedy = "Copy the run's folder again, or remove the file: then it is taken for a run of one process."
    found = read_json(file, ConfigError, remedy)
    wrong = [f"{name}={shown(found[name])}" for name in ("num_processes", "batch_size") if name in found
             and not (type(found[name]) is int and 0 < found[name] <= 65536)]
    if wrong:
        raise ConfigError(f"{file} says {listing(wrong)}: expected whole numbers from 1. {remedy}")
    return found


def _check_same(identity: Mapping[str, Any], options: TrainingOptions, accelerator: Accelerator, folder: Path,
                checkpoint: Checkpoint | None, args: Any) -> None:
    """Refuse what was not this run. Without any checkpoint only the settings can be compared.

    Raises: CheckpointError, field by field.
    """
    known = checkpoint or latest(folder / CHECKPOINTS)
    if known is not None:
        same_run.check_identity(known, identity, options.accept_changes)
        return
    own = {**flat(args), **dataclasses.asdict(options), "mode": accelerator.mode, "device": accelerator.device}
    now = json.loads(json.dumps(without_secrets({k: v for k, v in own.items() if k not in same_run.MAY_CHANGE})))
    saved = settings_of(folder)
    saved["batch_size"] = saved.get("batch_size", options.batch_size) * saved.get("num_processes", 1)
    changed = differences({k: v for k, v in saved.items() if k in now}, {k: v for k, v in now.items() if k in saved},
                          options.accept_changes)
    if changed:
        raise CheckpointError(f"{folder} was trained with other settings:\n  " + "\n  ".join(changed) + "\nSet them "
                              "back.")


def _replay(run: Trainer, recorded: Mapping[int, dict[str, str]], step: int, checkpoint: Checkpoint | None) -> Replay:
    """The steps up to ``step``, and that one under probes when it was not finite."""
    after = 0 if checkpoint is None else checkpoint.step
    batches = itertools.chain.from_iterable(itertools.repeat(run.loader))
    scales = parameters_of(run.step).get("loss_scale", {})
    wrong: list[str] = []
    run.progress.begin(step - after, "replaying", "step")
    for number in range(after + 1, step + 1):
        seen, kept = run.step.batches, {name: to_numpy(scale) for name, scale in scales.items()}
        used, found = _make_step(run, number, batches)
        wrong += [f"step {number}: {name} {found[name]}, recorded {value}"
                  for name, value in recorded.get(number, {}).items() if found[name] != value]
        run.progress.advance(loss=found["loss"])
    run.progress.end()
    eager, findings = None, []
    if found["is_skipped"] == "1":  # the guard left weights and moments as they were
        load_state(scales, kept)
        run.step.batches = seen
        eager, findings = _look_inside(run, used)
    start = "the initial weights"
    if checkpoint is not None:
        is_own = run_folder(checkpoint).resolve() == run.logger.output_path.resolve()
        start = f"{CHECKPOINTS}/{checkpoint.path.name}" if is_own else str(checkpoint.path)
    return Replay(step=step, after=after, start=start,
                  mode="pynative" if run.is_eager else run.accelerator.mode, recorded=recorded[step], found=found,
                  compared=sum(number in recorded for number in range(after + 1, step + 1)), differences=wrong,
                  rows=[rows_of(batch, run.dataset, run.class_dataset) for batch in used], eager=eager,
                  findings=findings)


def _make_step(run: Trainer, number: int, batches: Iterator[Batch]) -> tuple[list[Batch], dict[str, str]]:
    """The next step as training makes it: the batches it took, and its numbers as loss.csv writes them."""
    rate = run.rate(number - 1)
    run.optimizer.set_learning_rate(rate)
    used, results = [], []
    while not (results and results[-1].is_update):
        used.append(next(batches))
        results.append(run.compute(used[-1]))
    numbers = numbers_of(results[-1], [result.loss for result in results]) | {"learning_rate": rate}
    return used, {name: _text(numbers[name]) for name in COMPARED}


def _look_inside(run: Trainer, batches: list[Batch]) -> tuple[dict[str, str], list[Finding]]:
    """Make a step once more, eagerly and under probes. Returns: its numbers, and what was not finite in it."""
    step, pipe = run.step, run.module.pipe
    units = run.cut.step if run.cut is not None else (*pipe.units, pipe.denoise)
    probes = Probes(units, pipe.models, step.weights)

    def forward(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        outputs = step._scaled_forward(inputs)
        probes.row = None
        probes.look("loss", outputs[1])
        probes.look("scaled loss", outputs[0])
        probes.end_forward()
        return outputs

    if run.is_eager:
        own_forward = run.module.forward

        def counted(data: Any) -> Tensor:  # it takes one row after the other: the probes are told at which it is
            probes.row = 0 if probes.row is None else probes.row + 1
            return own_forward(data)

        run.module.forward = counted
    step.value_and_grad = ms.value_and_grad(forward, None, step.weights, has_aux=True)
    step.compiled_steps = {"update": CompiledStep(step._update, "the step under probes", "pynative"),
                           "micro": CompiledStep(step._accumulate, "the accumulation under probes", "pynative")}
    results = []
    with probes:
        for batch in batches:
            probes.begin(len(batch.indices))
            results.append(run.compute(batch))
        probes.look("gradient norm", results[-1].grad_norm)
    numbers = numbers_of(results[-1], [result.loss for result in results])
    return {name: _text(value) for name, value in numbers.items()}, _from_prepare(run, batches, probes.findings)


def _from_prepare(run: Trainer, batches: list[Batch], findings: list[Finding]) -> list[Finding]:
    """The findings, with those of preparing its row in front when the first one came out of the prepared half."""
    first = findings[0] if findings else None
    if first is None or run.cut is None or first.module or first.tensor != "input" or first.name not in run.cut.cache:
        return findings
    batch, position = batches[first.micro_step - 1], first.rows[0]
    half = len(batch.indices) if run.class_dataset is None else len(batch.indices) // 2
    rows = run.dataset if position < half else run.class_dataset
    if isinstance(rows, CachedRows) or run.own_forward is not None:
        return findings
    with Probes(run.cut.prepare, run.module.pipe.models) as probes:
        probes.begin(1)
        run.module.texts = None  # what was kept of a text is computed again too
        prepare_row(rows.dataset, int(batch.indices[position]) % rows.rows, run.module, run.cut)
    before = [dataclasses.replace(f, micro_step=first.micro_step, rows=(position,)) for f in probes.findings]
    return (before + findings)[:MOST]
