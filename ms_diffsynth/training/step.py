"""The training step: forward, backward, accumulation, clipping, finite guard and update, compiled as one graph.

`TrainStep` has the surface of mindone's class of that name (`mindone.diffusers.training_utils`, 0.5.0), so that a
subclass written for mindone runs after changing one import. Where mindone's is wrong it differs: its defaults work;
the reported loss is the true loss; the loss is scaled here, so forgetting ``scale_loss`` is harmless; a non-finite
gradient never reaches a weight, whatever the scaler; the last, partial accumulation group of an epoch is divided by
its own size; micro-step and update-step are two compiled functions chosen on the host; the gradient norm is returned.
"""
from __future__ import annotations

import sys
from importlib import import_module
from typing import Any, NamedTuple

import mindspore as ms
import numpy as np
from mindspore import ParameterTuple, Tensor, nn, ops

from ms_diffsynth import runtime
from ms_diffsynth.compile import Announce, CompiledStep, log_only
from ms_diffsynth.errors import TrainingError, nearest
from ms_diffsynth.nn.ema import EMA
from ms_diffsynth.training import grads as gradients
from ms_diffsynth.training.optim import guarded
from ms_diffsynth.training.zero import broadcast, exchange_for

_seeds = import_module("mindspore.common.seed")  # `ms.set_seed` would also reset NumPy and the data set
ACCUMULATION_SETTINGS = ("length_of_dataloader", "sync_with_dataloader")


class StepResult(NamedTuple):
    """What one call of a step gives back; Tensors stay on the device until they are read."""

    loss: Tensor  # float32 scalar, unscaled; of several ranks the mean
    aux: tuple[Any, ...]  # whatever else ``forward`` returned, on this rank
    grad_norm: Tensor | None  # float32 scalar before clipping, of the averaged gradient; None at a micro-step
    is_finite: Tensor | None  # bool scalar; False means that nothing was updated; None at a micro-step
    is_update: bool  # whether an optimizer update was made (or skipped by the guard)
    numbers: Tensor | None = None  # float32 [3]: loss, norm and 1 for finite, to be read at once


@ms.jit_class
class AttrJitWrapper:
    """Settings as attributes that compiled code may read; fixed when the step is compiled.

    Source: mindone 0.5.0, ``mindone.diffusers.training_utils.AttrJitWrapper``.
    """

    def __init__(self, **kwargs: Any):
        for name in kwargs:
            setattr(self, name, kwargs[name])


