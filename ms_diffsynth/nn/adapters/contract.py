"""What an adapter is to the rest of the package: `training.module`, `pipeline` and `debug` use only this."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import numpy as np
from mindspore import Parameter, nn

from ms_diffsynth.formats.adapters import Format

# (module name, shape) -> numbers uniform in [0, 1)
Uniform = Callable[[str, tuple[int, ...]], np.ndarray]


class Adapter(Protocol):
    """A way to train a few tensors beside the frozen linear layers of a network.

    An adapter has no state: what is trained lies in the network. Its tensors have the names they have in files, without
    the prefix of the model: ``<module>.<part>``, such as ``layer_1.lora_A.weight``. All are float32 on the host.

    Attributes:
        name: its name in ``ADAPTERS``, in settings and in the identity of a run.
        format: how a file says what it holds, which part takes the file's scale, and what it does to a weight.
    """

    name: str
    format: Format

    def size(self, outs: int, ins: int, rank: int) -> int:
        """How many numbers it trains beside a linear layer [outs, ins]."""
        ...

    def inject(self, network: nn.Cell, targets: Iterable[str], rank: int, alpha: float | None = None,
               uniform: Uniform | None = None) -> Mapping[str, nn.Cell]:
        """Freeze ``network`` and put the adapter on the linear layers that ``targets`` select, where it changes nothing
        before the first step.

        Args:
            targets: full names of layers, or their ends after a dot.
            rank: of the change of a weight. alpha: numerator of its scale alpha / rank; None means ``rank``.
            uniform: source of what starts at random; None draws from NumPy's generator seeded with 0.

        Returns: module name -> the cell that stands there now, in the network's order.
        Raises: ConfigError for targets that select nothing, a rank below 1, or a layer the adapter cannot be put on.
        """
        ...

    def parameters(self, network: nn.Cell) -> list[Parameter]:
        """What is trained, in a fixed order."""
        ...

    def tensors(self, network: nn.Cell) -> dict[str, np.ndarray]:
        """Name -> value of every tensor, the scale alpha / rank not folded in."""
        ...

    def load(self, network: nn.Cell, tensors: Mapping[str, np.ndarray]) -> None:
        """Put what `tensors` gives into a network with the same layers and rank, in place.

        Raises: WeightError when modules or shapes differ; nothing is assigned then.
        """
        ...
