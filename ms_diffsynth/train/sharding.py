"""AdamW whose float32 weights and moments are divided among the ranks: for training whole networks.

Every rank has all weights of the network, in float32 or bfloat16, and of what the optimizer keeps only its part (ZeRO,
stages 1 and 2): 12 bytes for each weight become 12 / N. A step takes two collectives a bucket: the sums of the
gradients are scattered, each rank updates its part, and the parts are gathered again; together as many bytes as one
AllReduce. Stage 2 also divides the accumulated gradients, which then are scattered at each micro-step.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ms_diffsynth.errors import ConfigError, listing
from ms_diffsynth.nn.names import check_state, to_numpy
from ms_diffsynth.ops.update import put
from ms_diffsynth.train.exchange import Exchange
from ms_diffsynth.train.optim import AdamW

_each = ops.HyperMap()


class ShardedAdamW(nn.Cell):
    """`AdamW` on a rank's part of float32 copies of the weights, called with its parts of the summed gradients.

    Args:
        parameters: what is trained, float32 or bfloat16; afterwards each holds the updated copy, rounded to its dtype.
        stage: 1, or 2 to divide accumulated gradients too.
        learning_rate, betas, eps, weight_decay: those of `AdamW`.

    When something else than this changes the weights, call `take_weights`.

    Raises: ConfigError for another stage; what `AdamW` raises.
    Source: Rajbhandari et al. 2020 (1910.02054), section 5; every element is updated as `AdamW` updates it.
    """

    def __init__(self, parameters: Sequence[Parameter], stage: int = 1, *, learning_rate: float = 1e-4,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2):
        super().__init__(auto_prefix=False)
        if stage not in (1, 2):
            raise ConfigError(f"zero_stage={stage}: expected 0, 1 or 2.")
        if len({p.name for p in parameters}) < len(parameters):
            raise ConfigError(f"two parameters have one name: {listing(p.name for p in parameters)}. Expected distinct "
                              "names; set prefixes on the cells.")
        self.parameters, self.stage = ParameterTuple(parameters), stage
        self.exchange = Exchange(self.parameters, is_sharded=True)
        self.shards = ParameterTuple([Parameter(Tensor(np.zeros(part, np.float32)), name=f"part{k}")
                                      for k, part in enumerate(self.exchange.parts)])
        self.optimizer = AdamW(self.shards, learning_rate, betas, eps, weight_decay)
        self.learning_rate = self.optimizer.learning_rate
        self.has_rounded = needs_float32(self.parameters)
        dtypes = {p.dtype for p in self.parameters}
        self.sent_as = dtypes.pop() if len(dtypes) == 1 else ms.float32
        self.take_weights()

    def construct(self, gradients, coefficient=None, is_finite=None):
        """As `AdamW.construct`. Shapes: gradients tuple of float32 [part], one a bucket, from `exchange`."""
        self.optimizer(gradients, coefficient, is_finite)
        parts = _each(ops.partial(_cast, self.sent_as), self.shards)
        return _each(_set, self.parameters, self.exchange.gathered(parts))

    def float32_weights(self) -> tuple[Tensor, ...]:
        """The weights before they are rounded to their dtype, each of its parameter's shape, on every rank."""
        return self.exchange.gathered(self.shards)

    def take_weights(self) -> None:
        """Go on from the weights as they are now."""
        by_name = {p.name: p for p in self.parameters}
        for shard, own in zip(self.shards, self._own(lambda name: to_numpy(by_name[name]))):
            ops.assign(shard, Tensor(own))

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of the following updates; nothing is compiled again."""
        self.optimizer.set_learning_rate(value)

    def state_pieces(self) -> tuple[dict[str, np.ndarray], dict[str, list[int]]]:
        """This rank's part of what a checkpoint must hold, and the whole shapes.

        Returns: ``KIND.NAME`` -> those elements of the flattened whole that are this rank's, for every parameter it has
            a part of, and the step count; the same names -> shape of the whole, for all. The pieces of all ranks, one
            after the other, are the whole. KIND is moment1, moment2, and float32 where weights are not.
        """
        pieces: dict[str, np.ndarray] = {}
        for kind, kept in self._kept().items():
            for part, own in zip(kept, self.exchange.own):
                values, at = to_numpy(part), 0
                for index, begin, end in own:
                    pieces[f"{kind}.{self.parameters[index].name}"] = values[at:at + end - begin]
                    at += end - begin
        if self.exchange.rank == 0:
            pieces[self.optimizer.step.name] = to_numpy(self.optimizer.step).reshape(1)
        return pieces, {name: list(shape) for name, shape in self._shapes().items()}

    def load_state_tensors(self, state: Any) -> None:
        """Restore the whole arrays of `state_pieces`, or those of an `AdamW`, after the weights were restored.

        Args:
            state: has ``shapes`` and gives arrays by name, such as `io.checkpoint.Checkpoint.open`; one is in memory at
                a time.

        Raises: WeightError for missing or superfluous names, or other shapes.
        """
        check_state(self._shapes(), state.shapes)
        self.take_weights()
        for kind, kept in self._kept().items():
            for part, own in zip(kept, self._own(lambda name, kind=kind: state[f"{kind}.{name}"])):
                ops.assign(part, Tensor(own))
        ops.assign(self.optimizer.step, Tensor(state[self.optimizer.step.name]))

    def _kept(self) -> dict[str, ParameterTuple]:
        kept = {"moment1": self.optimizer.moment1, "moment2": self.optimizer.moment2}
        return kept | ({"float32": self.shards} if self.has_rounded else {})

    def _shapes(self) -> dict[str, tuple[int, ...]]:
        shapes = {f"{kind}.{p.name}": p.shape for kind in self._kept() for p in self.parameters}
        return shapes | {self.optimizer.step.name: ()}

    def _own(self, whole: Callable[[str], np.ndarray]) -> list[np.ndarray]:
        """This rank's part of every bucket of whole arrays, by name: float32 [part]."""
        parts = []
        for own, length in zip(self.exchange.own, self.exchange.parts):
            pieces = [np.asarray(whole(self.parameters[index].name)).reshape(-1)[begin:end].astype(np.float32)
                      for index, begin, end in own]
            parts.append(np.concatenate([*pieces, np.zeros(length - sum(map(len, pieces)), np.float32)]))
        return parts


def needs_float32(parameters: Sequence[Parameter]) -> bool:
    """Whether weights have too few digits to add up small updates in."""
    return any(p.dtype != ms.float32 for p in parameters)


def _cast(dtype, value):
    return value.astype(dtype)


def _set(parameter, value):
    return put(parameter, value.astype(parameter.dtype))