class TrainStep(nn.Cell):
    """One training step. Subclasses implement ``forward(self, *inputs) -> (loss, *aux)``, all Tensors.

    Args:
        model: the network that is trained; it is put into training mode.
        optimizer: what fulfils `training.optim.Optimizer`, such as `AdamW`, or any of ``mindspore.nn``, ``mint.optim``
            or ``experimental.optim``; its ``parameters`` are trained. In a job of several ranks, gradients are averaged
            over these once per update; `training.optim.Sharded` divides its moments among them.
        loss_scaler: ``mindspore.amp.StaticLossScaler`` or ``DynamicLossScaler``; None scales by 1.
        max_grad_norm: clip the global gradient norm to this; None leaves it.
        gradient_accumulation_steps: micro-steps per update; None means 1.
        gradient_accumulation_kwargs: ``length_of_dataloader`` (batches per epoch) makes the last, partial group of an
            epoch an update of its own, unless ``sync_with_dataloader`` is False.
        ema: follows the weights after every update.
        mode: ``"graph"`` or ``"pynative"``; None takes the runtime's.
        planned_compilations, announce: see `compile.CompiledStep`.

    What ``forward`` draws by MindSpore's operators differs between ranks, also where all call ``ms.set_seed`` with the
    same seed before they make the step.

    Settings are read when the step is compiled; changing an attribute after the first call has no effect in mode graph.

    Raises: TrainingError when nothing would be trained, or for impossible settings.
    """

    def __init__(self, model: nn.Cell, optimizer: nn.Cell, loss_scaler: Any = None, max_grad_norm: float | None = None,
                 gradient_accumulation_steps: int | None = None,
                 gradient_accumulation_kwargs: dict[str, Any] | None = None, *, ema: EMA | None = None,
                 mode: str | None = None, planned_compilations: int | None = None, announce: Announce = log_only):
        super().__init__(auto_prefix=False)
        accumulation = gradient_accumulation_kwargs or {}
        _check(optimizer, max_grad_norm, gradient_accumulation_steps, accumulation)
        optimizer = guarded(optimizer)
        self.model = model.set_train(True)
        self.optimizer = optimizer
        self.ema = ema
        self.weights = ParameterTuple(optimizer.parameters)
        self.exchange = exchange_for(self.weights) if optimizer.exchange is None else optimizer.exchange
        self.sums_early = optimizer.sums_early  # at each micro-step
        broadcast(self.weights)  # a random start that no seed decides is that of rank 0
        optimizer.take_weights()
        if (seed := ms.get_seed()) is not None:  # of ms.set_seed, the same on all ranks; NumPy's and the data's stay
            _seeds._GLOBAL_SEED = seed + 1_000_003 * runtime.current().rank
        if vae := sys.modules.get("mindone.diffusers.models.autoencoders.vae"):
            vae.randn_tensor = posterior_noise
        self.loss_scaler = loss_scaler
        self.loss_scale = getattr(loss_scaler, "scale_value", None)
        self.max_grad_norm = max_grad_norm
        self.accumulation_steps = gradient_accumulation_steps or 1
        is_synced = accumulation.get("sync_with_dataloader", True)
        self.length_of_dataloader = (accumulation.get("length_of_dataloader") or 0) if is_synced else 0
        self.accumulators = gradients.accumulators_for(optimizer.accumulated) if self.accumulation_steps > 1 else ()
        self.value_and_grad = ms.value_and_grad(self._scaled_forward, None, self.weights, has_aux=True)
        mode = mode or runtime.current().mode
        plan = {"mode": mode, "planned": planned_compilations, "announce": announce}
        self.compiled_steps = {"update": CompiledStep(self._update, "the training step", **plan),
                               "micro": CompiledStep(self._accumulate, "the accumulation step", **plan)}
        self.batches = 0  # seen in this epoch
        self.group = 0  # micro-steps accumulated since the last update
        self._group_sizes: dict[int, Tensor] = {}

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The loss (a scalar), and anything else the caller wants back."""
        raise TypeError(f"{type(self).__name__} has no forward(self, *inputs): implement it; return (loss, ...).")

    def scale_loss(self, loss: Tensor) -> Tensor:
        """The loss itself: scaling happens in the step. Kept so that mindone's subclasses run unchanged."""
        return loss

    def draws(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """Random inputs drawn on the host and appended to ``batch``; none by default. See `draws`."""
        return ()

    def __call__(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """Train on one batch and return ``(loss, *aux)``, as mindone's TrainStep does."""
        result = self.step(*batch)
        return (result.loss, *result.aux)

    def step(self, *batch: Tensor) -> StepResult:
        """Train on one batch; an optimizer update every ``gradient_accumulation_steps`` batches."""
        inputs = batch + self.draws(*batch)
        self.batches += 1
        self.group += 1
        is_epoch_end = bool(self.length_of_dataloader) and self.batches % self.length_of_dataloader == 0
        if self.group < self.accumulation_steps and not is_epoch_end:
            values = self.compiled_steps["micro"](*inputs)
            return StepResult(values[0], tuple(values[1:]), None, None, False)
        values = self.compiled_steps["update"](self._group_size(), *inputs)
        self.group = 0
        return StepResult(values[0], tuple(values[4:]), values[1], values[2], True, values[3])

    @property
    def sync_gradients(self) -> bool:
        """Whether the last batch ended in an optimizer update, as mindone's class says it."""
        return self.group == 0

    def _group_size(self) -> Tensor:
        """How many batches of all ranks the present update is of; each number is sent to the device once."""
        if self.group not in self._group_sizes:
            self._group_sizes[self.group] = runtime.to_device(np.float32(self.group * runtime.current().world_size))
        return self._group_sizes[self.group]

    @property
    def compilations(self) -> int:
        """How often this step was compiled so far."""
        return sum(c.compilations for c in self.compiled_steps.values())

    @property
    def compile_seconds(self) -> float:
        """Time spent compiling so far, the first execution of each compiled function included."""
        return sum(c.compile_seconds for c in self.compiled_steps.values())

    def _scaled_forward(self, inputs):
        outputs = self.forward(*inputs)
        if not isinstance(outputs, tuple):
            outputs = (outputs,)
        loss = outputs[0].astype(ms.float32)
        scaled = loss if self.loss_scale is None else loss * self.loss_scale
        return (scaled, loss) + outputs[1:]

    def _accumulate(self, *inputs):
        values, grads = self.value_and_grad(inputs)
        if self.sums_early:
            grads = self.exchange(grads)
        gradients.accumulate(self.accumulators, grads)
        loss = values[1] if self.exchange is None else self.exchange.mean(values[1])
        return (loss,) + values[2:]

    def _update(self, group_size, *inputs):
        values, grads = self.value_and_grad(inputs)
        if self.sums_early:
            grads = self.exchange(grads)
        if self.accumulation_steps > 1:
            grads = gradients.added(self.accumulators, grads)
        if self.exchange is not None and not self.sums_early:
            grads = self.exchange(grads)
        loss, squares = values[1], gradients.sum_of_squares(grads)
        if self.exchange is not None:
            loss, squares = self.exchange.totals(loss, squares)
        unscale = ops.reciprocal(group_size)
        if self.loss_scale is not None:
            unscale = unscale * ops.reciprocal(self.loss_scale)
        norm = ops.sqrt(squares) * unscale
        is_finite = ops.logical_and(gradients.is_finite(norm), gradients.is_finite(loss))
        coefficient = unscale
        if self.max_grad_norm is not None:
            coefficient = unscale * gradients.clip_coefficient(norm, self.max_grad_norm)
        self.optimizer(grads, coefficient, is_finite)
        if self.ema is not None:
            self.ema(is_finite, self.optimizer.float32_weights())
        if self.accumulation_steps > 1:
            gradients.reset(self.accumulators)
        if self.loss_scaler is not None:
            self.loss_scaler.adjust(is_finite)
        numbers = ops.cat((loss.reshape((1,)), norm.reshape((1,)), is_finite.astype(ms.float32).reshape((1,))))
        return (loss, norm, is_finite, numbers) + values[2:]


def posterior_noise(shape: tuple[int, ...], generator: np.random.Generator | None = None,
                    dtype: ms.Type | None = None) -> Tensor:
    """N(0, 1) of ``shape``, for ``vae.diag_gauss_dist.sample`` inside a step.

    mindone 0.5.0 takes it from NumPy, which compiled code calls once: every step would have the same. It is the second
    half of what is drawn: under ``ms.set_seed`` another random operator of the step may begin with the first half.
    """
    if generator is None:
        return ops.randn(2, *shape)[1].astype(dtype)
    return Tensor(generator.standard_normal(shape), dtype)


def _check(optimizer: nn.Cell, max_grad_norm: float | None, accumulation_steps: int | None,
           accumulation: dict[str, Any]) -> None:
    wrong = []
    if not getattr(optimizer, "parameters", ()):
        wrong.append("the optimizer holds no parameters: expected at least one; name what is to be trained "
                     "(lora_base_model or trainable_models).")
    if max_grad_norm is not None and not max_grad_norm > 0:
        wrong.append(f"max_grad_norm={max_grad_norm}: expected a number above 0. Try 1.0, or None for no clipping.")
    if accumulation_steps is not None and accumulation_steps < 1:
        wrong.append(f"gradient_accumulation_steps={accumulation_steps}: expected at least 1.")
    for name in accumulation:
        if name not in ACCUMULATION_SETTINGS:
            wrong.append(f"gradient_accumulation_kwargs has no '{name}': it has {', '.join(ACCUMULATION_SETTINGS)}."
                         f"{nearest(name, ACCUMULATION_SETTINGS)}")
    if wrong:
        raise TrainingError("\n".join(wrong))
