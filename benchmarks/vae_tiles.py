"""A VAE in tiles against the whole: peak memory, and how far results are from each other. float32, PyNative, the CPU.

    python benchmarks/vae_tiles.py encode|decode SIDE TILE      # peak; pixels; latent pixels, 0 = whole
    python benchmarks/vae_tiles.py difference FAMILY TILE [STRIDE]

The peak is that of an AutoencoderKL of a quarter of FLUX.1's width with random numbers. The difference is that of a
family's tiny model on a smooth image of 256 pixels; the stride is half of a tile unless it is given.
"""
from __future__ import annotations

import resource
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import numpy as np
from mindspore import Tensor

from ms_diffsynth import runtime
from ms_diffsynth.pipelines.flux.tiny import CONFIGS
from ms_diffsynth.pipelines.shared.autoencoder_kl import build_autoencoder_kl
from ms_diffsynth.registry import family


def peak() -> float:
    """Of the process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def smooth_image(side: int) -> np.ndarray:
    """Three waves across the image, one in each colour; [1, 3, side, side] in -0.8 to 0.8."""
    y, x = np.mgrid[:side, :side] / side
    angles = 2 * np.pi * np.stack([x + y, 2 * x, 1.5 * y])[None]
    return (0.8 * np.sin(angles)).astype(np.float32)


def difference(name: str, tile: int, stride: int | None = None) -> None:
    with tempfile.TemporaryDirectory() as folder:
        import_module(f"ms_diffsynth.pipelines.{name}.tiny").write_tiny(Path(folder) / name)
        pipe = family(name).pipeline.from_pretrained(f"{folder}/{name}")
        image = Tensor(smooth_image(256))
        given = {"encode": image, "decode": pipe.vae.encode(image, tiled=False)}
        for what, value in given.items():
            method = getattr(pipe.vae, what)
            whole = method(value, tiled=False).asnumpy()
            error = method(value, tiled=True, tile_size=tile, tile_stride=stride).asnumpy() - whole
            print(f"{what} {name}, tiles of {tile}, one every {stride or tile // 2}: relative difference "
                  f"{np.sqrt((error ** 2).mean() / (whole ** 2).mean()):.3f}, largest "
                  f"{np.abs(error).max() / np.abs(whole).max():.3f}")


def peak_memory(what: str, side: int, tile: int) -> None:
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
    runtime.configure("pynative", "CPU")
    if sys.argv[1] == "difference":
        difference(sys.argv[2], *map(int, sys.argv[3:]))
    else:
        peak_memory(sys.argv[1], *map(int, sys.argv[2:]))
