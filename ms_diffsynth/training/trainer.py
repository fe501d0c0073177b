"""The trainer: one compiled step follows the other, on rows prepared when they are needed, with hooks between."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mindspore import amp

from ms_diffsynth import runtime
from ms_diffsynth.data.loader import Batch, Loader, collate
from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import ConfigError, DataError, UserError
from ms_diffsynth.launch.worker import beat
from ms_diffsynth.nn.ema import EMA
from ms_diffsynth.pipeline import pad_prompts
from ms_diffsynth.progress import Progress
from ms_diffsynth.storage.checkpoint import Checkpoint
from ms_diffsynth.training import state
from ms_diffsynth.training.batches import Batches
from ms_diffsynth.training.distributed import Accelerator, Agreement
from ms_diffsynth.training.hooks.contract import Hook
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.optim import LearningRate, build_optimizer
from ms_diffsynth.training.options import TrainingOptions
from ms_diffsynth.training.own_forward import PRICE, NotCompilable, OwnForward
from ms_diffsynth.training.prepared import CachedRows, PreparedRows, prepare_all, unify
from ms_diffsynth.training.program_step import ModuleTrainStep, ProgramTrainStep
from ms_diffsynth.training.records import StepReport
from ms_diffsynth.training.signals import Interrupted, StopRequest, stopping_on_signals
from ms_diffsynth.training.step import StepResult
from ms_diffsynth.training.two_stage import describe_loaded

ROWS_TO_MEASURE = 16
_ANOTHER_RANK = "another rank cannot make its next batch: its message says why."


class Trainer:
    """A training run. It is complete when it is constructed: the step is built, and the state of a checkpoint is
    restored. `run` makes the steps, and prepares rows as they are needed.

    Args:
        accelerator: device, rank and mode.
        dataset, class_dataset: rows, or prepared rows; class images are those of prior preservation.
        module: what is trained.
        logger: what is written goes through it.
        options: how long, how fast, how often.
        hooks: what happens between the steps, in this order, at the end in reverse; see `training.hooks.contract.Hook`.
        identity: what a checkpoint says of the run; see `training.same_run.identity`.
        resume_from: the checkpoint to resume from.
        settings: what training_args.json should hold.

    Attributes:
        step: the training step. optimizer, ema, rate: what it uses. loader: where the batches come from.
        total: how many steps the run has. steps_per_epoch: how many of them an epoch has.
        planned: how many shapes of rows there are, each of which is a compilation; None where that is not known.
        stop: whether a signal asked to stop. failure: why there is no next step, on any rank; None while there is.
        at_exit: callbacks for when the run ends, in whatever way.

    Raises: ConfigError for impossible options; DataError for a row that is prepared here and cannot be.
    """

    def __init__(self, accelerator: Accelerator, dataset: Any, module: DiffusionTrainingModule, logger: ModelLogger,
                 options: TrainingOptions, *, class_dataset: Any = None, hooks: Sequence[Hook] = (),
                 identity: Mapping[str, Any] | None = None, resume_from: Checkpoint | None = None,
                 settings: Mapping[str, Any] | None = None):
        self.accelerator, self.module, self.logger, self.options = accelerator, module, logger, options
        self.hooks, self.identity, self.resumed_from = list(hooks), dict(identity or {}), resume_from
        self.settings = dict(settings or {})
        self.stop, self.at_exit, self.failure = StopRequest(), contextlib.ExitStack(), None
        self.draws = Draws(options.seed)
        self.progress = Progress(accelerator.is_main_process)
        self._shape = ""  # of the images of the last batch, for messages; none before the first step
        module.pipe.announce = self._announce
        self.own_forward = self._own_forward(dataset)
        self.is_eager = module.has_own_forward and self.own_forward is None
        self.cut = None if self.is_eager else self.own_forward.cut if self.own_forward else module.training_cut()
        self.dataset, self.class_dataset = self._rows(dataset, class_dataset)
        self.no_caption = self._no_caption()
        needs_buckets = options.batch_size * accelerator.num_processes > 1 or class_dataset is not None
        self.planned = None if module.has_own_forward else self.get_ready(self.row_sets, needs_buckets)
        self.loader = Loader(self.dataset, options.batch_size, seed=options.seed, class_dataset=self.class_dataset,
                             bucket_of=getattr(self.dataset, "bucket_of", None) if needs_buckets else None,
                             class_bucket_of=getattr(self.class_dataset, "bucket_of", None),
                             num_workers=options.num_workers if module.has_own_forward else 0,
                             rank=accelerator.process_index, world_size=accelerator.num_processes)
        self.steps_per_epoch = -(-len(self.loader) // options.gradient_accumulation_steps)
        self.images = options.batch_size * accelerator.num_processes
        self.total = steps_in(len(self.loader), self.images, options.gradient_accumulation_steps, options.num_epochs,
                              options.max_train_steps, resume_from)
        self.rate = LearningRate(schedule=options.lr_scheduler, base=options.learning_rate,
                                 warmup_steps=options.lr_warmup_steps, total_steps=self.total)
        self.optimizer = build_optimizer(options, module.trainable_parameters())
        self.ema = EMA(self.optimizer.parameters, options.ema_decay) if options.use_ema else None
        logger.ema, logger.keep_saved = self.ema, options.keep_saved
        how = {"loss_scaler": None if options.loss_scale == 1 else amp.StaticLossScaler(options.loss_scale),
               "max_grad_norm": options.max_grad_norm, "ema": self.ema,
               "gradient_accumulation_steps": options.gradient_accumulation_steps,
               "gradient_accumulation_kwargs": {"length_of_dataloader": len(self.loader)}}
        if self.is_eager:
            self.step = ModuleTrainStep(module, self.optimizer, **how)
        else:
            self.step = ProgramTrainStep(module, self.cut, self.optimizer, **how, mode=accelerator.mode,
                                         planned_compilations=self.planned, announce=self._announce)
        self._has_told_time = False
        self.report = StepReport(logger, self.progress, self.step, self.dataset, self.class_dataset,
                                 module.pipe.medium)
        if resume_from is not None:
            self.restore(resume_from)
        self.progress.say(self._describe())

    # -- before the first step -----------------------------------------------------------------------------------

    def _rows(self, dataset: Any, class_dataset: Any) -> tuple[Any, Any]:
        """The rows as the step takes them, prepared when they are asked for; of a module with its own forward as they
        are.
        """
        weight = self.module.pipe.objective.prior_loss_weight
        if class_dataset is None and weight is not None:
            raise ConfigError(f"prior_loss_weight={weight}, but there are no class images: half of every batch would "
                              "be taken for them. Give class_dataset, or set prior_loss_weight to None.")
        if class_dataset is not None and weight is None:
            raise ConfigError("class_dataset is given, but the objective has no prior_loss_weight: the class images "
                              "would be trained on like any other. Set Objective(prior_loss_weight=1.0), or leave them "
                              "out.")
        self.row_sets: dict[str, PreparedRows] = {}
        if self.module.has_own_forward:
            return dataset, class_dataset
        self.module.texts = None
        sets = [d if d is None or isinstance(d, PreparedRows) else PreparedRows(d, self.module, self.cut)
                for d in (dataset, class_dataset)]
        self.row_sets = {name: rows for name, rows in zip(("instance", "class"), sets) if rows is not None}
        if not isinstance(sets[0], CachedRows):
            self.module.pipe.compile_to_prepare(self.cut.prepare, sum(d.rows for d in self.row_sets.values()))
        return sets[0], sets[1]

    def _no_caption(self) -> dict[str, Any]:
        """What the step takes of an empty prompt, for caption dropout. Raises: ConfigError where that cannot be."""
        if self.options.caption_dropout is None:
            return {}
        setting = f"caption_dropout={self.options.caption_dropout}"
        if self.module.has_own_forward:
            raise ConfigError(f"{setting} with {type(self.module).__name__}.forward: a forward of your own reads the "
                              "prompts itself. Leave some of them empty there, and remove caption_dropout.")
        pipe = self.module.pipe
        found = self.module.prepare_prompt("", self.cut) if "prompt" in pipe.inputs else {}
        if not found:
            raise ConfigError(f"{setting}: nothing that {type(pipe).__name__} is trained on here depends on the prompt "
                              "alone. Remove the setting.")
        if isinstance(self.dataset, CachedRows):  # nothing else is prepared
            pipe.unload_models(set(self.cut.models("prepare")) - set(self.cut.models("step")))
        return found

    def _own_forward(self, dataset: Any) -> OwnForward | None:
        """The module's own forward, compiled. None where it has none, in PyNative, and where that cannot be: the price
        is said.
        """
        if not self.module.has_own_forward or self.accelerator.mode != "graph":
            return None
        beat(0, "prepare")
        try:
            return OwnForward(self.module, dataset[0])
        except NotCompilable as reason:
            self.progress.say(f"{type(self.module).__name__}.forward is not compiled: {reason}; {PRICE}.")
            return None

    def get_ready(self, sets: Mapping[str, PreparedRows], needs_buckets: bool = True) -> int | None:
        """Prepare rows now where it must be known before the first step what they hold: values of a template, whose
        dtype all rows decide, and shapes that do not follow from headers and tokens. Others are prepared when they are
        needed.

        Returns: how many shapes of rows there are; None where that is not known.
        """
        for name, rows in sets.items():
            rows.keep_in(self.logger.output_path / state.PREPARED / f"{name}-{self.accelerator.process_index}")
            self.at_exit.callback(rows.close)
        is_first = any(rows.has_values or (needs_buckets and not rows.foresees_buckets) for rows in sets.values())
        if is_first:
            beat(0, "prepare")
            prepare_all(list(sets.values()), self.progress)
        unify(list(sets.values()))
        is_cheap = all(rows.foresees_buckets and not rows.has_lengths for rows in sets.values())
        if not (is_first or needs_buckets or is_cheap):
            return None
        return len({rows.bucket_of(row) for rows in sets.values() for row in range(rows.rows)})

    def _batches_of_step(self) -> int:
        """How many batches the next step takes: fewer than the others at the end of an epoch."""
        left = len(self.loader) - self.step.batches % len(self.loader)
        return min(left, self.options.gradient_accumulation_steps)

    def _describe(self) -> str:
        """What is about to be trained, in one line."""
        count, tensors = sum(p.size for p in self.optimizer.parameters), len(self.optimizer.parameters)
        where = "eagerly, by the module's own forward" if self.is_eager else f"in {self.accelerator.mode} mode"
        where += ", by the module's own forward" if self.own_forward else ""
        ranks = self.accelerator.num_processes
        by = f" with {runtime.kernels().split()[0]} kernels" if runtime.kernels() else ""
        return (f"training {count:,} parameters in {tensors} tensor{'s' if tensors > 1 else ''} {where} on "
                f"{self.accelerator.device}{by}{f', {ranks} ranks' if ranks > 1 else ''}: {self.total} steps, "
                f"{len(self.loader)} batches per epoch")

    def _announce(self, name: str, shapes: str) -> Callable[[float], None]:
        beat(self.logger.num_steps + 1, "compile")
        for compiled in self.step.compiled_steps.values() if self._shape else ():  # rows are prepared before
            if compiled.name == name and self.planned != 1:
                which = "" if self.planned is None else f" {compiled.compilations + 1} of {self.planned}"
                name = f"{name}{which} ({self._shape})"
                break
        return self.progress.announce(name, shapes)

    def _shape_of(self, batch: Batch) -> str:
        """``768 x 512``, or ``768 x 512, 128 tokens`` where prompts are padded: what decides of a compilation."""
        item = batch.items[0]
        if self.is_eager or not hasattr(item, "bucket"):
            return ""
        padded = self.module.pipe.padded_slots and len(item.bucket) > len(item.size)
        sides = " x ".join(str(side) for side in (*item.size[:-2], item.size[-1], item.size[-2]))
        return f"{sides}, {item.bucket[len(item.size)]} tokens" if padded else sides

    def restore(self, checkpoint: Checkpoint) -> None:
        """Weights, moments, and the place in the data: an epoch's begin if its place is no longer in the epoch."""
        found = checkpoint.state
        state.restore(self.step, checkpoint, self.identity)
        epoch, position = place_in(len(self.loader), self.images, checkpoint)
        self.loader.seek(epoch * len(self.loader) + position)
        self.step.batches = self.loader.step
        self.report.skipped, self.report.skipped_in_a_row = found["skipped"], found["skipped_in_a_row"]

    # -- the steps -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Make all steps that are left. Raises: Stopped after a signal, when all is saved; TrainingError after 20
        non-finite steps in a row; when all is saved, DataError or CacheError for a row that cannot be prepared.
        """
        logger, done = self.logger, self.resumed_from.step if self.resumed_from else 0
        if done >= self.total:
            logger.num_steps, logger.checkpoint = done, self.resumed_from.path
            logger.restore(self.resumed_from.state)
            self.at_exit.close()
            self.progress.say(f"nothing left to do: the run has {done} of {self.total} steps. To train on, raise "
                              "num_epochs or max_train_steps.")
            return
        self.batches = Batches(self.loader, self.inputs)
        beat(0, "prepare")
        self.batches.load(self._batches_of_step())  # nothing is written before that is known to go well
        if Agreement(self.stop, self.accelerator)(self.batches.failure is not None):
            self.batches.close()
            self.at_exit.close()
            raise self.batches.failure or DataError(_ANOTHER_RANK)
        logger.start(self.settings, done, self.resumed_from and state.run_folder(self.resumed_from))
        with self.at_exit, stopping_on_signals(self.options.grace_seconds) as self.stop:
            self.at_exit.callback(self.progress.end)
            is_stopping = Agreement(self.stop, self.accelerator)
            self.at_exit.callback(self.batches.close)
            try:
                for hook in self.hooks:
                    hook.start(self)
                self.progress.begin(self.total, "training", "step", done=done)
                while not self.is_done:
                    self.batches.load(self._batches_of_step())
                    if is_stopping(self.batches.failure is not None):
                        break
                    while not self.train_on(*self.batches.next()):
                        pass
                    self._tell_time_to_prepare()
                    for hook in self.hooks:
                        hook.after_step(self)
                    logger.refresh_report()
                if is_stopping.is_failed:
                    self.failure = self.batches.failure or DataError(_ANOTHER_RANK)
                elif self.is_done:
                    is_stopping()  # also after the last step
                self.report.flush()
                self.progress.end()
                for hook in reversed(self.hooks):
                    hook.end(self)
                if self.failure is not None:
                    self.progress.say(f"stopped after step {logger.num_steps} of {self.total}, which is saved: a row "
                                      "cannot be prepared. When it is put right, continue by --resume auto "
                                      "--accept_changes data")
                    raise self.failure
                self._finish() if self.stop.signal is None else self._tell_stopped()
            except UserError as error:
                logger.event("stopped", reason=str(error))
                raise

    @property
    def is_done(self) -> bool:
        """Whether all steps are made."""
        return self.logger.num_steps >= self.total

    @property
    def is_epoch_end(self) -> bool:
        """Whether the last batch was the last one of an epoch."""
        return self.step.batches % len(self.loader) == 0

    @property
    def epoch(self) -> int:
        """The epoch of the last batch; the first one is 0."""
        return (self.step.batches - 1) // len(self.loader)

    def train_on(self, batch: Batch, inputs: Any) -> bool:
        """Train on a batch. Returns: whether that completed a step."""
        logger, report = self.logger, self.report
        beat(logger.num_steps + 1)
        report.begin()
        rate = self.rate(logger.num_steps)
        self.optimizer.set_learning_rate(rate)
        result = self.compute(batch, inputs)
        report.add(result, batch, len(batch.indices) * self.accelerator.num_processes)
        if not (result.is_update and logger.num_steps + 1 >= self.total):
            self.batches.ahead()  # while the device is at work
        if result.is_update:
            report.flush()  # read the step before this one: the device has had a step's time to finish it
            logger.on_step_end(self.accelerator, self.module, self.options.save_steps)
            report.end(result, {"step": logger.num_steps, "epoch": self.epoch, "learning_rate": rate})
        return result.is_update

    def compute(self, batch: Batch, inputs: Any = None) -> StepResult:
        """One micro-step on a batch, and nothing else."""
        inputs = self.inputs(batch) if inputs is None else inputs
        self._shape = self._shape_of(batch)
        if not self.is_eager:
            return self.step.step(*inputs)
        pipe, random = self.module.pipe, self.module.pipe.random

        def begin(k: int) -> None:
            pipe.random = self.draws.of(batch.sample_indices[k : k + 1])

        try:
            return self.step.step_rows(inputs, begin)
        finally:
            pipe.random = random

    def inputs(self, batch: Batch) -> list[Any]:
        """The cut's cache slots, collated, and its draws, in the order of the step's inputs; of an eager module the
        rows themselves.
        """
        if self.is_eager:
            return batch.items
        pipe, random = self.module.pipe, self.draws.of(batch.sample_indices)
        if self.own_forward is not None:
            randoms = [self.draws.of(number) for number in batch.sample_indices[:, None]]
            slots = self.own_forward.slots(batch.items, randoms)
            shape = self.own_forward.latent_shape(slots)
        else:
            rows = [item.slots for item in batch.items]
            if self.no_caption:
                draw = random("caption_draw", "uniform", (len(rows),))
                rows = [self._without_caption(row) if value < self.options.caption_dropout else row
                        for row, value in zip(rows, draw)]
            slots = collate(rows)
            shape = pipe.latent_shape(*batch.items[0].size)
        for name in self.cut.draws:
            slots[name] = pipe.objective.draw(name, (len(batch.items), *shape), len(pipe.sigmas), random)
        return [runtime.to_device(slots[name]) for name in (*self.cut.cache, *self.cut.draws)]

    def _without_caption(self, slots: Mapping[str, Any]) -> dict[str, Any]:
        """The slots of a row with those of an empty prompt, as long as its own."""
        pipe = self.module.pipe
        length = max((len(slots[name]) for name in pipe.padded_slots if name in slots), default=0)
        return {**slots, **pad_prompts(pipe, self.no_caption, length)[0]}

    @contextlib.contextmanager
    def looking(self) -> Iterator[bool]:
        """For work of the first rank that looks at the weights, or at their moving average, and changes nothing.

        Yields whether to do it: not on another rank, nor after a signal; a signal inside the block ends it. A run that
        is resumed does it then. Every rank must enter: what is pending is reported first, and may end the run.
        """
        self.report.flush()
        if not self.accelerator.is_main_process or self.stop.signal is not None or self.failure is not None:
            yield False
            return
        beat(self.logger.num_steps + 1, "looking")
        try:
            with self.ema.applied() if self.ema is not None else contextlib.nullcontext(), self.stop.interrupting():
                yield True
        except Interrupted:
            self.progress.say("given up: a signal came")

    def _tell_time_to_prepare(self) -> None:
        """Say how long preparing takes, measured on the first rows, once and only where there are many."""
        sets = [rows for rows in self.row_sets.values() if not isinstance(rows, CachedRows)]
        made = sum(rows.made for rows in sets)
        if self._has_told_time or made <= ROWS_TO_MEASURE:
            return
        self._has_told_time = True
        rows, share = sum(rows.rows for rows in sets), self.accelerator.num_processes
        each = sum(rows.seconds for rows in sets) / (made - len(sets))
        left = (rows / share - made) * each
        if rows / share > 2 * ROWS_TO_MEASURE and left > 0:
            self.progress.say(f"preparing {rows} rows as they are needed, about {_time(each)} each"
                              f"{f', {share} ranks' if share > 1 else ''}: the first epoch takes about {_time(left)} "
                              "longer than later ones")

    # -- after the steps ------------------------------------------------------------------------------------------

    def _tell_stopped(self) -> None:
        name = self.stop.signal.name
        self.logger.event("stopped", reason=name)
        then = (f"resume from {self.logger.checkpoint} with --resume auto" if self.logger.checkpoint else
                "with checkpoint_steps=0 it cannot be resumed here")
        self.progress.say(f"stopped by {name} after step {self.logger.num_steps} of {self.total}: {then}")

    def _finish(self) -> None:
        logger, step, skipped = self.logger, self.step, self.report.skipped
        peak = runtime.peak_memory_bytes()
        logger.event("end", compilations=step.compilations, compile_seconds=round(step.compile_seconds, 2),
                     skipped=skipped, peak_memory_gib=round(peak / 2**30, 2))
        passed_over = f", {skipped} skipped as non-finite" if skipped else ""
        compiled = (f"; the step was compiled {step.compilations} time(s), {step.compile_seconds:.1f} s"
                    if self.accelerator.mode == "graph" and not self.is_eager else "")
        self.progress.say(f"trained {logger.num_steps} steps{passed_over}{compiled}; "
                          f"peak memory {runtime.memory_text(peak)}; loaded: {describe_loaded(self.module.pipe)}")
        folder = logger.output_path
        pictures = ("loss.png", "samples/before_after.png", "samples/before_after.webp")
        for path in [*logger.saved[-1:], *(folder / name for name in pictures)]:
            if path.exists():
                self.progress.say(f"  {path}")


def steps_in(batches: int, images: int, accumulation: int, num_epochs: int | None, max_train_steps: int | None,
             checkpoint: Checkpoint | None = None) -> int:
    """How many steps a run has, those before its checkpoint included. An epoch that is done stays done, whatever batch
    size and data were then.

    Args:
        batches: in an epoch. images: in a batch, over all ranks. accumulation: batches to a step.
    """
    ends = [] if max_train_steps is None else [max_train_steps]
    if num_epochs is not None:
        done, epoch, position = 0, 0, 0
        if checkpoint is not None:
            done, (epoch, position) = checkpoint.step, place_in(batches, images, checkpoint)
        left = -(-(batches - position) // accumulation) + (num_epochs - epoch - 1) * -(-batches // accumulation)
        ends.append(done + max(left, 0))
    return min(ends)


def place_in(batches: int, images: int, checkpoint: Checkpoint) -> tuple[int, int]:
    """Epoch and batch in it where a run continues after a checkpoint: at the same images, if batches have another size.

    Args:
        batches: in an epoch. images: in a batch, over all ranks.
    """
    found, before = checkpoint.state, checkpoint.state["identity"].get("batch_size")
    position = found["position"] * before // images if before else found["position"]
    return found["epoch"], min(position, batches)


def _time(seconds: float) -> str:
    """``6 ms``, ``12 s``, ``5 min`` or ``3.2 h``."""
    for unit, size, most in (("ms", 1e-3, 1), ("s", 1, 100), ("min", 60, 6000)):
        if seconds < most:
            return f"{seconds / size:.2g} {unit}" if seconds < 10 * size else f"{seconds / size:.0f} {unit}"
    return f"{seconds / 3600:.1f} h"
