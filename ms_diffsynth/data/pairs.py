"""Images and their references, as they are trained: which is which, no check can tell, but a look does."""
from __future__ import annotations

import logging
from collections.abc import Sequence

from PIL import Image

from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.data.fonts import INSTALL, font_for
from ms_diffsynth.data.images import grid, side_by_side, to_rgb
from ms_diffsynth.errors import listing
from ms_diffsynth.redact import redact

logger = logging.getLogger(__name__)

SHOWN = 3


def rows_with_references(dataset: UnifiedDataset) -> list[int]:
    """Numbers of the rows that have any."""
    return [row for row, cells in enumerate(dataset.rows) if cells.get("edit_image")]


def as_list(cell: str | list) -> list:
    """What a cell ``edit_image`` names: one or several."""
    return cell if isinstance(cell, list) else [cell]


def some(rows: Sequence[int]) -> list[int]:
    """Three of them, or fewer, from everywhere."""
    return list(rows[:: max(1, len(rows) // SHOWN)][:SHOWN])


def pairs_sheet(dataset: UnifiedDataset) -> Image.Image | None:
    """Three rows with references, these on the left; None where none has any. A prompt that no font can write is the
    name of the image instead, which is logged. Raises: DataError of a damaged one."""
    pairs, texts, unwritten = [], [], []
    for row in some(rows_with_references(dataset)):
        cells = dataset.cells(row, ["image", "edit_image", "prompt"])
        image, images = cells["image"], [to_rgb(one) for one in as_list(cells["edit_image"])]
        pairs.append([side_by_side(images, image.height), image])
        text, name = redact(cells.get("prompt") or ""), dataset.rows[row]["image"]
        if font_for(text, 16) is None:
            unwritten.append(name)
            text = name if font_for(name, 16) else f"row {row + 1}"
        texts.append(f"reference | image to learn: {text}")
    if unwritten:
        logger.warning("no font of this system has the letters of the prompts of %s: beside their references they are "
                       "shown by name. %s", listing(unwritten), INSTALL)
    return grid(pairs, captions=texts) if pairs else None
