"""The training loop: prepare every row once, then one compiled step after the other."""
from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
from mindspore import Tensor
from PIL import Image

from ms_diffsynth import runtime
from ms_diffsynth.data.loader import Batch, Loader, collate
from ms_diffsynth.draws import Draws
from ms_diffsynth.errors import ConfigError, UserError
from ms_diffsynth.launch.worker import beat
from ms_diffsynth.nn.ema import EMA
from ms_diffsynth.storage.checkpoint import Checkpoint
from ms_diffsynth.train import same_run
from ms_diffsynth.train.distributed import Accelerator, Agreement
from ms_diffsynth.train.hooks.evaluation import RunEvaluation
from ms_diffsynth.train.hooks.publish import check_token, publishing
from ms_diffsynth.train.logger import ModelLogger
from ms_diffsynth.train.module import DiffusionTrainingModule
from ms_diffsynth.train.optim import LearningRate, build_optimizer
from ms_diffsynth.train.options import TrainingOptions
from ms_diffsynth.train.prepared import CachedRows, PreparedRow, PreparedRows
from ms_diffsynth.train.program_step import ModuleTrainStep, ProgramTrainStep
from ms_diffsynth.train.progress import Progress
from ms_diffsynth.train.records import StepReport
from ms_diffsynth.train.signals import Interrupted, StopRequest, stopping_on_signals
from ms_diffsynth.train.step import StepResult
from ms_diffsynth.train.two_stage import describe_loaded, launch_data_process_task, open_cache, stage_of


def launch_training_task(accelerator: Accelerator, dataset: Any, model: DiffusionTrainingModule,
                         model_logger: ModelLogger, learning_rate: float = 1e-5, weight_decay: float = 1e-2,
                         num_workers: int = 1, save_steps: int | None = None, num_epochs: int | None = 1,
                         args: Any = None, class_dataset: Any = None,
                         sampler: Callable[[], list[Image.Image]] | None = None,
                         sample_captions: list[str] | None = None, settings: dict[str, Any] | None = None,
                         **options: Any) -> ModelLogger:
    """Train ``model`` on ``dataset`` and write everything through ``model_logger``.

    Args:
        args: an object (a parsed command line) whose attributes override every other option.
        class_dataset: class images for prior preservation; each batch is then instances followed by as many of these.
        sampler: makes sample pictures with the current weights; called before the first step, every ``sample_steps``
            and at the end. sample_captions: what is written under them. With ``evaluation_steps`` it is also called
            with a number of pictures, as that of `build_sampler` can be.
        settings: what else training_args.json should hold.
        options: any other field of `TrainingOptions`.

    In a job of several ranks each calls this; ``batch_size`` is that of a rank, and the first rank alone writes, except
    for its part of divided moments.

    Returns: the logger. Raises: TrainingError after 20 non-finite steps in a row; ConfigError for impossible options;
        HubError for ``args.push_to_hub`` without a token; CheckpointError for a checkpoint that this run cannot go on
        from; OutputError for a folder in use; Stopped, which ends the process, after SIGTERM or SIGINT.
    """
    given = {"learning_rate": learning_rate, "weight_decay": weight_decay, "num_workers": num_workers,
             "save_steps": save_steps, "num_epochs": num_epochs,
             "gradient_accumulation_steps": accelerator.gradient_accumulation_steps}
    check_token(accelerator, args)
    dataset, class_dataset = _from_cache(accelerator, model, model_logger, dataset, class_dataset, args)
    run = _Run(accelerator, dataset, model, model_logger, TrainingOptions.of(args, given | options), class_dataset,
               sampler, sample_captions or [], args)
    given = dict(vars(args)) if hasattr(args, "__dict__") else {}
    model_logger.is_writing = accelerator.is_main_process
    settings = (settings or {}) | given | dataclasses.asdict(run.options)
    with same_run.holding(model_logger.output_path) if accelerator.is_main_process else nullcontext():
        checkpoint = run.start(settings | {"mode": accelerator.mode, "device": accelerator.device,
                                           "num_processes": accelerator.num_processes})
        with publishing(accelerator, model, model_logger, dataset, args):
            try:
                run.prepare()
                if checkpoint is not None:
                    run.restore(checkpoint)
                run.train()
            except UserError as error:
                model_logger.event("stopped", reason=str(error))
                raise
            finally:
                run.progress.end()
    return model_logger


