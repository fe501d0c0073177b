"""AdamW with its moments divided among the ranks (ZeRO, stages 1 and 2), for training whole networks.

Every rank has all weights, and of the moments only its part: 8 bytes for each weight become 8 / N. A step takes two
collectives a bucket: the sums of the gradients are scattered, each rank updates its part of the weights, and the parts
are gathered again; together as many bytes as one AllReduce. Stage 2 also divides the accumulated gradients, which then
are scattered at each micro-step.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops
from mindspore.ops import operations as P

from ms_diffsynth.errors import ConfigError
from ms_diffsynth.nn.names import check_state, load_state, to_numpy
from ms_diffsynth.train.exchange import Exchange
from ms_diffsynth.train.optim import AdamW, check_adamw

_assign = P.Assign()
_each = ops.HyperMap()

Pieces = dict[str, np.ndarray]


class ShardedAdamW(nn.Cell):
    """`AdamW` whose moments are divided among the ranks, called with a rank's parts of the summed gradients.

    Args:
        parameters, learning_rate, betas, eps, weight_decay: those of `AdamW`.
        stage: 1, or 2 to divide accumulated gradients too.

    Raises: ConfigError for another stage; what `AdamW` raises.
    Source: Rajbhandari et al. 2020 (1910.02054), section 5; every element is updated as `AdamW` updates it.
    """

    def __init__(self, parameters: Sequence[Parameter], stage: int = 1, *, learning_rate: float = 1e-4,
                 betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2):
        super().__init__(auto_prefix=False)
        if stage not in (1, 2):
            raise ConfigError(f"zero_stage={stage}: expected 0, 1 or 2.")
        check_adamw(parameters, learning_rate, betas, eps, weight_decay)
        self.parameters, self.stage = ParameterTuple(parameters), stage
        self.exchange = Exchange(self.parameters, is_sharded=True)
        # where the fused kernel updates this rank's part of the weights; what it holds between two steps is not read
        self.shards = ParameterTuple([Parameter(Tensor(np.zeros(part, np.float32)), name=f"part{k}")
                                      for k, part in enumerate(self.exchange.parts)])
        self.optimizer = AdamW(self.shards, learning_rate, betas, eps, weight_decay)
        self.learning_rate = self.optimizer.learning_rate

    def construct(self, gradients, coefficient=None, is_finite=None):
        """As `AdamW.construct`. Shapes: gradients tuple of float32 [part], one a bucket, from `exchange`."""
        _each(_set, self.shards, self.exchange.own_parts(self.parameters))
        self.optimizer(gradients, coefficient, is_finite)
        return _each(_set, self.parameters, self.exchange.gathered(self.shards))

    def set_learning_rate(self, value: float) -> None:
        """Set the learning rate of the following updates; nothing is compiled again."""
        self.optimizer.set_learning_rate(value)

    def state_pieces(self) -> tuple[Pieces, dict[str, list[int]]]:
        """This rank's part of what a checkpoint must hold, and the whole shapes.

        Returns: ``moment1.NAME`` and ``moment2.NAME`` -> the elements of the flattened moment that are this rank's, for
            every parameter it has a part of, and the step count; the same name -> shape of the whole, for all of them.
            The pieces of all ranks, one after the other, are the whole.
        """
        pieces, shapes = {}, {self.optimizer.step.name: []}
        for kind, moments in (("moment1", self.optimizer.moment1), ("moment2", self.optimizer.moment2)):
            shapes |= {f"{kind}.{p.name}": list(p.shape) for p in self.parameters}
            for moment, own in zip(moments, self.exchange.own):
                values, at = to_numpy(moment), 0
                for index, begin, end in own:
                    pieces[f"{kind}.{self.parameters[index].name}"] = values[at:at + end - begin]
                    at += end - begin
        if self.exchange.rank == 0:
            pieces[self.optimizer.step.name] = to_numpy(self.optimizer.step).reshape(1)
        return pieces, shapes

    def load_state_tensors(self, state: Mapping[str, Tensor | np.ndarray]) -> None:
        """Restore whole moments, as `AdamW.state_tensors` names them. Raises: WeightError, as `AdamW` does."""
        shapes = {f"{kind}.{p.name}": p.shape for kind in ("moment1", "moment2") for p in self.parameters}
        check_state(shapes | {self.optimizer.step.name: ()}, state)
        own = {self.optimizer.step.name: state[self.optimizer.step.name]}
        for kind, moments in (("moment1", self.optimizer.moment1), ("moment2", self.optimizer.moment2)):
            for moment, pieces in zip(moments, self.exchange.own):
                parts = [np.asarray(state[f"{kind}.{self.parameters[index].name}"]).reshape(-1)[begin:end]
                         for index, begin, end in pieces]
                part = np.concatenate([*parts, np.zeros(0, np.float32)])
                own[moment.name] = np.pad(part, (0, moment.shape[0] - len(part)))
        load_state(self.optimizer.state_tensors(), own)


def _set(parameter, value):
    return ops.depend(True, _assign(parameter, value.astype(parameter.dtype)))
