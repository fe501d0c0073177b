"""Compilations: counted, limited, announced; and why they are strict."""
from __future__ import annotations

from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn
from processes import environment, run_python

from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.errors import TrainingError

HERE = Path(__file__).parent


def double(x):
    return (x * 2,)


def zeros(*shape: int) -> Tensor:
    return Tensor(np.zeros(shape, np.float32))


def test_each_shape_compiles_once_and_is_announced_with_its_seconds():
    said = []

    def announce(name, shapes):
        said.append((name, shapes))
        return said.append

    step = CompiledStep(double, "the doubling", "graph", announce=announce)
    for k in range(3):
        assert step(Tensor(np.full(2, k, np.float32)))[0].asnumpy().tolist() == [2 * k] * 2
    assert step.compilations == 1
    step(zeros(3, 1))
    step(Tensor(np.zeros((3, 1), np.int32)))  # another dtype is another graph
    step(zeros(2))
    assert step.compilations == 3
    assert said[::2] == [("the doubling", "2"), ("the doubling", "3x1"), ("the doubling", "3x1")]
    assert sum(said[1::2]) == pytest.approx(step.compile_seconds) and min(said[1::2]) > 0


def test_more_compilations_than_planned_are_refused_before_they_begin():
    said = []
    step = CompiledStep(double, "the doubling", "graph", planned=1, announce=lambda *a: said.append(a) or said.append)
    step(zeros(2))
    with pytest.raises(TrainingError, match=r"compilation 2.*\(\(\(5,\), 'Float32'\),\), but 1 were planned"):
        step(zeros(5))
    assert len(said) == 2 and step.compilations == 1
    step(zeros(2))  # what was planned goes on


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_eager_step_that_did_not_end_others_train_as_ever(error):
    def stopped(x):
        y = x * x
        raise error(str(y.shape))

    def first_squared(x):
        return x[0] * x[0]

    step = CompiledStep(ms.value_and_grad(stopped), "the step that stops", "pynative")
    other = CompiledStep(ms.value_and_grad(first_squared), "another step", "pynative")
    for _ in range(2):
        with pytest.raises(error, match="2"):
            step(zeros(2))
        value, gradient = other(Tensor(np.float32([3, 4])))
        assert value.asnumpy() == 9 and gradient.asnumpy().tolist() == [6, 0]


def test_pynative_calls_the_function_itself():
    seen = []
    step = CompiledStep(lambda x: seen.append(x) or (x,), "the listing", "pynative", planned=0)
    step([1, 2])
    step(zeros(2))
    assert seen[0] == [1, 2] and len(seen) == 2 and step.compilations == 0


def test_a_value_that_enters_as_a_constant_is_an_error_not_a_slow_run():
    step = CompiledStep(double, "the doubling", "graph")
    step(Tensor(np.float32(1), const_arg=True))
    with pytest.raises(TrainingError, match=r"compiled again for shapes it had been compiled for.*Python constant"):
        step(Tensor(np.float32(2), const_arg=True))
    with pytest.raises(TrainingError, match=r"argument 1 is a int, argument 2 is a ndarray.*Wrap it in a Tensor"):
        step(zeros(2), 3, np.zeros(2))


def test_a_compilation_that_failed_is_not_counted_as_seen():
    is_broken = [True]

    def announce(*_):
        if is_broken[0]:
            raise KeyboardInterrupt  # a user who does not want to wait
        return lambda seconds: None

    step = CompiledStep(double, "the doubling", "graph", announce=announce)
    with pytest.raises(KeyboardInterrupt):
        step(zeros(2))
    is_broken[0] = False
    step(zeros(2))
    assert step.compilations == 1


def leaves_the_graph(x):
    return (Tensor(x.asnumpy()) * 2,)


def test_code_that_would_leave_the_graph_is_refused():
    """Lax compilation would run it in the interpreter, at every step."""
    with pytest.raises(Exception, match="asnumpy"):
        CompiledStep(leaves_the_graph, "the step", "graph")(zeros(2))


class WritesIntoItsArgument(nn.Cell):
    """Loss sum((w x)^2), through a dictionary."""

    def __init__(self):
        super().__init__()
        self.weight = Parameter(Tensor(np.float32([2.0, 3.0])), name="weight")

    def construct(self, slots):
        env = slots
        env["y"] = env["x"] * self.weight
        env["loss"] = (env["y"] * env["y"]).sum()
        return env["loss"], env["y"]


def gradient_of(compiled) -> np.ndarray:
    cell = WritesIntoItsArgument()
    value_and_grad = ms.value_and_grad(cell, None, cell.trainable_params(), has_aux=True)

    def step(slots):
        values, gradients = value_and_grad(slots)
        return values, gradients

    values, gradients = compiled(step)({"x": Tensor(np.float32([1.0, 5.0]))})
    assert values[0].asnumpy() == 4 + 225
    return gradients[0].asnumpy()


def test_a_dictionary_written_into_is_refused():
    """Its gradient is 2 w x^2 = [4, 150]."""
    np.testing.assert_allclose(gradient_of(lambda step: step), [4, 150])
    with pytest.raises(TrainingError, match="argument 0 is a dict"):
        gradient_of(lambda step: CompiledStep(step, "the step", "graph"))


LAX = """
import sys
from ms_diffsynth import runtime
runtime.configure("graph", "CPU")
import mindspore, numpy, test_compile
found = test_compile.gradient_of(mindspore.jit)
sys.exit({0.0: 10, 154.0: 11}[float(found.sum())])
"""


def test_why_compilation_is_strict():
    """MindSpore 2.7 to 2.10, lax: the right loss, and gradients of zero. When this fails, fullgraph=True may go.

    In a process of its own: what ran before in the same process may make the gradients right.
    """
    assert run_python("-c", LAX, env=environment(HERE, HERE / "shared")).returncode == 10
