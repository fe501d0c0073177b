"""Edges of a folder of images, as control images for a ControlNet: python make_edges.py IMAGES OUT

IMAGES has a metadata.csv with the columns image and prompt. OUT gets a copy of the images, their edges and a
metadata.csv with the columns image, control_image and prompt.
"""
from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path

from PIL import Image, ImageChops, ImageFilter

THRESHOLD = 40  # of the difference to a neighbour, of 255
STYLES = {"a noto emoji of": "an emoji of", "a fluent3d emoji of": "a 3d render of"}  # as emoji-flux knows them


def edges(image: Image.Image) -> Image.Image:
    """White lines where the brightness or a colour changes, on black."""
    smooth = image.convert("RGB").filter(ImageFilter.GaussianBlur(0.6))
    steps = [ImageChops.difference(smooth, ImageChops.offset(smooth, *by)) for by in ((1, 0), (0, 1))]
    strongest = ImageChops.lighter(*steps).split()
    line = ImageChops.lighter(ImageChops.lighter(strongest[0], strongest[1]), strongest[2])
    line = line.point(lambda value: 255 if value > THRESHOLD else 0)
    line.paste(0, (0, 0, 1, line.height))  # offsets go round
    line.paste(0, (0, 0, line.width, 1))
    return line.convert("1")


def main(source: Path, out: Path) -> None:
    for name in ("images", "edges"):
        (out / name).mkdir(parents=True, exist_ok=True)
    with (source / "metadata.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    with (out / "metadata.csv").open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(("image", "control_image", "prompt"))
        for row in rows:
            name = Path(row["image"]).with_suffix(".png").name
            shutil.copy(source / row["image"], out / "images" / name)
            edges(Image.open(source / row["image"])).save(out / "edges" / name)
            prompt = row["prompt"]
            for theirs, ours in STYLES.items():
                prompt = prompt.replace(theirs, ours)
            table.writerow((f"images/{name}", f"edges/{name}", prompt))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
