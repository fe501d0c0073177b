"""LoRA: which layers it finds, what it computes, what it trains, what it refuses."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from low_rank import (
    fuse_lora,
    inject_lora,
    lora_pairs,
    lora_parameters,
    set_lora,
)
from mindspore import Tensor, mint, nn

from ms_diffsynth.errors import ConfigError, WeightError
from ms_diffsynth.nn.adapters.layer import linear_modules, match_targets
from ms_diffsynth.nn.names import state_dict


class Block(nn.Cell):
    def __init__(self):
        super().__init__()
        self.to_q = mint.nn.Linear(4, 6)
        self.to_out = nn.CellList([mint.nn.Linear(6, 4), nn.Identity()])
        self.net = nn.SequentialCell(nn.Dense(4, 8), nn.ReLU(), nn.Dense(8, 4))

    def construct(self, x):
        x = x + self.to_out[0](self.to_q(x))
        return x + self.net(x)


def model():
    ms.set_seed(1)
    return nn.SequentialCell(Block(), Block())


X = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)


def random_pairs(cell, rank, seed=5):
    rng = np.random.default_rng(seed)
    return {n: tuple(rng.standard_normal(a.shape).astype(np.float32) for a in pair)
            for n, pair in lora_pairs(cell).items()}


def test_targets_match_whole_names_or_their_ends_in_model_order():
    cell = model()
    assert match_targets(cell, ["to_q"]) == ["0.to_q", "1.to_q"]
    assert match_targets(cell, ["1.net.2", "to_out.0"]) == ["0.to_out.0", "1.to_out.0", "1.net.2"]


def test_a_target_that_matches_nothing_is_named_with_the_nearest():
    with pytest.raises(ConfigError, match=r"'to_k' selects none of.*Did you mean 'to_q'.*Expected names"):
        match_targets(model(), ["to_q", "to_k"])


def test_injection_changes_nothing_until_b_is_trained_and_renames_nothing():
    cell = model()
    before, names = cell(Tensor(X)).asnumpy(), [p.name for p in cell.get_parameters()]
    inject_lora(cell, ["to_q", "to_out.0", "net.0"], rank=2)
    np.testing.assert_array_equal(cell(Tensor(X)).asnumpy(), before)
    assert [p.name for p in cell.get_parameters() if "lora" not in p.name] == names


@pytest.mark.parametrize("compiled", [False, True])
def test_forward_and_gradient_equal_numpy(compiled):
    base = mint.nn.Linear(4, 6)
    cell = nn.SequentialCell(base)
    inject_lora(cell, ["0"], rank=2, alpha=6)
    pairs = random_pairs(cell, 2)
    set_lora(cell, pairs)
    weights, (a, b), scale = state_dict(base), pairs["0"], 3.0

    def loss(x):
        return (cell(x) ** 2).sum()

    step = ms.value_and_grad(loss, None, tuple(lora_parameters(cell)))
    value, (grad_a, grad_b) = (ms.jit(step, fullgraph=True) if compiled else step)(Tensor(X))
    y = X @ (weights["weight"] + scale * b @ a).T + weights["bias"]
    np.testing.assert_allclose(value.asnumpy(), (y**2).sum(), rtol=1e-5)
    np.testing.assert_allclose(grad_b.asnumpy(), scale * 2 * y.T @ (X @ a.T), rtol=1e-4)
    np.testing.assert_allclose(grad_a.asnumpy(), scale * b.T @ (2 * y.T @ X), rtol=1e-4)


def test_only_lora_is_trainable():
    cell = model()
    inject_lora(cell, ["to_q"], rank=2)
    assert [p.name for p in cell.trainable_params()] == [p.name for p in lora_parameters(cell)]
    assert [p.name for p in lora_parameters(cell)] == [
        f"{m}.to_q.lora_{x}.weight" for m in "01" for x in "AB"]


def test_lora_is_float32_on_a_half_precision_base():
    cell = nn.SequentialCell(mint.nn.Linear(4, 6, dtype=ms.float16))
    inject_lora(cell, ["0"], rank=2)
    assert all(p.dtype == ms.float32 for p in lora_parameters(cell))
    assert cell(Tensor(X, ms.float16)).dtype == ms.float16


def test_fusing_equals_running_beside():
    beside, fused = model(), model()
    for a, b in zip(beside.get_parameters(), fused.get_parameters()):
        b.set_data(Tensor(a.asnumpy().copy()))
    inject_lora(beside, ["to_q", "net.2"], rank=2, alpha=4)
    pairs = random_pairs(beside, 2)
    set_lora(beside, pairs)
    fuse_lora(fused, pairs, scale=2.0)
    np.testing.assert_allclose(fused(Tensor(X)).asnumpy(), beside(Tensor(X)).asnumpy(), rtol=1e-4, atol=1e-4)


def test_weights_that_do_not_fit_are_listed():
    cell = model()
    inject_lora(cell, ["to_q"], rank=2)
    pairs = random_pairs(cell, 2)
    with pytest.raises(WeightError, match=r"0\.to_q: not in the file.*2\.to_q: no LoRA there"):
        set_lora(cell, {"2.to_q": pairs["0.to_q"], "1.to_q": pairs["1.to_q"]})
    with pytest.raises(WeightError, match=r"1 of 1 LoRA modules do not fit.*to_v"):
        fuse_lora(model(), {"to_v": pairs["0.to_q"]})
    with pytest.raises(ConfigError, match="lora_rank=0"):
        inject_lora(model(), ["to_q"], rank=0)


def test_layers_inside_a_lora_are_not_offered_again():
    cell = model()
    inject_lora(cell, ["to_q"], rank=2)
    assert "0.to_q.base" not in linear_modules(cell)
