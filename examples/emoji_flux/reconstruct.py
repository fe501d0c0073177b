"""How well a VAE gives images back: PSNR of held-out images and of the cats, beside the best linear map, and a grid.

    python examples/emoji_flux/reconstruct.py runs/emoji-vae/vae data/emoji reconstructions.png

The linear map keeps as many numbers: the first principal components of the 8 x 8 patches of the training images, and
from each 3 x 3 of them back to a patch by least squares.
"""
from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np
from mindspore import Tensor
from PIL import Image

from ms_diffsynth import FluxImagePipeline, runtime
from ms_diffsynth.data.images import to_pil, to_pixels

PATCH, CHANNELS, SHOWN = 8, 16, 24


def read(folder: Path, table: str) -> np.ndarray:
    """The images of a table, float32 [N, 3, 64, 64] in [-1, 1]."""
    with (folder / table).open(encoding="utf-8", newline="") as file:
        return np.stack([to_pixels(Image.open(folder / row["image"])) for row in csv.DictReader(file)])


def psnr(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Of each image, in dB."""
    return 10 * np.log10(4 / ((images - np.clip(others, -1, 1).astype(np.float64)) ** 2).mean((1, 2, 3)))


def patches(images: np.ndarray) -> np.ndarray:
    """[N, 3, 8 h, 8 w] -> [N, h, w, 192]."""
    n, _, height, width = images.shape
    split = images.reshape(n, 3, height // PATCH, PATCH, width // PATCH, PATCH)
    return split.transpose(0, 2, 4, 1, 3, 5).reshape(n, height // PATCH, width // PATCH, -1)


def images_of(values: np.ndarray) -> np.ndarray:
    """`patches` backwards."""
    n, height, width, _ = values.shape
    split = values.reshape(n, height, width, 3, PATCH, PATCH).transpose(0, 3, 1, 4, 2, 5)
    return split.reshape(n, 3, height * PATCH, width * PATCH)


def linear(train: np.ndarray, images: np.ndarray) -> np.ndarray:
    """The images after the linear map that is fitted to ``train``."""
    known = patches(train).astype(np.float64)
    mean = known.mean((0, 1, 2))
    _, components = np.linalg.eigh(np.cov((known - mean).reshape(-1, known.shape[3]).T))

    def neighbours(values: np.ndarray) -> np.ndarray:
        codes = np.pad((values - mean) @ components[:, -CHANNELS:], [(0, 0), (1, 1), (1, 1), (0, 0)], mode="edge")
        height, width = values.shape[1:3]
        parts = [codes[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
        return np.concatenate([*parts, np.ones_like(parts[0][..., :1])], 3)

    inputs, outputs = neighbours(known).reshape(-1, 9 * CHANNELS + 1), known.reshape(-1, known.shape[3])
    weights = np.linalg.solve(inputs.T @ inputs + 1e-2 * np.eye(inputs.shape[1]), inputs.T @ outputs)
    return images_of(neighbours(patches(images).astype(np.float64)) @ weights)


def main(vae: str, folder: str, target: str) -> None:
    runtime.configure("graph")
    pipe, images = FluxImagePipeline.from_pretrained(vae), Path(folder)
    train = read(images, "train.csv")
    for name in ("held_out", "cats"):
        originals = read(images, f"{name}.csv")
        given = [pipe.vae.decode(Tensor(np.split(pipe.vae.encode(Tensor(x[None]))[0].asnumpy(), 2, 1)[0]))[0].asnumpy()
                 for x in originals]
        found = np.concatenate(given)
        print(f"{name}: {psnr(originals, found).mean():.2f} dB (worst {psnr(originals, found).min():.2f}), linear map "
              f"{psnr(originals, linear(train, originals)).mean():.2f} dB, {len(originals)} images")
        if name == "held_out":
            shown = np.linspace(0, len(originals) - 1, SHOWN).astype(int)
            rows = [np.concatenate([to_pil(x[k]) for k in shown[part : part + 12]], 1)
                    for part in range(0, SHOWN, 12) for x in (originals, found)]
            image = Image.fromarray(np.concatenate(rows))
            image.resize((2 * image.width, 2 * image.height), Image.Resampling.NEAREST).save(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
