"""The trainer: rows are prepared once, then one compiled step follows the other, with hooks between them."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mindspore import amp

from ms_diffsynth import runtime
from ms_diffsynth.data.loader import Batch, Loader, collate
from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import ConfigError, UserError
from ms_diffsynth.launch.worker import beat
from ms_diffsynth.nn.ema import EMA
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
from ms_diffsynth.training.prepared import CachedRows, PreparedRows, prepare_all
from ms_diffsynth.training.program_step import ModuleTrainStep, ProgramTrainStep
from ms_diffsynth.training.progress import Progress
from ms_diffsynth.training.records import StepReport
from ms_diffsynth.training.signals import Interrupted, StopRequest, stopping_on_signals
from ms_diffsynth.training.step import StepResult
from ms_diffsynth.training.two_stage import describe_loaded


class Trainer:
    """A training run. It is complete when it is constructed: rows are prepared, the step is built, and the state of a
    checkpoint is restored. `run` makes the steps.

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
        stop: whether a signal asked to stop. at_exit: callbacks for when the run ends, in whatever way.

    Raises: ConfigError for impossible options; DataError for a row that cannot be prepared.
    """

    def __init__(self, accelerator: Accelerator, dataset: Any, module: DiffusionTrainingModule, logger: ModelLogger,
                 options: TrainingOptions, *, class_dataset: Any = None, hooks: Sequence[Hook] = (),
                 identity: Mapping[str, Any] | None = None, resume_from: Checkpoint | None = None,
                 settings: Mapping[str, Any] | None = None):
        self.accelerator, self.module, self.logger, self.options = accelerator, module, logger, options
        self.hooks, self.identity, self.resumed_from = list(hooks), dict(identity or {}), resume_from
        self.settings = dict(settings or {})
        self.stop, self.at_exit = StopRequest(), contextlib.ExitStack()
        self.draws = Draws(options.seed)
        self.progress = Progress(accelerator.is_main_process)
        module.pipe.announce = self._announce
        self.own_forward = self._own_forward(dataset)
        self.is_eager = module.has_own_forward and self.own_forward is None
        self.cut = None if self.is_eager else self.own_forward.cut if self.own_forward else module.training_cut()
        self.dataset, self.class_dataset = self._prepared(dataset, class_dataset)
        self.loader = Loader(self.dataset, options.batch_size, seed=options.seed, class_dataset=self.class_dataset,
                             bucket_of=getattr(self.dataset, "bucket_of", None),
                             class_bucket_of=getattr(self.class_dataset, "bucket_of", None),
                             num_workers=options.num_workers if module.has_own_forward else 0,
                             rank=accelerator.process_index, world_size=accelerator.num_processes)
        self.steps_per_epoch = -(-len(self.loader) // options.gradient_accumulation_steps)
        by_epochs = None if options.num_epochs is None else options.num_epochs * self.steps_per_epoch
        self.total = min(n for n in (by_epochs, options.max_train_steps) if n is not None)
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
            buckets = (None if self.own_forward else  # it may crop and pad as it likes
                       len({self.dataset.bucket_of(row) for row in range(self.dataset.rows)}))
            self.step = ProgramTrainStep(module, self.cut, self.optimizer, **how, mode=accelerator.mode,
                                         planned_compilations=buckets, announce=self._announce)
        self.report = StepReport(logger, self.progress, self.step, self.dataset, self.class_dataset)
        if resume_from is not None:
            self.restore(resume_from)
        self.progress.say(self._describe())

    # -- before the first step -----------------------------------------------------------------------------------

    def _prepared(self, dataset: Any, class_dataset: Any) -> tuple[Any, Any]:
        """The rows as the step takes them; of a module with its own forward as they are."""
        weight = self.module.pipe.objective.prior_loss_weight
        if class_dataset is None and weight is not None:
            raise ConfigError(f"prior_loss_weight={weight}, but there are no class images: half of every batch would "
                              "be taken for them. Give class_dataset, or set prior_loss_weight to None.")
        if class_dataset is not None and weight is None:
            raise ConfigError("class_dataset is given, but the objective has no prior_loss_weight: the class images "
                              "would be trained on like any other. Set Objective(prior_loss_weight=1.0), or leave them "
                              "out.")
        if self.module.has_own_forward:
            return dataset, class_dataset
        beat(0, "prepare")
        sets = [d if d is None or isinstance(d, PreparedRows) else PreparedRows(d, self.module, self.cut)
                for d in (dataset, class_dataset)]
        rows = [d for d in sets if d is not None]
        if not isinstance(rows[0], CachedRows):
            self.module.pipe.compile_to_prepare(self.cut.prepare, sum(d.rows for d in rows))
        prepare_all(rows, self.progress)
        return sets[0], sets[1]

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

    def _describe(self) -> str:
        """What is about to be trained, in one line."""
        count, tensors = sum(p.size for p in self.optimizer.parameters), len(self.optimizer.parameters)
        where = "eagerly, by the module's own forward" if self.is_eager else f"in {self.accelerator.mode} mode"
        where += ", by the module's own forward" if self.own_forward else ""
        ranks = self.accelerator.num_processes
        return (f"training {count:,} parameters in {tensors} tensor{'s' if tensors > 1 else ''} {where} on "
                f"{self.accelerator.device}{f', {ranks} ranks' if ranks > 1 else ''}: {self.total} steps, "
                f"{len(self.loader)} batches per epoch")

    def _announce(self, name: str, shapes: str) -> Callable[[float], None]:
        beat(self.logger.num_steps + 1, "compile")
        return self.progress.announce(name, shapes)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Weights, moments, and the place in the data: an epoch's begin if its place is no longer in the epoch."""
        found = checkpoint.state
        state.restore(self.step, checkpoint, self.identity)
        self.loader.seek(found["epoch"] * len(self.loader) + min(found["position"], len(self.loader)))
        self.step.batches = self.loader.step
        self.report.skipped, self.report.skipped_in_a_row = found["skipped"], found["skipped_in_a_row"]

    # -- the steps -----------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Make all steps that are left. Raises: Stopped after a signal, when all is saved; TrainingError after 20
        non-finite steps in a row.
        """
        logger, done = self.logger, self.resumed_from.step if self.resumed_from else 0
        logger.start(self.settings, done, self.resumed_from and state.run_folder(self.resumed_from))
        with self.at_exit, stopping_on_signals(self.options.grace_seconds) as self.stop:
            self.at_exit.callback(self.progress.end)
            is_stopping = Agreement(self.stop, self.accelerator)
            self.batches = Batches(self.loader, self.inputs)
            self.at_exit.callback(self.batches.close)
            try:
                for hook in self.hooks:
                    hook.start(self)
                self.progress.begin(self.total, "training", "step", done=done)
                while not (self.is_done or is_stopping()):
                    while not self.train_on(*self.batches.next()):
                        pass
                    for hook in self.hooks:
                        hook.after_step(self)
                is_stopping()  # also after the last step
                self.report.flush()
                self.progress.end()
                for hook in reversed(self.hooks):
                    hook.end(self)
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
            slots = collate([item.slots for item in batch.items])
            shape = pipe.latent_shape(*batch.items[0].size)
        for name in self.cut.draws:
            slots[name] = pipe.objective.draw(name, (len(batch.items), *shape), len(pipe.sigmas), random)
        return [runtime.to_device(slots[name]) for name in (*self.cut.cache, *self.cut.draws)]

    @contextlib.contextmanager
    def looking(self) -> Iterator[bool]:
        """For work of the first rank that looks at the weights, or at their moving average, and changes nothing.

        Yields whether to do it: not on another rank, nor after a signal; a signal inside the block ends it. A run that
        is resumed does it then. Every rank must enter: what is pending is reported first, and may end the run.
        """
        self.report.flush()
        if not self.accelerator.is_main_process or self.stop.signal is not None:
            yield False
            return
        beat(self.logger.num_steps + 1, "looking")
        try:
            with self.ema.applied() if self.ema is not None else contextlib.nullcontext(), self.stop.interrupting():
                yield True
        except Interrupted:
            self.progress.say("given up: a signal came")

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
        for path in [*logger.saved[-1:], folder / "loss.png", folder / "samples/before_after.png"]:
            if path.exists():
                self.progress.say(f"  {path}")
