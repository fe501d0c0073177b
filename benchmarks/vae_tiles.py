"""Peak memory of a VAE, whole or in tiles: a quarter of FLUX.1's width, random numbers, float32, PyNative on the CPU.

    python benchmarks/vae_tiles.py encode|decode SIDE TILE      # pixels; latent pixels, 0 = whole
"""
from __future__ import annotations

import resource
import sys

import numpy as np
from mindspore import Tensor

from ms_diffsynth import runtime
from ms_diffsynth.pipelines.flux.tiny import CONFIGS
from ms_diffsynth.pipelines.shared.autoencoder_kl import build_autoencoder_kl


def peak() -> float:
    """Of the process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main(what: str, side: int, tile: int) -> None:
    runtime.configure("pynative", "CPU")
    widths = {"block_out_channels": [32, 64, 128, 128], "layers_per_block": 2, "norm_num_groups": 32}
    vae = build_autoencoder_kl(CONFIGS["vae"] | widths).set_train(False)

    def normal(*shape: int) -> Tensor:
        return Tensor(np.random.default_rng(0).standard_normal(shape).astype(np.float32))

    vae.decode(vae.encode(normal(1, 3, 64, 64), tiled=False), tiled=False).asnumpy()  # what everything needs
    before, how = peak(), {"tiled": tile > 0, "tile_size": tile or None}
    image = normal(1, 3, side, side) if what == "encode" else normal(1, 16, side // 8, side // 8)
    getattr(vae, what)(image, **how).asnumpy()
    print(f"{what} {side} x {side}, {f'tiles of {tile}' if tile else 'whole'}: peak {peak():.2f} GiB, grown by "
          f"{peak() - before:.2f} GiB")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
