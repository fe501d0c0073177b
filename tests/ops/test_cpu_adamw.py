"""`mindspore.mint.optim.AdamW` takes the steps of the published algorithm, computed in float64."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, mint

from ms_diffsynth.errors import DeviceError

LR, BETAS, EPS, DECAY = 1e-2, (0.9, 0.99), 1e-8, 0.1


@pytest.mark.parametrize("compiled", [False, True], ids=["pynative", "compiled"])
def test_steps_equal_the_algorithm(compiled):
    random = np.random.default_rng(4)
    x, mean, square = random.standard_normal(5), np.zeros(5), np.zeros(5)
    parameter = Parameter(Tensor(x.astype(np.float32)), name="x")
    optimizer = mint.optim.AdamW([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=DECAY)

    def step(gradient):
        return optimizer((gradient,))
    run = ms.jit(step) if compiled else step
    for t in range(1, 6):
        g = random.standard_normal(5)
        mean, square = BETAS[0] * mean + (1 - BETAS[0]) * g, BETAS[1] * square + (1 - BETAS[1]) * g ** 2
        x = x * (1 - LR * DECAY) - LR * (mean / (1 - BETAS[0] ** t)) / (
            np.sqrt(square) / np.sqrt(1 - BETAS[1] ** t) + EPS)
        run(Tensor(g.astype(np.float32)))
        np.testing.assert_allclose(parameter.asnumpy(), x, rtol=0, atol=1e-6)


def test_amsgrad_is_refused():
    parameter = Parameter(Tensor(np.ones(2, np.float32)), name="x")
    optimizer = mint.optim.AdamW([parameter], amsgrad=True)
    with pytest.raises(DeviceError, match="amsgrad"):
        optimizer((mint.ones(2),))
