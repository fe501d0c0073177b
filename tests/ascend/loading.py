"""Loads a network in bfloat16 and calls it twice: ``python loading.py FOLDER``; the log has a mark around each."""
from __future__ import annotations

import sys

import mindspore as ms
import numpy as np
from mindspore import Tensor

from ms_diffsynth import runtime
from ms_diffsynth.registry import family
from ms_diffsynth.standin import mark


def marked(name, function):
    ms.runtime.synchronize()
    mark(f"{name} begins")
    result = function()
    ms.runtime.synchronize()
    mark(f"{name} ends")
    return result


if __name__ == "__main__":
    runtime.configure("graph", "Ascend")
    pipe = family("toy").pipeline.from_pretrained(sys.argv[1], mindspore_dtype=ms.bfloat16)
    dit = marked("loading", lambda: pipe.dit)
    latents, sigma, prompt = (Tensor(np.ones(shape, np.float32), ms.bfloat16).move_to("Ascend")
                              for shape in ((1, 4, 4, 4), (1,), (1, 16, 16)))
    for call in ("the first call", "the second call"):
        marked(call, lambda: dit(latents, sigma, prompt))
    sizes = " ".join(str(p.size * p.itemsize) for p in dit.get_parameters())
    sys.stdout.write(f"{sizes} {dit.layer_1.weight.device}\n")
