"""What the tests of transformers with blocks of their own share: weights, gradients, and the operations of a graph."""
from __future__ import annotations

import re
from pathlib import Path

import mindspore as ms
import numpy as np
from low_rank import inject_lora, lora_pairs, lora_parameters, set_lora
from mindspore import Parameter, ParameterTuple, Tensor, nn

from ms_diffsynth.nn.adapters.dora import MAGNITUDE, DoRA

# float32: the rounding of sums of up to a hundred terms through four blocks, of each tensor's largest element. A
# gradient that is zero in exact arithmetic (the bias of a key projection, which shifts all scores of a row alike) is
# rounding noise, so 1e-6 of the network's largest gradient is allowed everywhere.
RELATIVE, OF_LARGEST = 1e-5, 1e-6

# what a block computes, by operators of MindSpore or by native kernels; gradients have others
_OPERATORS = {"attention": "Softmax|attention_forward", "activation": "Sigmoid|gelu_forward|swiglu_forward",
              "norm": "LayerNorm|layer_norm_modulate_forward"}


def draw(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def with_weights(dit: nn.Cell) -> nn.Cell:
    """Weights of a network in the middle of training: no zeros that would hide half of the gradients."""
    for seed, parameter in enumerate(dit.get_parameters()):
        weight = draw(seed, *parameter.shape) * (parameter.shape[-1] ** -0.5 if parameter.ndim > 1 else 0.1)
        parameter.set_data(Tensor(weight + 1 if "norm" in parameter.name and parameter.ndim == 1 else weight))
    return dit


def with_lora(dit: nn.Cell, targets: tuple[str, ...], alpha: float | None = None) -> list[Parameter]:
    """A LoRA away from its start, where B is zero."""
    inject_lora(dit, targets, rank=2, alpha=alpha)
    set_lora(dit, {name: (a, 0.3 * draw(seed, *b.shape))
                   for seed, (name, (a, b)) in enumerate(lora_pairs(dit).items())})
    return lora_parameters(dit)


def with_dora(dit: nn.Cell, targets: tuple[str, ...]) -> list[Parameter]:
    """A DoRA away from its start, where B is zero and the magnitudes are the norms."""
    DoRA().inject(dit, targets, rank=2, alpha=3)
    DoRA().load(dit, {name: array * (1 + 0.2 * draw(seed, *array.shape)) if MAGNITUDE in name
                      else array + 0.3 * draw(seed, *array.shape)
                      for seed, (name, array) in enumerate(DoRA().tensors(dit).items())})
    return DoRA().parameters(dit)


def value_and_gradients(dit: nn.Cell, forward, inputs: list[Tensor], weights: list[Parameter], compiled: bool) -> dict:
    """Output of ``forward(*inputs)``, which calls ``dit``, and the gradients of a sum of it by inputs and weights."""
    def loss(*inputs):
        out = forward(*inputs)
        return (out * target).sum(), out

    target = Tensor(draw(99, *forward(*inputs).shape))
    gradient = ms.value_and_grad(loss, tuple(range(len(inputs))), ParameterTuple(weights), has_aux=True)

    def step(*inputs):
        return gradient(*inputs)

    (_, out), (of_inputs, of_weights) = (ms.jit(step, fullgraph=True) if compiled else step)(*inputs)
    found = {p.name: g.asnumpy().copy() for p, g in zip(weights, of_weights)}
    if "lora" in found:
        found |= dit.lora.matrices(found.pop("lora"))
    return {"output": out.asnumpy().copy(), **{f"input {i}": g.asnumpy().copy() for i, g in enumerate(of_inputs)},
            **found}


def assert_same(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    largest = max(np.abs(v).max() for name, v in expected.items() if name != "output")
    wrong = []
    for name, value in expected.items():
        allowed = max(RELATIVE * np.abs(value).max(), OF_LARGEST * largest)
        error = np.abs(found[name] - value).max()
        if not error <= allowed:
            wrong.append(f"{name}: {error:.1e}, allowed {allowed:.1e}")
    assert not wrong, wrong


def assert_equal_bit_for_bit(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys() and all(np.abs(value).max() > 0 for value in expected.values())
    assert not [name for name, value in expected.items() if not (found[name] == value).all()]


def final_operations(run, folder: Path) -> dict[str, int]:
    """How often the operations of a block stand in the graph that is executed."""
    ms.set_context(save_graphs=1, save_graphs_path=str(folder))
    try:
        run()
    finally:
        ms.set_context(save_graphs=0)
    executed = [file for file in folder.rglob("*.ir") if re.fullmatch(r"\d+_execute_\d+\.ir", file.name)]
    graph = max(executed, key=lambda file: file.stat().st_size).read_text()  # small ones are of single operations
    return {name: len(re.findall(rf'= (?:PrimFunc_)?(?:{operators})\(|func_name: "[^"]*:(?:{operators})"', graph))
            for name, operators in _OPERATORS.items()}
