"""Prepares rows of a tiny model kernel by kernel, then compiled: ``python preparing.py FOLDER FAMILY``.

Prints as JSON the largest differences, the compilations, and the bytes that the device holds with the models and after
they were unloaded, before any was compiled.
"""
from __future__ import annotations

import gc
import json
import sys

import mindspore as ms
import numpy as np
from PIL import Image

from ms_diffsynth import runtime
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.pipeline import ROWS_WORTH_COMPILING
from ms_diffsynth.registry import family

PROMPTS = ("a cat", "a photo of sks cat in the snow")  # of two lengths


def rows() -> list[dict]:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return [{"prompt": prompt, "input_image": Image.fromarray(pixels)} for prompt in PROMPTS]


def prepared() -> list[dict[str, np.ndarray]]:
    found = []
    for row in rows():
        slots = pipe.run(cut.prepare, {name: row[name] for name in cut.inputs if name in row})
        found.append({name: slots[name].asnumpy() for name in cut.cache})
    return found


def held() -> int:
    gc.collect()
    ms.runtime.synchronize()
    return ms.runtime.memory_allocated()


if __name__ == "__main__":
    runtime.configure("graph", "Ascend")
    pipe = family(sys.argv[2]).pipeline.from_pretrained(sys.argv[1], mindspore_dtype=ms.float32)
    if hasattr(pipe, "max_sequence_length"):
        pipe.max_sequence_length = 32
    pipe.sigmas = pipe.training_schedule("sft").sigmas
    cut = pipe.training_program(Objective(), pipe.sigmas).cut(("loss",), (pipe.network,))
    eagerly, held_with = prepared(), held()
    pipe.unload_models(cut.models("prepare"))
    held_after = held()
    pipe.compile_to_prepare(cut.prepare, ROWS_WORTH_COMPILING - 1)
    pipe.keeps_models = False
    pipe.compile_to_prepare(cut.prepare, ROWS_WORTH_COMPILING)
    assert not pipe.units_to_compile, "so few rows are not worth it; and what is compiled cannot be unloaded"
    pipe.keeps_models = True
    pipe.compile_to_prepare(cut.prepare, ROWS_WORTH_COMPILING)
    compiled, compilations = prepared(), {name: step.compilations for (name, _), step in pipe.compiled_steps.items()}
    differences = {name: max(float(np.abs(one[name] - other[name]).max() / np.abs(one[name]).max())
                             for one, other in zip(eagerly, compiled)) for name in cut.cache}
    sys.stdout.write(json.dumps({"differences": differences, "compilations": compilations,
                                 "held": [held_with, held_after]}) + "\n")
