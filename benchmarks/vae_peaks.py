"""Peak memory of the VAEs of published models beside their weights, on the stand-in for CANN: kernels are not computed.

    python benchmarks/vae_peaks.py

GiB by MindSpore's own allocator, bfloat16 (of films float32), kernel by kernel, as they are encoded and decoded.
"""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ms_diffsynth.standin import active, environment

SIZES = ((512, 512), (768, 768), (1024, 1024))
FILMS = ((1, 480, 832), (17, 480, 832), (33, 480, 832), (81, 480, 832), (33, 720, 1280))
MODELS = {"flux:FLUX.1-dev": SIZES, "qwen_image:Qwen-Image": SIZES, "flux2:FLUX.2-klein-4B": SIZES,
          "wan:Wan2.1-T2V-1.3B": FILMS, "wan:Wan2.2-TI2V-5B": ((81, 480, 832), (33, 704, 1280))}


def peaks(name: str, model: str) -> None:
    """Prints the rows of a table."""
    import mindspore as ms
    import numpy as np
    from PIL import Image

    from ms_diffsynth import runtime
    from ms_diffsynth.debug.skeleton import build
    from ms_diffsynth.registry import family
    from ms_diffsynth.units import run_unit

    runtime.configure("graph", "Ascend")
    pipe = family(name).pipeline(dtype=ms.bfloat16)
    pipe.known_configs.update(family(name).published[model])
    pipe.models["vae"] = build(pipe.store.component("vae"), pipe.store.config("vae"), pipe.dtype)
    units = [unit for unit in pipe.units if {"pixels", "moments"} & set(unit.output_params)]
    tiles = {"tiled": False, "tile_size": None, "tile_stride": None}

    def peak_of(work) -> float:
        ms.runtime.synchronize()
        held = ms.runtime.memory_allocated()
        ms.runtime.reset_peak_memory_stats()
        work()
        ms.runtime.synchronize()
        return (ms.runtime.max_memory_allocated() - held) / 2**30

    for size in MODELS[f"{name}:{model}"]:
        given = Image.new("RGB", size[::-1]) if len(size) == 2 else np.zeros((*size, 3), np.uint8)
        slots = {pipe.start_input: given, **tiles}
        latents = {"latents": ms.Tensor(np.zeros((1, *pipe.latent_shape(*size)), np.float32)), **tiles}
        encode = peak_of(lambda slots=slots: pipe.run(units, slots))
        decode = peak_of(lambda latents=latents: run_unit(pipe.build_decode(), pipe, latents))
        sys.stdout.write(f"| {model} | {' x '.join(map(str, size))} | {encode:.2f} | {decode:.2f} |\n")


if __name__ == "__main__":
    if active():
        peaks(*sys.argv[1].split(":"))
    else:
        sys.stdout.write("| model | pixels | encode | decode |\n|---|---|---|---|\n")
        sys.stdout.flush()
        for one in sys.argv[1:] or MODELS:
            standin = environment(None, memory=128, shapes_only=True)
            subprocess.run([sys.executable, __file__, one], env=standin, check=True)
