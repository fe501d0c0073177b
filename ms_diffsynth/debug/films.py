"""Reference cases of an autoencoder of films: its moments and its frames, for films of several lengths."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor

from ms_diffsynth import runtime
from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.debug.compare import Quantity, relative_error, tolerances
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.models import Source
from ms_diffsynth.nn.names import to_numpy
from ms_diffsynth.pipelines.shared.causal_vae import statistics
from ms_diffsynth.registry import family

# what is encoded -> the moments that are expected, and how many frames of it
FILMS = {"pixels": ("moments", None), "one frame": ("moments_1_frame", 1),
         "pixels_9_frames": ("moments_9_frames", None)}


def check_films(folder: Path, info: dict[str, Any], mode: str, dtype: str) -> list[Quantity]:
    """Run a case of a VAE alone and return every compared quantity."""
    inputs, expected = (load_state_dict(folder / f"{name}.safetensors") for name in ("inputs", "expected"))
    pipe = family(info["family"]).pipeline(dtype=runtime.DTYPES[dtype])
    pipe.sources["vae"] = Source(folder / "vae")
    mean, std = (tensor.asnumpy() for tensor in statistics(pipe.config("vae")))
    encode = CompiledStep(pipe.vae.own_encode, "the encoder", mode)
    decode = CompiledStep(pipe.vae.own_decode, "the decoder", mode)
    allowed, found = tolerances("float32", runtime.current().device).value, []

    def compare(name: str, values: np.ndarray, wanted: str, tolerance: float = allowed) -> None:
        found.append(Quantity(name, relative_error(values, expected[wanted]), tolerance))

    moments = {}
    for name, (wanted, frames) in FILMS.items():
        pixels = inputs["pixels" if frames else name][:, :, :frames]
        moments[name] = to_numpy(encode(Tensor(np.ascontiguousarray(pixels)))[0])
        compare(f"moments of {pixels.shape[2]} frames", moments[name], wanted)
    latents = (np.split(moments["pixels"], 2, 1)[0] - mean) / std
    compare("latents", latents, "latents")
    for count, wanted in ((None, "decoded"), (1, "decoded_1_frame")):
        given = (expected["latents"] * std + mean)[:, :, :count].astype(np.float32)
        frames = to_numpy(decode(Tensor(np.ascontiguousarray(given)))[0])
        # of one case PyTorch's own float32 is 2e-5 from its float64
        compare(f"{frames.shape[2]} decoded frames", frames, wanted, 1e-4)
    return found
