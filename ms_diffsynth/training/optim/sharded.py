"""An optimizer whose float32 weights and state are divided among the ranks: for training whole networks.

Every rank has all weights of the network, in float32 or bfloat16, and of what the optimizer keeps only its part (ZeRO,
stages 1 and 2): the 12 bytes of AdamW for each weight become 12 / N. A step takes two collectives a bucket: the sums of
the gradients are scattered, each rank updates its part, and the parts are gathered again; together as many bytes as one
AllReduce. Stage 2 also divides the accumulated gradients, which then are scattered at each micro-step.

Where the update needs whole matrices nothing can be divided; `Float32Weights` still keeps float32 values of weights in
a shorter dtype.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ms_diffsynth.errors import ConfigError, listing
from ms_diffsynth.nn.names import check_state, load_state, shapes_of, to_numpy
from ms_diffsynth.ops.update import put
from ms_diffsynth.training.optim.adamw import AdamW
from ms_diffsynth.training.optim.contract import Optimizer
from ms_diffsynth.training.zero import Exchange

_each = ops.HyperMap()

Build = Callable[[Sequence[Parameter]], Optimizer]  # of float32 parameters, an optimizer


class _Around(nn.Cell):
    """What two optimizers around ``self.optimizer`` share."""

    def divide(self) -> None:
        """Never called: neither is divided by another."""

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of the following updates; nothing is compiled again."""
        self.optimizer.set_learning_rate(value)


class Sharded(_Around):
    """An optimizer on a rank's part of float32 copies of the weights, called with its parts of the summed gradients.

    Args:
        build: makes the optimizer of the parts: ``partial(AdamW, learning_rate=1e-4)``. It must be element-wise.
        parameters: what is trained, float32 or bfloat16; afterwards each holds the updated copy, rounded to its dtype.
        stage: 1, or 2 to divide accumulated gradients too.

    When something else than this changes the weights, call `take_weights`.

    Raises: ConfigError for another stage, or for an optimizer that needs weights whole; what ``build`` raises.
    Source: Rajbhandari et al. 2020 (1910.02054), section 5; every element is updated as the optimizer updates it.
    """

    is_elementwise, is_divided = False, True

    def __init__(self, build: Build, parameters: Sequence[Parameter], stage: int = 1):
        super().__init__(auto_prefix=False)
        if stage not in (1, 2):
            raise ConfigError(f"zero_stage={stage}: expected 0, 1 or 2.")
        _check_names(parameters)
        self.parameters, self.sums_early = ParameterTuple(parameters), stage == 2
        self.exchange = Exchange(self.parameters, is_sharded=True)
        self.shards = ParameterTuple([Parameter(Tensor(np.zeros(part, np.float32)), name=f"part{k}")
                                      for k, part in enumerate(self.exchange.parts)])
        self.optimizer = build(self.shards)
        if not self.optimizer.is_elementwise:
            raise ConfigError(f"{type(self.optimizer).__name__} needs every weight whole, so that ranks cannot divide "
                              f"them: expected zero_stage=0 instead of {stage}. Set that, or optimizer=adamw.")
        self.optimizer.divide()
        self.is_rounded = needs_float32(self.parameters)
        dtypes = {p.dtype for p in self.parameters}
        self.sent_as = dtypes.pop() if len(dtypes) == 1 else ms.float32
        self.take_weights()

    @property
    def accumulated(self) -> ParameterTuple:
        """With stage 2 this rank's parts."""
        return self.shards if self.sums_early else self.parameters

    def construct(self, gradients, coefficient=None, is_finite=None):
        """See `contract.Optimizer`. Shapes: gradients tuple of float32 [part], one a bucket, from `exchange`."""
        self.optimizer(gradients, coefficient, is_finite)
        parts = _each(ops.partial(_cast, self.sent_as), self.shards)
        return _each(_set, self.parameters, self.exchange.gathered(parts))

    def float32_weights(self):
        """The weights before they are rounded to their dtype, each of its parameter's shape, on every rank."""
        return self.exchange.gathered(self.shards) if self.is_rounded else None

    def take_weights(self) -> None:
        """Take the weights as they are now."""
        by_name = {p.name: p for p in self.parameters}
        for shard, own in zip(self.shards, self._own(lambda name: to_numpy(by_name[name]))):
            ops.assign(shard, Tensor(own))
        self.optimizer.take_weights()

    def state_tensors(self) -> dict[str, Parameter]:
        """What this rank keeps, by names of its own."""
        return {p.name: p for p in self.shards} | self.optimizer.state_tensors()

    def state_pieces(self) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
        """This rank's part of what a checkpoint must hold, and the whole shapes.

        Returns: ``KIND.NAME`` -> those elements of the flattened whole that are this rank's, for every parameter it has
            a part of, and of the first rank what is not divided, such as the step count; the same names -> shape of the
            whole, for all. The pieces of all ranks, one after the other, are the whole. KIND is what the optimizer
            calls it, such as moment1, and float32 where weights are not.
        """
        pieces: dict[str, np.ndarray] = {}
        kinds, others = self._kept()
        for kind, kept in kinds.items():
            for part, own in zip(kept, self.exchange.own):
                values, at = to_numpy(part), 0
                for index, begin, end in own:
                    pieces[f"{kind}.{self.parameters[index].name}"] = values[at:at + end - begin]
                    at += end - begin
        if self.exchange.rank == 0:
            pieces |= {name: to_numpy(p).reshape(-1) for name, p in others.items()}
        return pieces, {name: list(shape) for name, shape in self._shapes().items()}

    def load_state_tensors(self, state: Mapping[str, Any]) -> None:
        """Restore the whole arrays of `state_pieces`, or those of the optimizer, after the weights were restored.

        Args:
            state: gives arrays by name, such as `storage.checkpoint.Checkpoint.open`; one is in memory at a time.

        Raises: WeightError for missing or superfluous names, or other shapes.
        """
        check_state(self._shapes(), shapes_of(state))
        self.take_weights()
        kinds, others = self._kept()
        for kind, kept in kinds.items():
            for part, own in zip(kept, self._own(lambda name, kind=kind: state[f"{kind}.{name}"])):
                ops.assign(part, Tensor(own))
        for name, parameter in others.items():
            ops.assign(parameter, Tensor(state[name]))

    def _kept(self) -> tuple[dict[str, list[Parameter]], dict[str, Parameter]]:
        """Kind -> one Parameter a bucket; and what is not of single weights, by name."""
        kinds: dict[str, list[Parameter]] = {}
        others = self.optimizer.state_tensors()
        for shard in self.shards:
            for name in [name for name in others if name.endswith(f".{shard.name}")]:
                kinds.setdefault(name.removesuffix(f".{shard.name}"), []).append(others.pop(name))
        return kinds | ({"float32": list(self.shards)} if self.is_rounded else {}), others

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        kinds, others = self._kept()
        shapes = {f"{kind}.{p.name}": p.shape for kind in kinds for p in self.parameters}
        return shapes | {name: p.shape for name, p in others.items()}

    def _own(self, whole: Callable[[str], np.ndarray]) -> list[np.ndarray]:
        """This rank's part of every bucket of whole arrays, by name: float32 [part]."""
        parts = []
        for own, length in zip(self.exchange.own, self.exchange.parts):
            pieces = [np.asarray(whole(self.parameters[index].name)).reshape(-1)[begin:end].astype(np.float32)
                      for index, begin, end in own]
            parts.append(np.concatenate([*pieces, np.zeros(length - sum(map(len, pieces)), np.float32)]))
        return parts


