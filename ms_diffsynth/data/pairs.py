"""Images and their references, as they are trained: which is which, no check can tell, but a look does."""
from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.data.images import grid, side_by_side, to_rgb
from ms_diffsynth.redact import redact

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
    """Three rows with references, these on the left; None where none has any. Raises: DataError of a damaged one."""
    pairs, prompts = [], []
    for row in some(rows_with_references(dataset)):
        cells = dataset.cells(row, ["image", "edit_image", "prompt"])
        image, images = cells["image"], [to_rgb(one) for one in as_list(cells["edit_image"])]
        pairs.append([side_by_side(images, image.height), image])
        prompts.append(redact(f"reference | image to learn: {cells.get('prompt', '')}"))
    return grid(pairs, captions=prompts) if pairs else None
