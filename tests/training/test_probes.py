"""Probes: the first tensor that is not finite, in whatever a cell gets or gives; and a step that does not notice."""
from __future__ import annotations

from itertools import count

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, mint, nn, ops

from ms_diffsynth.debug.probes import MOST, Probes
from ms_diffsynth.nn.recompute import use_recompute
from ms_diffsynth.units import TensorUnit

NAMES = count()  # MindSpore wants distinct names of Parameters


class Layer(nn.Cell):
    def __init__(self):
        super().__init__()
        self.linear = mint.nn.Linear(3, 3)

    def construct(self, hidden, options=None):
        return self.linear(hidden) * 1.0, {"kept": hidden, "ids": Tensor([1, 2])}


class Network(nn.Cell):
    """Two layers; ``scale`` multiplies in between, outside of any cell."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.CellList([Layer(), Layer()])
        self.scale = Parameter(Tensor(np.ones(3, np.float32)), name=f"probes{next(NAMES)}.scale")
        rng = np.random.default_rng(0)
        for k, parameter in enumerate(p for p in self.get_parameters() if p is not self.scale):
            parameter.set_data(Tensor(rng.standard_normal(parameter.shape).astype(np.float32)))
            parameter.name = f"probes{next(NAMES)}.{k}"

    def construct(self, x):
        hidden, _ = self.blocks[0](x)
        hidden, _ = self.blocks[1](hidden=hidden * self.scale, options={"list": [hidden]})
        return hidden


class Denoise(TensorUnit):
    input_params = ("latents", "guidance?")
    output_params = ("velocity", "loss")
    onload_model_names = ("dit",)

    def construct(self, latents, guidance=None):
        velocity = self.dit(latents)
        return velocity, ops.mean(velocity * velocity)


def unit_of(network):
    unit = Denoise()
    unit.dit = network
    return unit


def look(network, x, size=2, factor=1.0):
    """What probes find in one step on ``x``, and its gradients."""
    unit, weights = unit_of(network), ms.ParameterTuple(list(network.get_parameters()))
    with Probes([unit, object()], {"dit": network, "tokenizer": object()}, weights) as probes:
        def forward(latents):
            loss = unit(latents, None)[1]
            probes.end_forward()
            return loss * factor

        probes.begin(size)
        gradients = ms.value_and_grad(forward, None, weights)(Tensor(x))[1]
    return probes.findings, [g.asnumpy() for g in gradients]


def data():
    return np.random.default_rng(1).standard_normal((2, 3)).astype(np.float32)


def names(findings):
    return [finding.describe() for finding in findings]


def test_a_finite_step_has_no_findings_and_its_gradients_are_the_same_bits():
    network, x = Network(), data()
    weights = ms.ParameterTuple(list(network.get_parameters()))
    found, watched = look(network, x)
    unit = unit_of(network)
    plain = ms.value_and_grad(lambda latents: unit(latents, None)[1], None, weights)(Tensor(x))[1]
    assert found == [] and all(a.tobytes() == b.asnumpy().tobytes() for a, b in zip(watched, plain))
    assert all(np.abs(g).max() > 0 for g in watched)


def test_a_bad_input_and_whose_it_is():
    x = data()
    x[1, 2] = -np.inf
    findings, _ = look(Network(), x)
    first = findings[0]
    assert (first.unit, first.module, first.tensor, first.name) == ("denoise", None, "input", "latents")
    assert (first.shape, first.dtype, first.size, first.rows) == ((2, 3), "float32", 6, (1,))
    assert (first.nan, first.inf) == (0, 1)
    assert first.least == x[np.isfinite(x)].min() and first.greatest == x[np.isfinite(x)].max()
    assert names(findings)[:4] == ["the input latents of unit denoise", "the input x of dit in unit denoise",
                                   "the input hidden of dit.blocks.0 in unit denoise",
                                   "the input x of dit.blocks.0.linear in unit denoise"]
    assert first.statistics().startswith("float32 [2, 3]: 0 of 6 NaN, 1 infinite, the others from ")
    assert len(findings) == MOST and "kept" in " ".join(names(findings))


def test_what_a_network_computes_between_its_cells_is_the_input_of_the_next_by_keyword_and_in_a_list():
    network = Network()
    network.scale.set_data(Tensor(np.array([1, 3e38, 1], np.float32)))
    findings, _ = look(network, data() * 1e3)
    assert names(findings)[0] == "the input hidden of dit.blocks.1 in unit denoise"
    assert findings[0].inf == 2 and findings[0].rows == (0, 1)
    network.scale.set_data(Tensor(np.ones(3, np.float32)))
    network.blocks[0].linear.weight.set_data(Tensor(np.full((3, 3), 3e38, np.float32)))
    findings, _ = look(network, np.ones((2, 3), np.float32))
    assert names(findings)[:2] == ["the output of dit.blocks.0.linear in unit denoise",
                                   "the output 0 of dit.blocks.0 in unit denoise"]
    assert "the input options.list.0 of dit.blocks.1 in unit denoise" in names(findings)


def test_a_bad_weight_is_found_before_what_it_spoils_and_has_no_rows():
    network = Network()
    network.blocks[1].linear.bias.set_data(Tensor(np.array([0, np.nan, 0], np.float32)))
    findings, _ = look(network, data(), size=3)  # as many rows as the weight is long
    assert names(findings)[:2] == ["the parameter bias of dit.blocks.1.linear in unit denoise",
                                   "the output of dit.blocks.1.linear in unit denoise"]
    assert findings[0].rows == () and (findings[0].nan, findings[0].size) == (1, 3)


@pytest.mark.parametrize("is_recomputed", [False, True])
def test_the_first_gradient_in_backward_order(is_recomputed):
    network = Network()
    network.scale.set_data(Tensor(np.full(3, 1e30, np.float32)))
    network.blocks[1].linear.weight.set_data(Tensor(np.full((3, 3), 1e-20, np.float32)))
    if is_recomputed:
        use_recompute(network)
    findings, gradients = look(network, data(), factor=1e28)
    # 1e38 or so at the output of the last linear layer, times 1e-20, times 1e30: too large where the scale comes in
    assert names(findings)[0] == "the gradient of parameter weight of dit.blocks.1.linear in unit denoise"
    assert all("gradient" in name for name in names(findings))
    last = [p.name for p in network.get_parameters()].index(network.blocks[1].linear.weight.name)
    assert np.isinf(gradients[last]).any()


def test_no_statistics_of_nothing_and_the_row_that_is_alone():
    network = Network()
    with Probes([], {"dit": network}) as probes:
        probes.begin(2)
        probes.row = 1
        network(Tensor(np.full((1, 3), np.nan, np.float32)))
        probes.row = None
        probes.look("loss", Tensor(np.float32(np.inf)))
    first = probes.findings[0]
    assert (first.describe(), first.rows, first.least, first.micro_step) == ("the input x of dit", (1,), None, 1)
    assert first.statistics() == "float32 [1, 3]: 3 of 3 NaN, 0 infinite"
    network(Tensor(np.full((1, 3), np.nan, np.float32)))
    assert len(probes.findings) <= MOST and "the loss of the step" not in names(probes.findings)[:1]


def test_half_precision_and_whole_numbers():
    class Halves(nn.Cell):
        def construct(self, ids, x):
            return ids + 1, x

    cell = Halves()
    with Probes([], {"dit": cell}) as probes:
        probes.begin(1)
        cell(Tensor([2**30]), Tensor(np.array([[1e30, 1]], np.float32)).astype(ms.bfloat16))
        assert probes.findings == []
        cell(Tensor([2**30]), Tensor(np.array([[1e5, 1]], np.float32)).astype(ms.float16))
        cell(Tensor([2**30]), Tensor(np.array([[np.nan, 1]], np.float32)).astype(ms.bfloat16))
    assert [(f.dtype, f.tensor, f.name, f.inf, f.nan) for f in probes.findings] == [
        ("float16", "input", "x", 1, 0), ("float16", "output", "1", 1, 0),
        ("bfloat16", "input", "x", 0, 1), ("bfloat16", "output", "1", 0, 1)]
