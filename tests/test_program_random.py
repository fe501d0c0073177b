"""A thousand random programs, each cut compared with the definition, written here as reachability over the graph.

`program.py` walks its list once, forward or backward. Here nothing is walked in order: the dependency graph of units is
closed transitively, and every claim (where a unit lands, what is cached, what is refused) is a question of who reaches
whom. Order is checked apart: each half keeps the program's order.
"""
from __future__ import annotations

import random
from dataclasses import dataclass

import pytest

from ms_diffsynth.errors import ProgramError
from ms_diffsynth.program import Program

INPUTS, DRAWS, MODELS = ("in0", "in1", "in2"), ("draw0", "draw1"), ("a", "b", "c")


@dataclass(frozen=True)
class Unit:
    name: str
    input_params: tuple[str, ...]
    output_params: tuple[str, ...]
    onload_model_names: tuple[str, ...] = ()
    is_host: bool = False
    no_grad: bool = False


@dataclass(frozen=True)
class Case:
    units: tuple[Unit, ...]
    outputs: tuple[str, ...]
    trainable: tuple[str, ...]
    fuse: tuple[str, ...]


def random_case(rng: random.Random) -> Case:
    slots, units = [*INPUTS, *rng.sample(DRAWS, rng.randint(1, 2))], []
    for k in range(rng.randint(2, 10)):
        recent = slots[-rng.randint(3, 12):]
        reads = [s + ("?" if rng.random() < 0.2 else "") for s in rng.sample(recent, rng.randint(1, 3))]
        if rng.random() < 0.1:
            reads.append("nowhere?")  # an optional slot without a writer
        writes = tuple(f"s{k}_{j}" for j in range(rng.choice((1, 1, 2))))
        draws = {s.removesuffix("?") for s in reads} & set(DRAWS)
        units.append(Unit(f"u{k}", tuple(reads), writes, tuple(rng.sample(MODELS, rng.choice((0, 0, 1, 1, 2)))),
                          is_host=not draws and rng.random() < 0.12, no_grad=rng.random() < 0.15))
        slots += writes
    outputs = {rng.choice(units[-1].output_params), *rng.sample(slots, rng.choice((0, 0, 1)))}
    trainable = [m + rng.choice(("", ".mlp")) for m in rng.sample(MODELS, rng.choice((0, 1, 1, 2)))]
    fuse = [u.name for u in units if rng.random() < 0.08]
    return Case(tuple(units), tuple(sorted(outputs)), tuple(trainable), tuple(fuse))


class Definition:
    """What a cut is, by transitive closure: ``reach[u]`` holds u and everything u's result depends on."""

    def __init__(self, case: Case):
        self.case = case
        reads = {u.name: {p.rstrip("?") for p in u.input_params} for u in case.units}
        writers = {p: u.name for u in case.units for p in u.output_params}
        self.reads, self.by_name = reads, {u.name: u for u in case.units}
        edges = {(a, writers[p]) for a in reads for p in reads[a] if p in writers}
        self.reach = closure(reads, edges)
        passing = {(a, b) for a, b in edges if self.passes(a)}
        self.gradient_reach = closure(reads, passing)
        self.ends = {writers[p] for p in case.outputs if p in writers}
        self.needed = {b for a in self.ends for b in self.reach[a]}
        self.roots = {name.split(".")[0] for name in case.trainable}
        moved = {n for n in self.needed if reads[n] & set(DRAWS) or n in case.fuse or self.holds_trained(n)}
        self.step = {n for n in self.needed if self.reach[n] & moved}

    def passes(self, name: str) -> bool:
        return not self.by_name[name].no_grad and not self.by_name[name].is_host

    def holds_trained(self, name: str) -> bool:
        return not self.by_name[name].no_grad and bool(set(self.by_name[name].onload_model_names) & self.roots)

    def refusal(self) -> str | None:
        """What the error says, None when the cut exists."""
        models = {m for n in self.needed for m in self.by_name[n].onload_model_names}
        if not set(self.case.fuse) <= self.needed:
            return "fuse names"
        if not self.roots <= models:
            return "do not depend on it"
        if any(self.by_name[n].is_host for n in self.step):
            return "must run inside the compiled step"
        fed = {n for a in self.ends for n in self.gradient_reach[a] if self.passes(n)}
        if not self.roots <= {m for n in fed for m in self.by_name[n].onload_model_names}:
            return "gradient cannot reach"
        return None

    def expected(self) -> dict[str, object]:
        """Every field of the cut."""
        order = [u.name for u in self.case.units]
        prepare = self.needed - self.step
        read_by_step = set().union(*(self.reads[n] for n in self.step)) if self.step else set()
        read_by_prepare = set().union(*(self.reads[n] for n in prepare)) if prepare else set()
        outside = {p for n in prepare for p in self.by_name[n].output_params} | set(INPUTS)
        return {
            "prepare": [n for n in order if n in prepare], "step": [n for n in order if n in self.step],
            "cache": read_by_step & outside,
            "draws": [d for d in DRAWS if d in read_by_step],
            "inputs": [i for i in INPUTS if i in read_by_prepare | read_by_step],
            "prepare models": sorted({m for n in prepare for m in self.by_name[n].onload_model_names}),
            "step models": sorted({m for n in self.step for m in self.by_name[n].onload_model_names}),
        }


def closure(nodes, edges) -> dict[str, set[str]]:
    """Warshall: what each node reaches, itself included."""
    reach = {a: {a} | {b for x, b in edges if x == a} for a in nodes}
    for k in nodes:
        for a in nodes:
            if k in reach[a]:
                reach[a] |= reach[k]
    return reach


def found(cut) -> dict[str, object]:
    return {"prepare": [u.name for u in cut.prepare], "step": [u.name for u in cut.step], "cache": set(cut.cache),
            "draws": list(cut.draws), "inputs": list(cut.inputs), "prepare models": list(cut.models("prepare")),
            "step models": list(cut.models("step"))}


def test_a_thousand_random_programs():
    rng = random.Random(2106)
    seen: dict[str | None, int] = {}
    for number in range(1000):
        case = random_case(rng)
        definition = Definition(case)
        program = Program(case.units, INPUTS, DRAWS)
        refusal = definition.refusal()
        seen[refusal] = seen.get(refusal, 0) + 1
        if refusal is not None:
            with pytest.raises(ProgramError, match=refusal):
                program.cut(case.outputs, case.trainable, case.fuse)
            continue
        cut = program.cut(case.outputs, case.trainable, case.fuse)
        assert found(cut) == definition.expected(), f"program {number}: {case}"
        assert len(set(cut.cache)) == len(cut.cache) and cut.outputs == case.outputs
    # every outcome occurs often enough to mean something
    assert seen[None] > 300 and len(seen) == 5 and min(seen.values()) >= 20, seen
