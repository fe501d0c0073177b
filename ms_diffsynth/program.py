"""The one idea: a pipeline is a list of units, and every job is a *cut* of that list. Pure Python, no MindSpore.

A **slot** is a name with exactly one writer (``prompt_embeds``, ``sigma``, ``loss``). A **unit** reads slots, writes
slots and declares every model it touches. A **program** is an ordered list of units. A **cut** divides it in two:

    prepare   eager, no gradient, deterministic: may be cached; strings, images and tokenizers live here
    step      tensors only: compiled, and run at every training or sampling step

The cut is computed, never declared. The slots that cross it are exactly the cache; the models each half names are
exactly what that half loads.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ms_diffsynth.errors import ProgramError, nearest


class Unit(Protocol):
    """What a program needs to know of a unit; `units.PipelineUnit` and `units.TensorUnit` provide it."""

    name: str
    input_params: tuple[str, ...]  # slots it reads; a trailing "?" marks an optional one
    output_params: tuple[str, ...]  # slots it writes; no other unit may write them
    onload_model_names: tuple[str, ...]  # every model it touches, no exception
    is_host: bool  # Python objects go in (str, PIL, dict): it can never be compiled
    no_grad: bool  # gradient-free by contract, even if it touches a trainable model


def slot(param: str) -> str:
    """The slot an input parameter names: ``"guidance?"`` reads the slot ``guidance``."""
    return param.removesuffix("?")


def is_optional(param: str) -> bool:
    """Whether the unit runs with None where the slot has no writer."""
    return param.endswith("?")


@dataclass(frozen=True)
class Cut:
    """One partition of a program for one purpose."""

    prepare: tuple[Unit, ...]
    step: tuple[Unit, ...]
    inputs: tuple[str, ...]  # what the caller gives to `prepare`, and directly to `step`
    cache: tuple[str, ...]  # exactly the slots that cross from `prepare` (or the caller) into `step`
    draws: tuple[str, ...]  # fresh random slots that `step` reads
    outputs: tuple[str, ...]

    def models(self, stage: str) -> tuple[str, ...]:
        """Names of the models that the stage ``"prepare"`` or ``"step"`` touches, sorted."""
        return tuple(sorted({m for u in getattr(self, stage) for m in u.onload_model_names}))

    def split(self, inputs: Iterable[str]) -> tuple[tuple[Unit, ...], tuple[Unit, ...]]:
        """`prepare` in two: the units that need nothing but these inputs, as far as none of the others reads what they
        write; and the others. Either part may run first.
        """
        known, given = set(inputs), set(self.inputs) | {p for unit in self.prepare for p in unit.output_params}
        apart = []
        for unit in self.prepare:
            reads = {slot(p) for p in unit.input_params} & given
            if reads and reads <= known:
                apart.append(unit)
                known |= set(unit.output_params)
        read_by_others: set[str] = set()
        for unit in reversed(self.prepare):
            if unit in apart and read_by_others & set(unit.output_params):
                apart.remove(unit)
            if unit not in apart:
                read_by_others |= {slot(p) for p in unit.input_params}
        return tuple(apart), tuple(unit for unit in self.prepare if unit not in apart)

    def still_to_run(self, known: Iterable[str]) -> tuple[Unit, ...]:
        """Those of `prepare` that are left to run, in order, when the slots ``known`` are there already."""
        there, wanted, units = set(known), set(self.cache), []
        for unit in reversed(self.prepare):
            if wanted & set(unit.output_params) - there:
                units.insert(0, unit)
                wanted |= {slot(p) for p in unit.input_params}
        return tuple(units)

    def describe(self) -> str:
        """The cut as straight-line code, one line a unit."""
        lines = []
        for stage in ("prepare", "step"):
            taken = self.inputs if stage == "prepare" else self.cache + self.draws
            lines.append(f"def {stage}({', '.join(taken)}):" + (f"  # fresh draws: {', '.join(self.draws)}"
                                                                if stage == "step" and self.draws else ""))
            known = {*taken, *(p for unit in getattr(self, stage) for p in unit.output_params)}
            for unit in getattr(self, stage):
                models = f"  # {', '.join(unit.onload_model_names)}" if unit.onload_model_names else ""
                reads = ", ".join(slot(p) for p in unit.input_params if slot(p) in known)
                lines.append(f"    {', '.join(unit.output_params)} = {unit.name}({reads}){models}")
            lines.append(f"    return {', '.join(self.cache if stage == 'prepare' else self.outputs)}")
        return "\n".join(lines)


class Program:
    """An ordered list of units whose slots are wired when it is built.

    Args:
        units: in the order in which they run.
        inputs: slots the caller fills.
        draws: slots filled with fresh randomness at every step.

    Raises: ProgramError when a slot is read that nothing before writes, or written twice.
    """

    def __init__(self, units: Sequence[Unit], inputs: Iterable[str], draws: Iterable[str] = ()):
        self.units, self.inputs, self.draws = tuple(units), tuple(inputs), tuple(draws)
        writer = dict.fromkeys(self.inputs, "the caller") | dict.fromkeys(self.draws, "the step's random draw")
        for unit in self.units:
            for param in unit.input_params:
                if slot(param) not in writer and not is_optional(param):
                    raise ProgramError(f"unit '{unit.name}' reads '{param}', but nothing before it writes that slot: "
                                       f"add a unit that does, or pass it as an input.{nearest(param, writer)}")
            for param in unit.output_params:
                if param in writer:
                    raise ProgramError(f"unit '{unit.name}' writes '{param}', but {writer[param]} already does: "
                                       "a slot has one writer, so give one of them a new name.")
                writer[param] = f"unit '{unit.name}'"
        self.writer = writer

    def cut(self, outputs: Iterable[str], trainable: Iterable[str] = (), fuse: Iterable[str] = ()) -> Cut:
        """Split the units that ``outputs`` need.

        Args:
            outputs: slots wanted in the end.
            trainable: names of trained models; dotted names of sub-modules count for their model.
            fuse: names of units to pull into the compiled step although they could be prepared.

        Raises: ProgramError for an output that no unit writes, an unknown name in ``fuse``, a host unit that would have
            to be compiled, or a trainable model that the outputs do not depend on, or whose gradient cannot reach them.
        """
        outputs, trainable, fuse = tuple(outputs), tuple(trainable), tuple(fuse)
        needed = self._needed(outputs)
        roots = {name.split(".")[0] for name in trainable}
        self._check_names(needed, roots, fuse)
        hot, prepare, step = set(self.draws), [], []
        for unit in needed:  # one forward pass is enough: a slot has one writer
            reason = _reason_for_step(unit, hot, roots, fuse)
            if reason and unit.is_host:
                raise ProgramError(f"unit '{unit.name}' must run inside the compiled step ({reason}), but it works on "
                                   "Python objects: move that work into a unit of its own, before it.")
            (step if reason else prepare).append(unit)
            if reason:
                hot |= set(unit.output_params)
        written = {p for u in step for p in u.output_params}
        reads = list(dict.fromkeys(slot(p) for u in step for p in u.input_params))
        known = set(self.inputs) | {p for u in prepare for p in u.output_params}
        cache = [s for s in reads if s not in written and s in known]
        taken = [slot(p) for u in prepare for p in u.input_params] + cache
        self._check_gradients(needed, roots, outputs)
        return Cut(prepare=tuple(prepare), step=tuple(step), outputs=outputs, cache=tuple(cache),
                   inputs=tuple(s for s in self.inputs if s in taken),
                   draws=tuple(s for s in self.draws if s in reads))

    def branch(self, changed: Iterable[str], outputs: Iterable[str]) -> tuple[str, ...]:
        """Names of the prepared units to run again when only the slots ``changed`` differ (the negative side)."""
        dirty, again = set(changed), []
        for unit in self.cut(outputs).prepare:
            if dirty & {slot(p) for p in unit.input_params}:
                again.append(unit.name)
                dirty |= set(unit.output_params)
        return tuple(again)

    def _needed(self, outputs: tuple[str, ...]) -> list[Unit]:
        for name in outputs:
            if name not in self.writer:
                raise ProgramError(f"no unit of this program writes the output '{name}'; it writes "
                                   f"{sorted(self.writer)}.{nearest(name, self.writer)}")
        live, needed = set(outputs), []
        for unit in reversed(self.units):
            if live & set(unit.output_params):
                needed.insert(0, unit)
                live |= {slot(p) for p in unit.input_params}
        return needed

    def _check_names(self, needed: list[Unit], roots: set[str], fuse: tuple[str, ...]) -> None:
        names = [u.name for u in needed]
        for name in fuse:
            if name not in names:
                raise ProgramError(f"fuse names '{name}', which this program does not need; it has {names}."
                                   f"{nearest(name, names)}")
        touched = {m for u in needed for m in u.onload_model_names}
        for root in sorted(roots - touched):
            raise ProgramError(f"'{root}' is to be trained, but the outputs do not depend on it; they depend on "
                               f"{sorted(touched)}.{nearest(root, touched)}")

    def _check_gradients(self, needed: list[Unit], roots: set[str], outputs: tuple[str, ...]) -> None:
        """Every trained model needs a path of units that pass gradients, from one that holds it to an output.

        Host units need no mention: one that depends on a trained model has been refused by then.
        """
        live, reached, stops = set(outputs), set(), []
        for unit in reversed(needed):
            if not live & set(unit.output_params):
                continue
            if unit.no_grad:
                stops.insert(0, unit.name)
            else:
                reached |= set(unit.onload_model_names)
                live |= {slot(p) for p in unit.input_params}
        for root in sorted(roots - reached):
            raise ProgramError(f"'{root}' is to be trained, but its gradient cannot reach {', '.join(outputs)}: it "
                               f"stops at {', '.join(stops)}, declared no_grad. Expected a path of units that pass "
                               f"gradients: take no_grad off, or train what a gradient reaches: {sorted(reached)}.")


def _reason_for_step(unit: Unit, hot: set[str], roots: set[str], fuse: tuple[str, ...]) -> str:
    """Why ``unit`` belongs in the step, or an empty string when it can be prepared."""
    for param in unit.input_params:
        if slot(param) in hot:
            return f"it reads '{slot(param)}', which changes at every step"
    for model in unit.onload_model_names:
        if model in roots and not unit.no_grad:
            return f"it holds the trainable model '{model}'"
    return "it was named in fuse" if unit.name in fuse else ""
