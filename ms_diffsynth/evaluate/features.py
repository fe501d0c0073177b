"""Images, and the numbers that stand for each: what EfficientNet-Lite0 sees in it, and its coarse pixels."""
from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mindspore import Tensor
from PIL import Image

from ms_diffsynth import runtime
from ms_diffsynth.data.images import read_image
from ms_diffsynth.data.metadata import read_folder
from ms_diffsynth.data.operators import crop_and_resize
from ms_diffsynth.errors import DataError
from ms_diffsynth.evaluate.network import SIZE, EfficientNetLite0
from ms_diffsynth.evaluate.weights import load_weights

_BATCH = 8  # images; more are hardly faster, and the largest layer takes 20 MB for each
_COARSE = 16  # pixels, both sides


class ImageFolder(Sequence):
    """The images below a folder, sorted by name, each read when it is asked for. Hidden names are left out.

    Raises: DataError when there is no such folder, or it contains no image.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise DataError(f"{folder} is not a folder: expected a folder of images. Correct the path.")
        self.names: tuple[str, ...] = tuple(row["image"] for row in read_folder(str(folder), captions=False).rows)
        if not self.names:
            raise DataError(f"{folder} contains no images: expected .png, .jpg, .webp or the like in it, or in folders "
                            "below it. Correct the path.")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Image.Image:
        return read_image(str(self.folder / self.names[index]))

    def files(self) -> set[Path]:
        """Where the images are, once all links are followed."""
        return {(self.folder / name).resolve() for name in self.names}


@dataclass(frozen=True, kw_only=True, eq=False)
class Described:
    """A set of images as numbers, float64."""

    features: np.ndarray  # [N, 1280]
    pixels: np.ndarray  # [N, 768], 16 x 16 averages in [0, 255]
    sizes: frozenset[tuple[int, int]]  # (height, width) in pixels, of the images as they were given


class Describer:
    """EfficientNet-Lite0 with its trained weights.

    Raises: DeviceError without the extra [eval]; WeightError when its file is damaged.
    """

    def __init__(self) -> None:
        weights = load_weights()
        runtime.current()
        self._network = EfficientNetLite0(weights)

    def __call__(self, images: Sequence[Image.Image], size: tuple[int, int] | None = None) -> Described:
        """Describe images; with ``size`` (height, width) each is first scaled and cropped to it, as for training.

        Raises: DataError that names every image that cannot be read.
        """
        features, pixels, sizes, problems = [], [], set(), []
        for start in range(0, len(images), _BATCH):
            batch = []
            for index in range(start, min(start + _BATCH, len(images))):
                try:
                    image = images[index].convert("RGB")
                except DataError as error:
                    problems.append(str(error))
                    continue
                sizes.add(image.size[::-1])
                image = crop_and_resize(image, *size) if size else image
                batch.append(network_input(image))
                coarse = image.resize((_COARSE, _COARSE), Image.Resampling.BOX)
                pixels.append(np.asarray(coarse, np.float64).ravel())
            if not problems:
                features.append(self._network(Tensor(np.stack(batch))).asnumpy())
        if problems:
            raise DataError("\n  ".join([f"{len(problems)} of {len(images)} images cannot be used:", *problems]))
        return Described(features=np.concatenate(features).astype(np.float64), pixels=np.stack(pixels),
                         sizes=frozenset(sizes))


def network_input(image: Image.Image) -> np.ndarray:
    """Float32 [3, 224, 224], (x - 127) / 128. Pillow widens the bicubic filter when it shrinks, so nothing aliases."""
    small = image.resize((SIZE, SIZE), Image.Resampling.BICUBIC)
    return ((np.asarray(small, np.float32) - 127) / 128).transpose(2, 0, 1)
