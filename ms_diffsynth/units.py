"""The two kinds of unit: host work on Python objects, and tensor work that can be compiled."""
from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import mindspore as ms
from mindspore import nn

from ms_diffsynth.errors import ProgramError, listing, nearest
from ms_diffsynth.program import is_optional, slot


def _snake_case(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


class _Renamable:
    """A unit whose slots may have other names than its class gives them."""

    def with_slots(self, reads: dict[str, str] | None = None, writes: dict[str, str] | None = None,
                   name: str | None = None) -> Any:
        """The unit itself, with other slots: so that one unit serves two images.

            EncodeImage(dtype).with_slots({"pixels": "rejected_pixels"}, {"moments": "rejected_moments"})

        Args:
            reads, writes: from the names of the class to the new ones.
            name: of the unit, used by ``fuse`` and in messages; it must differ from that of the other unit.

        Raises: ProgramError for a slot that the unit does not have.
        """
        given, taken = reads or {}, writes or {}
        known = {"reads": {slot(p) for p in self.input_params}, "writes": set(self.output_params)}
        for what, names in (("reads", given), ("writes", taken)):
            for odd in sorted(set(names) - known[what]):
                raise ProgramError(f"unit '{self.name}': '{odd}' is not a slot that it {what}: expected one of "
                                   f"{listing(sorted(known[what]))}."
                                   f"{nearest(odd, known[what])}")
        self.original_slots = {new: old for old, new in given.items()}, dict(taken)
        self.input_params = tuple(given.get(slot(p), slot(p)) + ("?" if is_optional(p) else "")
                                  for p in self.input_params)
        self.output_params = tuple(taken.get(p, p) for p in self.output_params)
        self.name = name or self.name
        return self


class PipelineUnit(_Renamable):
    """Host work: reads strings, images and tokenizers, writes anything. Always in ``prepare``.

    Declare slots and models as class attributes or through ``__init__`` (the documents' way), and implement
    ``process(self, pipe, **inputs) -> dict``. ``pipe`` is a view: a model that was not declared raises.
    """

    input_params: tuple[str, ...] = ()
    output_params: tuple[str, ...] = ()
    onload_model_names: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # see `TensorUnit.options`
    is_host = True
    is_always_fused = False
    no_grad = False
    original_slots: tuple[dict[str, str], dict[str, str]] = ({}, {})  # new name -> old of inputs, old -> new of outputs

    def __init__(self, input_params: tuple[str, ...] | None = None, output_params: tuple[str, ...] | None = None,
                 onload_model_names: tuple[str, ...] | None = None, no_grad: bool | None = None):
        self.name = _snake_case(type(self).__name__)
        for key, value in (("input_params", input_params), ("output_params", output_params),
                           ("onload_model_names", onload_model_names)):
            if value is not None:
                setattr(self, key, tuple(value))
        if no_grad is not None:
            self.no_grad = no_grad

    def process(self, pipe: PipeView, **inputs: Any) -> dict[str, Any]:
        """The values of ``output_params``, from those of ``input_params`` (None where an optional one is absent)."""
        raise TypeError(f"unit '{self.name}' has no process(self, pipe, **inputs): implement it.")


class TensorUnit(_Renamable, nn.Cell):
    """Tensor work: ``construct(self, *inputs) -> tuple``, inputs and outputs in declared order. Can be compiled.

    The declared models become attributes of the cell when the unit is attached to a pipeline; they keep their
    parameter names. ``process`` is derived, so the same unit runs eagerly in ``prepare``.

    Args:
        dtype: what a unit that calls a network computes in.
    """

    input_params: tuple[str, ...] = ()
    output_params: tuple[str, ...] = ()
    onload_model_names: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # what `process` takes besides: no slots, so that they never enter a compiled step
    is_host = False
    is_always_fused = False  # True: it runs in the training step although it could be prepared
    has_few_shapes = False  # True: its inputs do, so that it may be compiled to prepare many rows
    no_grad = False

    def __init__(self, dtype: ms.Type | None = None):
        super().__init__(auto_prefix=False)  # models keep their own parameter names
        self.name, self.dtype = _snake_case(type(self).__name__), dtype

    def attach(self, pipe: Any) -> None:
        """Take the declared models from ``pipe``."""
        for name in self.onload_model_names:
            setattr(self, name, getattr(pipe, name))

    def detach(self, model_names: Iterable[str]) -> None:
        """Detach these models, as far as they are attached."""
        for name in set(model_names) & set(self._cells):
            delattr(self, name)

    def process(self, pipe: PipeView, **inputs: Any) -> dict[str, Any]:
        """Run on named inputs, outside of a step, and name the outputs."""
        self.attach(pipe)
        outputs = pipe.function_of(self)(*[inputs[slot(p)] for p in self.input_params])
        return dict(zip(self.output_params, outputs))


class PipeView:
    """A pipeline as one unit sees it: everything except the models it did not declare."""

    def __init__(self, pipe: Any, unit: PipelineUnit | TensorUnit):
        self._pipe, self._unit = pipe, unit

    def __getattr__(self, name: str) -> Any:
        if name in self._pipe.model_names and name not in self._unit.onload_model_names:
            raise ProgramError(f"unit '{self._unit.name}' touches the model '{name}' without declaring it: add it to "
                               f"onload_model_names={self._unit.onload_model_names!r}.")
        return getattr(self._pipe, name)


def run_unit(unit: PipelineUnit | TensorUnit, pipe: Any, slots: dict[str, Any]) -> dict[str, Any]:
    """Run one unit eagerly on ``slots`` (not changed) and return what it writes.

    What is not in ``slots`` is taken from ``pipe.input_defaults``.

    Raises: ProgramError when an input is missing, or when it writes other slots than it declares.
    """
    inputs, known = {}, {**getattr(pipe, "input_defaults", {}), **slots}
    for param in unit.input_params:
        if slot(param) not in known and not is_optional(param):
            raise ProgramError(f"unit '{unit.name}' needs '{slot(param)}', which was not given; "
                               f"given: {sorted(slots)}.")
        inputs[slot(param)] = known.get(slot(param))
    inputs |= {name: known.get(name) for name in unit.options}
    if unit.is_host:  # its `process` has keywords
        reads, writes = unit.original_slots
        inputs = {reads.get(name, name): value for name, value in inputs.items()}
        outputs = unit.process(PipeView(pipe, unit), **inputs)
        outputs = {writes.get(name, name): value for name, value in outputs.items()}
    else:
        outputs = unit.process(PipeView(pipe, unit), **inputs)
    if set(outputs) != set(unit.output_params):
        raise ProgramError(f"unit '{unit.name}' returned {sorted(outputs)}, but declares output_params="
                           f"{unit.output_params!r}: make them equal.")
    return outputs


def run_units(units: tuple[Any, ...], pipe: Any, slots: dict[str, Any]) -> dict[str, Any]:
    """Run units one after the other; returns ``slots`` and everything they wrote."""
    slots = dict(slots)
    for unit in units:
        slots.update(run_unit(unit, pipe, slots))
    return slots