def ShardedAdamW(parameters: Sequence[Parameter], stage: int = 1, **settings: Any) -> Sharded:
    """`Sharded` of `AdamW`, whose further arguments ``settings`` are."""
    return Sharded(partial(AdamW, **settings), parameters, stage)


class Float32Weights(_Around):
    """An optimizer on float32 copies of weights in a shorter dtype, whole on every rank.

    Args:
        build: makes the optimizer of the copies.
        parameters: what is trained; afterwards each holds the updated copy, rounded to its dtype.

    Raises: what ``build`` raises.
    """

    is_elementwise, sums_early, is_divided = False, False, False
    exchange = None

    def __init__(self, build: Build, parameters: Sequence[Parameter]):
        super().__init__(auto_prefix=False)
        _check_names(parameters)
        self.parameters = ParameterTuple(parameters)
        self.copies = ParameterTuple([Parameter(Tensor(to_numpy(p).astype(np.float32)), name=f"float32.{p.name}")
                                      for p in self.parameters])
        self.optimizer = build(self.copies)

    @property
    def accumulated(self) -> ParameterTuple:
        """The parameters."""
        return self.parameters

    def construct(self, gradients, coefficient=None, is_finite=None):
        """See `contract.Optimizer`."""
        self.optimizer(gradients, coefficient, is_finite)
        return _each(_set, self.parameters, self.copies)

    def float32_weights(self):
        """The copies."""
        return self.copies

    def take_weights(self) -> None:
        """Take the weights as they are now."""
        for copy, parameter in zip(self.copies, self.parameters):
            ops.assign(copy, Tensor(to_numpy(parameter).astype(np.float32)))
        self.optimizer.take_weights()

    def state_tensors(self) -> dict[str, Parameter]:
        """The copies, and the optimizer's state, by name."""
        return {p.name: p for p in self.copies} | self.optimizer.state_tensors()

    def load_state_tensors(self, state: Mapping[str, Tensor | np.ndarray]) -> None:
        """Restore what `state_tensors` gave. Raises: WeightError for missing or superfluous names, or other shapes."""
        load_state(self.state_tensors(), state)


def needs_float32(parameters: Sequence[Parameter]) -> bool:
    """Whether weights have too few digits to add up small updates in."""
    return any(p.dtype != ms.float32 for p in parameters)


def _check_names(parameters: Sequence[Parameter]) -> None:
    if len({p.name for p in parameters}) < len(parameters):
        raise ConfigError(f"two parameters have one name: {listing(p.name for p in parameters)}. Expected distinct "
                          "names; set prefixes on the cells.")


def _cast(dtype, value):
    return value.astype(dtype)


def _set(parameter, value):
    return put(parameter, value.astype(parameter.dtype))
