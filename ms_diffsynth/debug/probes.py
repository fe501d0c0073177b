"""Where a step first stops being finite: every unit and every cell watched, forward and backward. Eager steps only."""
from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn

from ms_diffsynth.nn.names import to_numpy
from ms_diffsynth.program import slot

MOST = 10  # findings that are kept; what comes after the first one is mostly its consequence


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A tensor that is not finite, and where it was met.

    Attributes:
        micro_step: of the step, from 1.
        unit: the unit that was at work; None outside of any.
        module: the cell by the path of its parameters, such as ``dit.layer_1``; None for a unit, or the step itself.
        tensor: ``"input"``, ``"output"``, ``"parameter"``, ``"gradient of output"`` or ``"gradient of parameter"``.
        name: the slot, argument or parameter; empty for the only output of a cell.
        size, nan, inf: how many numbers there are, how many of them are NaN, and infinite.
        least, greatest: of the finite ones; None when there are none.
        rows: positions in the batch of the rows that are not finite; empty when the tensor has no axis of rows.
    """

    micro_step: int
    unit: str | None
    module: str | None
    tensor: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    size: int
    nan: int
    inf: int
    least: float | None
    greatest: float | None
    rows: tuple[int, ...]

    def describe(self) -> str:
        """``the output of dit.layer_1 in unit denoise``."""
        if not (self.module or self.unit):
            return f"the {self.name} of the step"
        inside = f" in unit {self.unit}" if self.module and self.unit else ""
        what = f"{self.tensor} {self.name}".rstrip()
        return f"the {what} of {self.module or f'unit {self.unit}'}{inside}"

    def statistics(self) -> str:
        """``float32 [2, 4]: 3 of 8 NaN, 0 infinite, the others from -1.5 to 0.25``."""
        others = "" if self.least is None else f", the others from {self.least:.4g} to {self.greatest:.4g}"
        return f"{self.dtype} {list(self.shape)}: {self.nan} of {self.size} NaN, {self.inf} infinite{others}"


class Probes:
    """Notes, while it is entered, each tensor that is not finite, in the order in which a step makes them.

    Hooks look at what every unit and every cell of the models gets and gives, at the cells' own parameters, and at the
    gradients of outputs and of ``weights`` as backward reaches them. Every tensor is copied to the host.

    Args:
        units: those that are not cells (they work on Python objects) are not seen.
        models: name -> network; their tokenizers are passed over.
        weights: what is trained; empty without a backward pass.

    Attributes:
        findings: the first `MOST`.
        row: the row that alone is at work, when rows come one by one; None for whole batches.
    """

    def __init__(self, units: Iterable[Any], models: Mapping[str, Any], weights: Iterable[Parameter] = ()):
        self.findings: list[Finding] = []
        self.row: int | None = None
        self._weights = list(weights)
        self._cells = {id(unit): (unit, unit.name, None) for unit in units if isinstance(unit, nn.Cell)}
        for root, model in models.items():
            if isinstance(model, nn.Cell):
                for name, cell in model.cells_and_names():
                    self._cells.setdefault(id(cell), (cell, None, f"{root}.{name}".strip(".")))
        self._handles: list[Any] = []
        self._micro_step, self._batch_size = 0, 1
        self._unit: str | None = None  # the one that is at work
        self._unit_of: dict[str, str | None] = {}  # the one that called a cell
        self._is_forward = True

    def __enter__(self) -> Probes:
        trained = {id(weight) for weight in self._weights}
        for cell, unit, module in self._cells.values():
            self._watch(cell, unit, module)
            for name, parameter in cell.parameters_and_names(expand=False):
                if id(parameter) in trained:
                    trained.remove(id(parameter))
                    self._watch_gradient(parameter, None, module, "gradient of parameter", name)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def begin(self, batch_size: int) -> None:
        """A micro-step on this number of rows begins."""
        self._micro_step, self._batch_size, self._is_forward = self._micro_step + 1, batch_size, True

    def end_forward(self) -> None:
        """From here on backward is at work: cells that run now only do so again."""
        self._is_forward = False

    def look(self, name: str, value: Tensor) -> None:
        """Check what the step itself makes, such as its loss, which is not an output of a unit or a module."""
        self._look(value, None, None, "output", name)

    def _watch(self, cell: nn.Cell, unit: str | None, module: str | None) -> None:
        names = ([slot(param) for param in cell.input_params] if hasattr(cell, "input_params")
                 else list(inspect.signature(cell.construct).parameters))  # of positional inputs
        own = list(cell.parameters_and_names(expand=False))

        def before(_: nn.Cell, args: tuple, kwargs: dict[str, Any]) -> None:
            if not self._is_forward:
                return
            self._unit = unit or self._unit
            self._unit_of[module] = self._unit
            given = [(names[k] if k < len(names) else str(k), value) for k, value in enumerate(args)]
            for name, value in [*given, *kwargs.items()]:
                self._look(value, self._unit, module, "input", name)
            for name, parameter in own:
                self._look(parameter, self._unit, module, "parameter", name)

        def after(_: nn.Cell, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            if not self._is_forward:
                return
            named = dict(zip(cell.output_params, output)) if hasattr(cell, "output_params") else output
            for name, value in sorted(_tensors(named), key=lambda found: found[1].ndim == 0):
                # a scalar comes last: it does not show which row it was
                self._look(value, self._unit, module, "output", name)
                if self._weights:
                    self._watch_gradient(value, self._unit, module, "gradient of output", name)
            self._unit = None if unit else self._unit

        self._handles += [cell.register_forward_pre_hook(before, with_kwargs=True),
                          cell.register_forward_hook(after, with_kwargs=True)]

    def _watch_gradient(self, value: Tensor, unit: str | None, module: str | None, tensor: str, name: str) -> None:
        def hook(gradient: Tensor | None) -> None:
            if gradient is not None:  # MindSpore 2.7 calls it for a tensor that the loss does not depend on, too
                self._look(gradient, unit or self._unit_of.get(module), module, tensor, name)

        if value.is_floating_point():
            with contextlib.suppress(RuntimeError):  # no gradient passes here, and nothing else shows that
                self._handles.append(value.register_hook(hook))

    def _look(self, value: Any, unit: str | None, module: str | None, tensor: str, name: str) -> None:
        for part, found in _tensors(value, name):
            if len(self.findings) < MOST and found.is_floating_point():
                array = to_numpy(found)
                array = array if array.dtype.kind == "f" else array.astype(np.float32)  # bfloat16
                is_finite = np.isfinite(array)
                if not is_finite.all():
                    self.findings.append(self._finding(array, is_finite, unit, module, tensor, part, found))

    def _finding(self, array: np.ndarray, is_finite: np.ndarray, unit: str | None, module: str | None, tensor: str,
                 name: str, value: Tensor) -> Finding:
        rows: tuple[int, ...] = ()
        if "parameter" not in tensor and self.row is not None:
            rows = (self.row,)
        elif "parameter" not in tensor and array.ndim and len(array) == self._batch_size:
            rows = tuple(np.flatnonzero(~is_finite.reshape(len(array), -1).all(axis=1)).tolist())
        finite, has_any = array[is_finite], bool(is_finite.any())
        return Finding(micro_step=self._micro_step, unit=unit, module=module, tensor=tensor, name=name,
                       shape=array.shape, dtype=str(value.dtype).lower(), size=array.size,
                       nan=int(np.isnan(array).sum()), inf=int(np.isinf(array).sum()),
                       least=float(finite.min()) if has_any else None,
                       greatest=float(finite.max()) if has_any else None, rows=rows)


def _tensors(value: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every Tensor in a value of tuples, lists and dictionaries, with its name: ``options.list.0``."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, (tuple, list, dict)):
        for place, part in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _tensors(part, f"{name}.{place}".lstrip("."))