def _from_cache(accelerator: Accelerator, model: DiffusionTrainingModule, model_logger: ModelLogger, dataset: Any,
                class_dataset: Any, args: Any) -> tuple[Any, Any]:
    """The data sets themselves, or the rows of a cache: for stage two of split training, or when ``args.cache_dir`` is
    given; then what it does not hold yet is prepared first.

    Raises: CacheError when it is none that this job may train on; ConfigError for a module that trains eagerly.
    """
    stage, folder = stage_of(model.task), getattr(args, "cache_dir", None)
    if isinstance(dataset, PreparedRows) or not (folder or stage == "train"):
        return dataset, class_dataset
    if model.has_own_forward:
        raise ConfigError(f"{type(model).__name__}.forward with {f'cache_dir={folder}' if folder else model.task}: a "
                          "cache holds what the compiled step needs, and an own forward takes raw rows. Remove "
                          "forward, or train with task='sft' and no cache_dir.")
    cut = model.training_cut()
    if stage != "train":
        model.pipe.keeps_models = False
        launch_data_process_task(accelerator, dataset, model, model_logger, class_dataset, folder)
        model.pipe.unload_models(set(cut.models("prepare")) - set(cut.models("step")))
    return open_cache(folder or dataset.base_path, model, cut, repeat=getattr(dataset, "repeat", 1))


