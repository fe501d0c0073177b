"""Tables of loss weights against closed forms and against DiffSynth-Studio's."""
from __future__ import annotations

import numpy as np
import pytest

from ms_diffsynth.diffusion import weighting
from ms_diffsynth.diffusion.schedule import diffsynth_flux
from ms_diffsynth.errors import ConfigError

SIGMAS = np.array([1.0, 0.5, 0.25, 0.01], np.float32)


def test_closed_forms():
    np.testing.assert_allclose(weighting.table("sigma_sqrt", SIGMAS), [1, 4, 16, 1e4], rtol=1e-6)
    wanted = 2 / np.pi / np.array([1, 0.5, 0.625, 0.9802])
    np.testing.assert_allclose(weighting.table("cosmap", SIGMAS), wanted, rtol=1e-6)
    for scheme in ("none", "uniform", "logit_normal", "mode"):
        assert (weighting.table(scheme, SIGMAS) == 1).all()


@pytest.mark.parametrize("scheme", weighting.SCHEMES)
def test_every_scheme_has_a_finite_table(scheme):
    sigmas = diffsynth_flux().sigmas
    table = weighting.table(scheme, sigmas)
    assert table.dtype == np.float32
    assert table.shape == sigmas.shape
    assert np.isfinite(table).all()
    assert (table >= 0).all()


def test_bell_equals_diffsynths():
    """Values of DiffSynth-Studio's formula, computed by PyTorch 2.13 in float32 on the same grid."""
    table = weighting.bell_table(diffsynth_flux().sigmas)
    wanted = [0.0, 0.0018415472, 0.00368499709, 0.196807161, 0.764754474, 1.25246298, 1.25547636, 1.25848889,
              1.79430223, 0.0819707289, 0.0657134727, 0.0493868962]
    # the reference rounds in float32 before it subtracts the smallest value
    np.testing.assert_allclose(table[[0, 1, 2, 100, 333, 499, 500, 501, 750, 997, 998, 999]], wanted, atol=1e-6)
    assert table.mean() == pytest.approx(1, rel=1e-6)
    assert table.max() == pytest.approx(1.794, abs=1e-3)


def test_an_unknown_scheme_is_refused():
    with pytest.raises(ConfigError, match="Did you mean 'sigma_sqrt'"):
        weighting.table("sigma_sqr", SIGMAS)
