"""One evaluation of generated images against reference images: the metric, the memorisation check, the files."""
from __future__ import annotations

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from ms_diffsynth.data.images import grid, png_bytes
from ms_diffsynth.errors import DataError
from ms_diffsynth.evaluate.features import Described, Describer, ImageFolder
from ms_diffsynth.evaluate.kid import FEWEST, LABEL, MOST, Estimate, drawn, floor, kid
from ms_diffsynth.evaluate.memorisation import Neighbours, neighbours
from ms_diffsynth.storage.files import write_file

logger = logging.getLogger(__name__)

FEW = 50  # images below which an evaluation says that it is a hint only
_SHOWN, _COLUMNS = 12, 6  # generated images in the grid
_CELLS = (128, 96, 64, 48)  # pixels; pure noise fits with the last
_MOST_BYTES = 300_000


@dataclass(frozen=True, kw_only=True, eq=False)
class Evaluation:
    """What was found. Shapes: ``features`` and ``pixels`` hold one neighbour for each generated image."""

    kid: Estimate
    floor: tuple[float, float]  # where 95 % of random halves of the reference are against each other
    features: Neighbours
    pixels: Neighbours
    names: tuple[str, ...]
    reference_names: tuple[str, ...]
    notes: tuple[str, ...]
    nearest_png: bytes  # generated images nearest to the reference, beside their neighbours
    seed: int

    @property
    def is_memorised(self) -> np.ndarray:
        """Which generated images are suspiciously near to a reference image, in either space."""
        return self.features.is_near | self.pixels.is_near

    @property
    def memorised(self) -> float:
        """Their share. Images that no network has seen score about 0.1."""
        return float(self.is_memorised.mean())

    def record(self) -> dict[str, float]:
        """The numbers of one line of a log."""
        return {"kid": self.kid.value, "kid_low": self.kid.low, "kid_high": self.kid.high,
                "kid_floor": self.floor[1], "memorised": self.memorised}

    def summary(self) -> str:
        """A few lines to read."""
        count, flagged = len(self.names), int(self.is_memorised.sum())
        first = int(np.minimum(self.features.closeness, self.pixels.closeness).argmin())
        found = self.features if self.features.closeness[first] <= self.pixels.closeness[first] else self.pixels
        lines = [LABEL,
                 f"  KID        {self.kid}, {count} generated, {len(self.reference_names)} reference images",
                 f"  floor      {self.floor[0]:.4f} to {self.floor[1]:.4f}, as 95 % of random halves of the reference "
                 "against each other",
                 f"  memorised  {flagged} of {count} ({100 * self.memorised:.0f} %) are as near to a reference image "
                 "as only 5 % of those are to each other:",
                 f"             {self.features.is_near.sum()} in features, {self.pixels.is_near.sum()} in pixels; the "
                 f"nearest is {self.names[first]} to {self.reference_names[found.index[first]]}"]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])

    def to_json(self) -> dict[str, Any]:
        """All numbers, with the neighbours of every image."""
        spaces = {"features": self.features, "pixels": self.pixels}
        return {
            "metric": LABEL, "kid": asdict(self.kid), "floor": {"low": self.floor[0], "high": self.floor[1]},
            "generated": len(self.names), "reference": len(self.reference_names), "seed": self.seed,
            "memorised": {"share": self.memorised,
                          **{name: {"share": float(space.is_near.mean()), "limit": space.limit}
                             for name, space in spaces.items()}},
            "notes": list(self.notes),
            "nearest": [{"image": image, "is_memorised": bool(self.is_memorised[k]),
                         **{name: {"reference": self.reference_names[space.index[k]],
                                   "distance": float(space.distance[k])} for name, space in spaces.items()}}
                        for k, image in enumerate(self.names)],
        }

    def save(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Write evaluation.json and nearest.png. Raises: OutputError."""
        paths = [Path(folder, "evaluation.json"), Path(folder, "nearest.png")]
        write_file(paths[0], (json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n").encode())
        write_file(paths[1], self.nearest_png)
        return paths


class Evaluator:
    """Compares generated images with one folder of reference images, which is described only once.

    Reference images are scaled and cropped to the size of the generated ones, as for training; so they are described
    once for each such size, at the first evaluation or, with ``size`` (height, width), right away.

    Raises: DeviceError without the extra [eval]; DataError for an unusable reference.
    """

    def __init__(self, reference: str | os.PathLike[str], seed: int = 0, size: tuple[int, int] | None = None):
        self.reference, self.seed = ImageFolder(reference), seed
        refuse_few(reference=len(self.reference))
        self._describe = Describer()
        self._known: dict[tuple[int, int] | None, tuple[Described, tuple[float, float]]] = {}
        if size:
            self._reference_at(size)

    def evaluate(self, images: Sequence[Image.Image] | ImageFolder) -> Evaluation:
        """Evaluate images of any size. Raises: DataError naming all that are wrong."""
        refuse_few(generated=len(images))
        given = self._describe(images)
        size = next(iter(given.sizes)) if len(given.sizes) == 1 else None
        reference, real_halves = self._reference_at(size)
        found = kid(drawn(given.features, self.seed), drawn(reference.features, self.seed))
        features = neighbours(given.features, reference.features)
        pixels = neighbours(given.pixels, reference.pixels)
        names = getattr(images, "names", tuple(f"image {k}" for k in range(1, len(images) + 1)))
        notes, count, references = [], len(images), len(self.reference)
        if min(count, references) < FEW:
            notes.append(f"the set is too small ({count} generated, {references} reference images): below {FEW} KID is "
                         "a hint only. Look at its interval.")
        if max(count, references) > MOST:
            notes.append(f"KID was computed from {MOST} images of a set, drawn at random; neighbours from all.")
        if found.value <= real_halves[1]:
            notes.append("KID is within the floor: with this many images it finds no difference from real ones.")
        if size is None:
            notes.append(f"the generated images have {len(given.sizes)} sizes, so the reference was not resized to "
                         "one.")
        elif given.sizes != reference.sizes:
            notes.append(f"reference images were scaled and cropped to {size[1]} x {size[0]} pixels, as for training.")
        if features.twins:
            notes.append(f"{features.twins} reference images have a twin in the reference; twins do not count for the "
                         "limit.")
        return Evaluation(kid=found, floor=real_halves, features=features, pixels=pixels, names=tuple(names),
                          reference_names=self.reference.names, notes=tuple(notes), seed=self.seed,
                          nearest_png=_nearest_png(images, self.reference, features, pixels))

    def _reference_at(self, size: tuple[int, int] | None) -> tuple[Described, tuple[float, float]]:
        if size not in self._known:
            logger.info("describing %d reference images of %s", len(self.reference), self.reference.folder)
            described = self._describe(self.reference, size)
            self._known[size] = described, floor(drawn(described.features, self.seed), self.seed)
        return self._known[size]


def evaluate(generated: Sequence[Image.Image] | str | os.PathLike[str], reference: str | os.PathLike[str],
             seed: int = 0) -> Evaluation:
    """Compare a list or a folder of generated images with a folder of reference images.

    Raises: DeviceError without the extra [eval]; DataError for folders without images, with fewer than 4, with
        damaged ones (all are named), or that share files.
    """
    if not isinstance(generated, (str, os.PathLike)):
        return Evaluator(reference, seed).evaluate(generated)
    folder, other = ImageFolder(generated), ImageFolder(reference)
    shared = folder.files() & other.files()
    if shared:
        where = ("they are the same folder" if folder.folder.resolve() == other.folder.resolve()
                 else f"{len(shared)} images are in both, such as {min(shared)}")
        raise DataError(f"generated={generated} and reference={reference}: {where}, so only copies would be found. "
                        "Expected generated images and, apart from them, real ones. Correct a path.")
    refuse_few(generated=len(folder), reference=len(other))
    return Evaluator(reference, seed).evaluate(folder)


def refuse_few(**counts: int) -> None:
    """Raise a DataError that names every set of fewer than 4 images."""
    few = [f"{count} {name} images" for name, count in counts.items() if count < FEWEST]
    if few:
        raise DataError(f"{' and '.join(few)} were given: expected at least {FEWEST}, and {FEW} or more for a KID that "
                        "is meaningful. Add images.")


def _nearest_png(images: Sequence[Image.Image], reference: ImageFolder, features: Neighbours,
                 pixels: Neighbours) -> bytes:
    """The generated images nearest to the reference above their neighbours in both spaces, as a PNG below 300 kB."""
    order = np.minimum(features.closeness, pixels.closeness).argsort(kind="stable")[:_SHOWN]
    for cell in _CELLS:
        rows, captions = [], []
        for shown in np.split(order, range(_COLUMNS, len(order), _COLUMNS)):
            groups = [("generated", [images[k] for k in shown])]
            for name, space in (("features", features), ("pixels", pixels)):
                closeness = ", ".join(f"{space.closeness[k]:.2f}" for k in shown)
                row = [reference[space.index[k]] for k in shown]
                groups.append((f"nearest in {name} (1: the limit): {closeness}", row))
            for caption, row in groups:
                captions.append(caption)
                rows.append([ImageOps.contain(image.convert("RGB"), (cell, cell)) for image in row])
        content = png_bytes(grid(rows, captions), optimize=True)
        if len(content) <= _MOST_BYTES:
            break
    return content