class _Run:
    """The state of one call of `launch_training_task`."""

    def __init__(self, accelerator: Accelerator, dataset: Any, model: DiffusionTrainingModule, logger: ModelLogger,
                 options: TrainingOptions, class_dataset: Any, sampler: Any, captions: list[str], args: Any = None):
        self.accelerator, self.model, self.logger, self.options = accelerator, model, logger, options
        self.dataset, self.class_dataset = dataset, class_dataset
        is_stage_two = stage_of(model.task) == "train"  # what samples need besides the network is not loaded
        self.sampler, self.captions = None if is_stage_two else sampler, captions
        self._check()
        self.is_eager = model.has_own_forward
        self.cut = None if self.is_eager else model.training_cut()
        self.draws = Draws(options.seed)
        self.progress = Progress(accelerator.is_main_process)
        if is_stage_two and sampler is not None:
            self.progress.say("sample pictures need the models that this stage does not load: make them afterwards "
                              "with ms-diffsynth sample")
        model.pipe.announce = self._announce
        self.evaluation = self._build_evaluation(args)
        self.identity = same_run.identity(accelerator, model, self.cut, options, args, dataset, class_dataset)
        self.checkpoints = same_run.Checkpoints(accelerator, logger, options, self.identity, captions)

    # -- before the first step -----------------------------------------------------------------------------------

    def _build_evaluation(self, args: Any) -> RunEvaluation | None:
        options = self.options
        if options.evaluation_steps is None or not self.accelerator.is_main_process:
            return None
        pictures = getattr(args, "dataset_base_path", None) or getattr(self.dataset, "base_path", None)
        reference = options.evaluation_reference or pictures
        return RunEvaluation(self.logger, self.sampler, reference, options.evaluation_count)

    def _check(self) -> None:
        """Refuse what would run, but not as asked."""
        weight = self.model.pipe.objective.prior_loss_weight
        if self.class_dataset is None and weight is not None:
            raise ConfigError(f"prior_loss_weight={weight}, but there are no class images: half of every batch would "
                              "be taken for them. Give class_dataset, or set prior_loss_weight to None.")
        if self.class_dataset is not None and weight is None:
            raise ConfigError("class_dataset is given, but the objective has no prior_loss_weight: the class images "
                              "would be trained on like any other. Set Objective(prior_loss_weight=1.0), or leave them "
                              "out.")

    def start(self, settings: dict[str, Any]) -> Checkpoint | None:
        """Begin the records of a run, or those of one that goes on from a checkpoint, which is returned."""
        logger, options = self.logger, self.options
        same_run.check_same_everywhere(self.accelerator, self.identity)
        checkpoint = same_run.find_for_all(self.accelerator, logger.output_path, options.resume)
        if checkpoint is None:
            logger.start(settings)
            return None
        changes = same_run.check_identity(checkpoint, self.identity, options.accept_changes)
        if self.accelerator.is_main_process:
            same_run.set_later_aside(logger.output_path, checkpoint)
        logger.start(settings, checkpoint.step, same_run.run_folder(checkpoint))
        logger.event("resumed", checkpoint=str(checkpoint.path), changes=changes)
        self.progress.say(f"going on from {checkpoint.path}" + "".join(f"\n  accepted: {c}" for c in changes))
        return checkpoint

    def prepare(self) -> None:
        """Prepare the rows, then build loader, optimizer and step for the buckets they have."""
        options = self.options
        beat(0, "prepare")
        if not self.is_eager:
            sets = [d if isinstance(d, PreparedRows) else PreparedRows(d, self.model, self.cut)
                    for d in (self.dataset, self.class_dataset) if d is not None]
            self.dataset, self.class_dataset = sets[0], sets[1] if len(sets) > 1 else None
            is_cached = isinstance(self.dataset, CachedRows)
            self.progress.begin(sum(d.rows for d in sets), "reading" if is_cached else "preparing", "row")
            if not is_cached:
                self.model.pipe.compile_to_prepare(self.cut.prepare, sum(d.rows for d in sets))
            for rows in sets:
                rows.prepare_all(self.progress.advance)
            self.progress.end()
        self.loader = Loader(self.dataset, options.batch_size, seed=options.seed, class_dataset=self.class_dataset,
                             bucket_of=getattr(self.dataset, "bucket_of", None),
                             class_bucket_of=getattr(self.class_dataset, "bucket_of", None),
                             num_workers=options.num_workers if self.is_eager else 0,
                             rank=self.accelerator.process_index, world_size=self.accelerator.num_processes)
        self.steps_per_epoch = -(-len(self.loader) // options.gradient_accumulation_steps)
        self.total = self._total_steps()
        self.rate = LearningRate(schedule=options.lr_scheduler, base=options.learning_rate,
                                 warmup_steps=options.lr_warmup_steps, total_steps=self.total)
        self.optimizer = build_optimizer(options, self.model.trainable_parameters())
        self.step = self._build_step()
        self.report = StepReport(self.logger, self.progress, self.step, self.dataset, self.class_dataset)
        count = sum(int(np.prod(p.shape)) for p in self.optimizer.parameters)
        where = "eagerly, by the module's own forward" if self.is_eager else f"in {self.accelerator.mode} mode"
        ranks = self.accelerator.num_processes
        tensors = len(self.optimizer.parameters)
        self.progress.say(f"training {count:,} parameters in {tensors} tensor{'s' if tensors > 1 else ''} {where} on "
                          f"{self.accelerator.device}{f', {ranks} ranks' if ranks > 1 else ''}: {self.total} steps, "
                          f"{len(self.loader)} batches per epoch")

    def _announce(self, name: str, shapes: str) -> Callable[[float], None]:
        beat(self.logger.num_steps + 1, "compile")
        return self.progress.announce(name, shapes)

    def _total_steps(self) -> int:
        options = self.options
        by_epochs = None if options.num_epochs is None else options.num_epochs * self.steps_per_epoch
        return min(n for n in (by_epochs, options.max_train_steps) if n is not None)

    def _build_step(self) -> ProgramTrainStep | ModuleTrainStep:
        options = self.options
        scaler = None
        if options.loss_scale != 1:
            from mindspore.amp import StaticLossScaler

            scaler = StaticLossScaler(options.loss_scale)
        self.ema = EMA(self.optimizer.parameters, options.ema_decay) if options.use_ema else None
        self.logger.ema = self.ema
        common = {"loss_scaler": scaler, "max_grad_norm": options.max_grad_norm, "ema": self.ema,
                  "gradient_accumulation_steps": options.gradient_accumulation_steps,
                  "gradient_accumulation_kwargs": {"length_of_dataloader": len(self.loader)}}
        if self.is_eager:
            return ModuleTrainStep(self.model, self.optimizer, **common)
        return ProgramTrainStep(self.model, self.cut, self.optimizer, **common, mode=self.accelerator.mode,
                                planned_compilations=len({self.dataset.bucket_of(i) for i in range(self.dataset.rows)}),
                                announce=self._announce)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on where the checkpoint was saved; at an epoch's begin if its place is no longer in the epoch."""
        state = checkpoint.state
        self.restore_step(checkpoint)
        self.report.skipped, self.report.skipped_in_a_row = state["skipped"], state["skipped_in_a_row"]
        self.checkpoints.restore(checkpoint)
        if self.evaluation is not None:
            self.evaluation.restore(same_run.run_folder(checkpoint), checkpoint.step)

    def restore_step(self, checkpoint: Checkpoint) -> None:
        """Weights, moments, and the place in the data."""
        state = checkpoint.state
        same_run.restore(self.step, checkpoint, self.identity)
        self.loader.seek(state["epoch"] * len(self.loader) + min(state["position"], len(self.loader)))
        self.step.batches = self.loader.step

    # -- the steps -----------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Run all steps that are left, save, sample, and finish. Raises: Stopped after a signal, when all is saved."""
        logger = self.logger
        with stopping_on_signals(self.options.grace_seconds) as stop:
            self.look(stop, *self._due())
            is_stopping = Agreement(stop, self.accelerator)
            self.progress.begin(self.total, "training", "step", done=logger.num_steps)
            is_last = logger.num_steps >= self.total or is_stopping()
            while not is_last:
                for batch in self.loader:
                    if self._train_on(batch) and (is_last := self._after_step(stop, is_stopping)):
                        break
            is_stopping()  # also after the last step
            self.report.flush()
            self.progress.end()
            self.look(stop)
            logger.write_comparison(self.captions)
            logger.on_training_end(self.accelerator, self.model, self.options.save_steps)
            self._save_state(is_last=True)
            self._finish() if stop.signal is None else self._tell_stopped(stop)

    def _train_on(self, batch: Batch) -> bool:
        """Train on a batch. Returns: whether that completed a step."""
        logger, report = self.logger, self.report
        beat(logger.num_steps + 1)
        report.begin()
        rate = self.rate(logger.num_steps)
        self.optimizer.set_learning_rate(rate)
        result = self.compute(batch)
        report.add(result, batch, len(batch.indices) * self.accelerator.num_processes)
        if result.is_update:
            report.flush()  # read the step before this one: the device has had a step's time to finish it
            beat(logger.num_steps + 1, "records")  # also what is saved, and pictures
            logger.on_step_end(self.accelerator, self.model, self.options.save_steps)
            report.end(result, {"step": logger.num_steps, "epoch": self._epoch(), "learning_rate": rate})
        return result.is_update

    def compute(self, batch: Batch) -> StepResult:
        """One micro-step on a batch, and nothing else."""
        return self._eager_step(batch) if self.is_eager else self.step.step(*self._inputs(batch))

    def _epoch(self) -> int:
        """The epoch of the last batch."""
        return (self.loader.step - 1) // len(self.loader)

    def _after_step(self, stop: StopRequest, is_stopping: Agreement) -> bool:
        """What is due after a step: the end of an epoch, a checkpoint, and then pictures, which may take long.

        Returns: whether it was the last one.
        """
        logger, options = self.logger, self.options
        if self.loader.step % len(self.loader) == 0:
            self.report.flush()
            if options.save_steps is None:
                logger.on_epoch_end(self.accelerator, self.model, self._epoch())
        if logger.num_steps >= self.total or is_stopping():
            return True  # what is due now is made at the end, with the last pictures
        self._save_state()
        self.look(stop, *(due := self._due()))
        return any(due) and is_stopping()  # pictures take long enough for a signal

    def _due(self) -> list[bool]:
        """Whether sample pictures and an evaluation are due at the present step."""
        return [self.logger.num_steps % every == 0 if every else self.logger.num_steps == 0
                for every in (self.options.sample_steps, self.options.evaluation_steps)]

    def _save_state(self, is_last: bool = False) -> None:
        """Save all that the run needs to go on after this step, if that is due."""
        if self.checkpoints.is_due(is_last):
            report = self.report
            report.flush()
            self.checkpoints.save(self.step, {**self.loader.state(), "skipped": report.skipped,
                                              "skipped_in_a_row": report.skipped_in_a_row})

    def _inputs(self, batch: Batch) -> list[Tensor]:
        """The cut's cache slots, collated, and its draws, in the order of the step's inputs."""
        items: list[PreparedRow] = batch.items
        slots = collate([item.slots for item in items])
        pipe, random = self.model.pipe, self.draws.of(batch.sample_indices)
        shape = pipe.latent_shape(*items[0].size)
        for name in self.cut.draws:
            slots[name] = pipe.objective.draw(name, (len(items), *shape), len(pipe.sigmas), random)
        return [runtime.to_device(slots[name]) for name in (*self.cut.cache, *self.cut.draws)]

    def _eager_step(self, batch: Batch) -> StepResult:
        pipe, random = self.model.pipe, self.model.pipe.random

        def begin(k: int) -> None:
            pipe.random = self.draws.of(batch.sample_indices[k : k + 1])

        try:
            return self.step.step_rows(batch.items, begin)
        finally:
            pipe.random = random

    # -- after the steps ------------------------------------------------------------------------------------------

    def look(self, stop: StopRequest, is_sampling: bool = True, is_evaluating: bool = True) -> None:
        """Make sample pictures with the current weights, or with their moving average, and evaluate; each once.

        Given up when a signal comes: a run that goes on makes them then.
        """
        is_sampling &= self.sampler is not None and self.logger.num_steps not in self.logger.samples
        is_evaluating &= self.evaluation is not None and not self.evaluation.is_done
        if is_sampling or is_evaluating:
            self.report.flush()  # on every rank: it may end the run
        if not (is_sampling or is_evaluating) or not self.accelerator.is_main_process or stop.signal is not None:
            return
        try:
            with self.ema.applied() if self.ema is not None else nullcontext(), stop.interrupting():
                if is_sampling:
                    path = self.logger.log_samples(self.logger.num_steps, self.sampler(), self.captions)
                    self.progress.say(f"samples: {path}")
                if is_evaluating:
                    self.progress.say(self.evaluation())
        except Interrupted:
            self.progress.say("the pictures are given up")

    def _tell_stopped(self, stop: StopRequest) -> None:
        self.logger.event("stopped", reason=stop.signal.name)
        saved = self.checkpoints.last
        then = f"go on from {saved} with --resume auto" if saved else "with checkpoint_steps=0 nothing can go on here"
        self.progress.say(f"stopped by {stop.signal.name} after step {self.logger.num_steps} of {self.total}: {then}")

    def _finish(self) -> None:
        logger, step, skipped = self.logger, self.step, self.report.skipped
        peak = runtime.peak_memory_bytes()
        logger.event("end", compilations=step.compilations, compile_seconds=round(step.compile_seconds, 2),
                     skipped=skipped, peak_memory_gib=round(peak / 2**30, 2))
        passed_over = f", {skipped} skipped as non-finite" if skipped else ""
        compiled = (f"; the step was compiled {step.compilations} time(s), {step.compile_seconds:.1f} s"
                    if self.accelerator.mode == "graph" and not self.is_eager else "")
        self.progress.say(f"trained {logger.num_steps} steps{passed_over}{compiled}; "
                          f"peak memory {runtime.memory_text(peak)}; "
                          f"loaded: {describe_loaded(self.model.pipe)}")
        folder = logger.output_path
        for path in [*logger.saved[-1:], folder / "loss.png", folder / "samples/before_after.png"]:
            if path.exists():
                self.progress.say(f"  {path}")
