"""Recompute changes when things are computed, never what: gradients are equal bit for bit, eager and compiled."""
from __future__ import annotations

import re

import mindspore as ms
import numpy as np
import pytest
from low_rank import inject_lora, lora_parameters
from mindspore import ParameterTuple, Tensor, mint, nn, ops

from ms_diffsynth import runtime
from ms_diffsynth.errors import ConfigError, DeviceError
from ms_diffsynth.nn import recompute
from ms_diffsynth.nn.recompute import gradient_checkpoint_forward, use_recompute

COMPILED = pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "graph"])


def draw(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class Square(nn.Cell):
    """x^2 with a bprop of its own, as the fast CPU cells have."""

    def construct(self, x):
        return x * x

    def bprop(self, x, out, dout):
        return (2 * x * dout,)


class Block(nn.Cell):
    """Two outputs, a tuple of constants, keyword arguments: what the blocks of FLUX.1 have."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.square = mint.nn.Linear(8, 32), mint.nn.Linear(32, 8), Square()
        self.runs = 0

    def construct(self, x, y, table=None):
        hidden = ops.tanh(self.up(x)) + self.square(y).sum()
        return x + self.down(hidden) * table[0], y * 0.9


class CountedBlock(Block):
    def construct(self, x, y, table=None):
        self.runs += 1
        return super().construct(x, y, table)


class Network(nn.Cell):
    def __init__(self, block=Block, checkpoint=None):
        super().__init__()
        self.blocks = nn.CellList([block() for _ in range(3)])
        self.head = mint.nn.Linear(8, 1)
        self.checkpoint = checkpoint
        for seed, parameter in enumerate(self.get_parameters()):
            parameter.set_data(Tensor(0.3 * draw(seed, *parameter.shape)))

    def construct(self, x, y):
        table = (ops.ones((5, 8), ms.float32) * 1.5, y)
        for block in self.blocks:
            if self.checkpoint is None:
                x, y = block(x=x, y=y, table=table)
            else:
                x, y = gradient_checkpoint_forward(block, self.checkpoint[0], self.checkpoint[1], x, y, table=table)
        return self.head(x).sum() + (y * x.mean()).sum()


def value_and_gradients(model, inputs, weights, compiled):
    def forward(*inputs):
        return model(*inputs)

    gradient = ms.value_and_grad(forward, 0, ParameterTuple(weights))

    def step(*inputs):
        return gradient(*inputs)

    value, (of_input, of_weights) = (ms.jit(step, fullgraph=True) if compiled else step)(*inputs)
    return [t.asnumpy().copy() for t in (value, of_input, *of_weights)]


def differing_bits(found, expected):
    assert len(found) == len(expected) and all(np.abs(e).max() > 0 for e in expected), "nothing to compare"
    return sum(int((f.view(np.uint32) != e.view(np.uint32)).sum()) for f, e in zip(found, expected))


INPUTS = (Tensor(draw(7, 5, 8)), Tensor(draw(8, 3)))


def toy(compiled, block=Block, checkpoint=None, prepare=lambda model: None):
    model = Network(block, checkpoint)
    prepare(model)
    return value_and_gradients(model, INPUTS, model.trainable_params(), compiled), model


@COMPILED
def test_gradients_are_equal_bit_for_bit(compiled):
    expected, _ = toy(compiled)
    found, _ = toy(compiled, prepare=use_recompute)
    assert differing_bits(found, expected) == 0


def test_blocks_run_twice_in_pynative():
    _, model = toy(False, CountedBlock)
    assert [b.runs for b in model.blocks] == [1, 1, 1]
    _, model = toy(False, CountedBlock, prepare=lambda m: use_recompute(m, ["blocks.1"]))
    assert [b.runs for b in model.blocks] == [1, 2, 1]


@pytest.mark.parametrize("recomputed", [False, True])
def test_compiled_code_computes_twice(recomputed, tmp_path):
    ms.set_context(save_graphs=1, save_graphs_path=str(tmp_path))
    try:
        toy(True, prepare=use_recompute if recomputed else lambda model: None)
    finally:
        ms.set_context(save_graphs=0)
    final = sorted(tmp_path.rglob("*_execute_*.ir"))[-1].read_text()
    assert len(re.findall(r"= (?:PrimFunc_)?Tanh\(", final)) == (6 if recomputed else 3)


@COMPILED
def test_a_lora_injected_later_gets_its_gradient(compiled):
    def gradients(recomputed):
        model = Network()
        for parameter in model.get_parameters():
            parameter.requires_grad = False
        if recomputed:
            use_recompute(model)
        for cell in inject_lora(model, ["up", "down"], rank=2).values():
            cell.lora_B.set_data(Tensor(draw(3, *cell.lora_B.shape)))
        return value_and_gradients(model, INPUTS, lora_parameters(model), compiled)

    assert differing_bits(gradients(True), gradients(False)) == 0


def test_a_second_call_changes_nothing():
    model = Network(CountedBlock)
    assert use_recompute(model) == 3 and use_recompute(model) == 3
    value_and_gradients(model, INPUTS, model.trainable_params(), False)
    assert [b.runs for b in model.blocks] == [2, 2, 2]


@pytest.mark.parametrize(("blocks", "says"), [
    (["block"], r"recompute: 'block' found in Network. Did you mean 'blocks'\?.*its lists blocks"),
    ([], "recompute: no blocks found"),
])
def test_blocks_that_are_not_there(blocks, says):
    with pytest.raises(ConfigError, match=says):
        use_recompute(Network(), blocks)


def test_a_model_without_lists():
    with pytest.raises(ConfigError, match=r"no blocks found in Linear.*it has none.*turn use_gradient_check"):
        use_recompute(mint.nn.Linear(2, 2))


# -- gradient_checkpoint_forward -----------------------------------------------------------------------------------


def test_checkpoint_forward_is_equal_bit_for_bit_in_pynative():
    expected, plain = toy(False, CountedBlock, (False, False))
    found, model = toy(False, CountedBlock, (True, False))
    assert differing_bits(found, expected) == 0
    assert [b.runs for b in plain.blocks] == [1, 1, 1] and [b.runs for b in model.blocks] == [2, 2, 2]


def test_checkpoint_forward_compiles():
    expected, _ = toy(True, checkpoint=(False, False))
    found, _ = toy(True, checkpoint=(True, False))
    for f, e in zip(found, expected):  # float32 sums in another order
        assert np.abs(f - e).max() <= 1e-6 * np.abs(e).max()


@COMPILED
def test_checkpoint_forward_leaves_marked_blocks_to_themselves(compiled):
    expected, _ = toy(compiled)
    found, model = toy(compiled, Block if compiled else CountedBlock, (True, False), use_recompute)
    assert differing_bits(found, expected) == 0
    assert compiled or [b.runs for b in model.blocks] == [2, 2, 2]


# -- offload -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pynative():
    before = runtime.current()
    yield runtime.configure("pynative", before.device)
    runtime.configure(before.mode, before.device)


@pytest.mark.parametrize("how", ["property", "call"])
def test_offload_keeps_the_inputs_of_blocks_on_the_host(how, pynative, monkeypatch):
    kept, to_host = [], recompute._to_host
    monkeypatch.setattr(recompute, "_to_host", lambda tensor: kept.append(tensor.shape) or to_host(tensor))
    expected, _ = toy(False)
    assert not kept
    if how == "property":
        found, model = toy(False, CountedBlock, prepare=lambda m: use_recompute(m, offload=True))
    else:
        found, model = toy(False, CountedBlock, (True, True))
    assert differing_bits(found, expected) == 0 and [b.runs for b in model.blocks] == [2, 2, 2]
    assert kept.count((5, 8)) == 3 and (5, 32) not in kept, "inputs only, nothing from inside"


def test_offload_is_refused_in_mode_graph():
    says = "use_gradient_checkpointing_offload is on in mode graph.*Expected mode pynative"
    with pytest.raises(DeviceError, match=says):
        use_recompute(Network(), offload=True)
    with pytest.raises(DeviceError, match=says):
        toy(False, checkpoint=(True, True))
    with pytest.raises(Exception, match=says):
        toy(True, checkpoint=(True, True))




SNIPPET = """
from ..core import gradient_checkpoint_forward

text, image = gradient_checkpoint_forward(
    block,
    use_gradient_checkpointing,
    use_gradient_checkpointing_offload,
    image=image,
    text=text,
    temb=conditioning,
)
"""


class Joint(nn.Cell):
    """A block whose every input has a keyword."""

    def __init__(self):
        super().__init__()
        self.mlp = mint.nn.Linear(4, 4)
        self.runs = 0

    def construct(self, image, text, temb):
        self.runs += 1
        return text * temb, self.mlp(image + temb)


@pytest.mark.parametrize("checkpoint, runs", [((False, False), 1), ((True, False), 2), ((True, True), 2)])
def test_the_documents_snippet_runs_in_a_module_beside_the_pipelines(checkpoint, runs, pynative):
    block = Joint()
    first, second = (Tensor(np.full((2, 4), value, np.float32)) for value in (1, 3))

    def loss(image, text):
        scope = {"__package__": "ms_diffsynth.pipelines", "block": block, "image": image, "text": text,
                 "conditioning": Tensor(np.full((2, 4), 2, np.float32)), "use_gradient_checkpointing": checkpoint[0],
                 "use_gradient_checkpointing_offload": checkpoint[1]}
        exec(SNIPPET, scope)
        return (scope["text"] + scope["image"]).sum()

    gradients, weights = ms.grad(loss, (0, 1), block.trainable_params())(first, second)
    np.testing.assert_allclose(gradients[1].asnumpy(), 2 * np.ones((2, 4)))
    np.testing.assert_allclose(gradients[0].asnumpy(), np.tile(block.mlp.weight.asnumpy().sum(0), (2, 1)), rtol=1e-5)
    assert block.runs == runs and all(np.abs(w.asnumpy()).max() > 0 for w in weights)
