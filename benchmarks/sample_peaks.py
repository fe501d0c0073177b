"""Peak memory of sampling with published models, stage by stage, on the stand-in for CANN: kernels are not computed.

    python benchmarks/sample_peaks.py                               # each model, 1024 x 1024 pixels
    python benchmarks/sample_peaks.py flux2:FLUX.2-dev --bits 8     # the network's and the text encoder's weights

GiB by MindSpore's own allocator, bfloat16, one branch of guidance: the text encoders alone, with the prompt that they
encode kernel by kernel; the network alone, in the compiled sampling step. The VAE is in vae_peaks.py.
"""
from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from ms_diffsynth.standin import active, environment

MODELS = ("flux:FLUX.1-dev", "flux2:FLUX.2-klein-4B", "flux2:FLUX.2-dev", "qwen_image:Qwen-Image", "z_image:Z-Image")
SIDE = 1024
GIB = 2**30


def peaks(name: str, model: str, bits: int) -> None:
    """Prints a row of a table."""
    import mindspore as ms
    import numpy as np

    from ms_diffsynth import runtime
    from ms_diffsynth.debug.skeleton import Plan, build, pipeline
    from ms_diffsynth.registry import family

    runtime.configure("graph", "Ascend")
    found = []

    def measured(work) -> None:
        work()  # the first time compiles
        ms.runtime.synchronize()
        held = ms.runtime.memory_allocated()
        ms.runtime.reset_peak_memory_stats()
        work()
        ms.runtime.synchronize()
        found.extend([held / GIB, ms.runtime.max_memory_allocated() / GIB])

    pipe = family(name).pipeline(dtype=ms.bfloat16)
    pipe.known_configs.update(family(name).published[model])
    encode = next(unit for unit in pipe.units if unit.name == "encode_prompt")
    for part in encode.onload_model_names:
        pipe.models[part] = build(pipe.store.component(part), pipe.store.config(part), pipe.dtype, is_8bit=bits == 8)
    tokens = pipe.max_sequence_length
    ids = {"clip_ids": 77, "t5_ids": tokens, "prompt_ids": tokens, "prompt_mask": tokens}
    slots = {param: ms.Tensor(np.zeros((1, ids[param]), np.float32 if "mask" in param else np.int32))
             for param in encode.input_params}
    measured(lambda: pipe.run([encode], slots))
    embedded = {n: v for n, v in pipe.run([encode], slots).items() if n in encode.output_params}
    pipe.unload_models(encode.onload_model_names)
    pipe.models.clear()
    pipe = pipeline(Plan(family=name, model=model, is_8bit=bits == 8))
    condition = embedded | {n: v for n, v in slots.items() if n in map(_slot, pipe.denoise.input_params)}
    if pipe.takes_guidance:
        condition["guidance"] = ms.Tensor(np.ones(1, np.float32))
    latents = ms.Tensor(np.zeros((1, *pipe.latent_shape(SIDE, SIDE)), np.float32))
    denoise = pipe.denoiser(condition)
    measured(lambda: denoise(latents, ms.Tensor(np.ones(1, np.float32))))
    title = model + (", 8 bits" if bits == 8 else "")
    sys.stdout.write(f"| {title} | " + " | ".join(f"{size:.2f}" for size in found) + " |\n")


def _slot(param: str) -> str:
    return param.removesuffix("?")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=MODELS, help="family:model")
    parser.add_argument("--bits", type=int, choices=[8, 16], default=16, help="of the stored weights")
    arguments = parser.parse_args()
    if active():
        peaks(*arguments.models[0].split(":"), arguments.bits)
    else:
        sys.stdout.write("| model | text encoders | their peak | network | its peak |\n|---|---|---|---|---|\n")
        sys.stdout.flush()
        for one in arguments.models:
            standin = environment(None, memory=128, shapes_only=True)
            subprocess.run([sys.executable, __file__, one, "--bits", str(arguments.bits)], env=standin, check=True)
