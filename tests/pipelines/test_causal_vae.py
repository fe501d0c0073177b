"""The autoencoders of films: pieces, images, and what a frame sees."""
from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor

from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.models import Source
from ms_diffsynth.pipelines.shared import causal_vae
from ms_diffsynth.pipelines.wan.pipeline import WanVideoPipeline

pytestmark = pytest.mark.usefixtures("eager")


@pytest.fixture(scope="module", params=["wan_vae", "wan22_vae"])
def case(request, golden):
    folder = golden / request.param
    pipe = WanVideoPipeline(dtype=ms.float32)
    pipe.sources["vae"] = Source(folder / "vae")
    return pipe.vae, load_state_dict(folder / "inputs.safetensors"), load_state_dict(folder / "expected.safetensors")


@pytest.mark.parametrize("mode", ["eager", "compiled"])
@pytest.mark.few(1)
def test_a_film_in_pieces_is_the_film(case, mode, monkeypatch):
    """Nine frames, whose latents are computed one at a time, and two at a time."""
    vae, inputs, expected = case
    pixels = Tensor(inputs["pixels_9_frames"])
    wanted = expected["moments_9_frames"]
    latents = Tensor(np.split(wanted, 2, 1)[0])
    whole = vae.decode(latents)[0].asnumpy()
    assert whole.shape == pixels.shape
    for pieces in (1, 2):
        monkeypatch.setattr(causal_vae, "PIECE_PIXELS", pieces * 4 * 32 * 32)
        encode, decode = vae.own_encode, vae.own_decode
        if mode == "compiled":
            encode, decode = ms.jit(encode, fullgraph=True), ms.jit(decode, fullgraph=True)
        for found, right in ((encode(pixels)[0], wanted), (decode(latents)[0], whole)):
            np.testing.assert_allclose(found.asnumpy(), right, rtol=0, atol=1e-5 * np.abs(right).max())


def test_a_frame_sees_none_that_comes_after_it(case):
    """So the first frame of a film is encoded as an image is, and decoded too."""
    vae, inputs, expected = case
    pixels = inputs["pixels"]
    changed = np.concatenate([pixels[:, :, :1], np.zeros_like(pixels[:, :, 1:])], 2)
    first = vae.encode(Tensor(changed))[0].asnumpy()
    np.testing.assert_array_equal(first[:, :, 0], vae.encode(Tensor(pixels))[0].asnumpy()[:, :, 0])
    assert np.abs(first[:, :, 1] - expected["moments"][:, :, 1]).max() > 1e-3
