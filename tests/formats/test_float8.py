"""Base weights that others stored in float8 are cast when they are loaded."""
from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from ms_diffsynth.formats.weights import load_state_dict, save_state_dict
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.registry import family


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_a_model_with_a_network_in_float8_is_that_of_the_cast_weights(tmp_path, dtype):
    family("toy").write_tiny(tmp_path / "toy", 0)
    file = next((tmp_path / "toy/transformer").glob("*.safetensors"))
    weights = {name: array.astype(dtype) for name, array in load_state_dict(file).items()}
    save_state_dict(file, weights)
    pipe = family("toy").pipeline.from_pretrained(str(tmp_path / "toy"))
    loaded = state_dict(pipe.dit)
    assert loaded.keys() == weights.keys()
    assert all(np.array_equal(loaded[name], weights[name].astype(np.float32)) for name in weights)
