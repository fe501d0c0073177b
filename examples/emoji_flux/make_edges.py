"""Emoji at many places and sizes, and their edges, as control images: python make_edges.py IMAGES OUT

IMAGES has a metadata.csv with the columns image and prompt. OUT gets COPIES of every image, each smaller, somewhere
else and half of them mirrored, their edges, and a metadata.csv with the columns image, control_image and prompt. The
prompt says what is drawn; where, how large and which way round is in the edges alone, so that there is something to
learn for a model that knows the images by heart.
"""
from __future__ import annotations

import csv
import hashlib
import sys
from pathlib import Path

from PIL import Image, ImageChops, ImageFilter, ImageOps

COPIES = 6
LEAST, MOST = 0.4, 0.9  # of the side of the frame
THRESHOLD = 40  # of the difference to a neighbour, of 255
STYLES = {"a noto emoji of": "an emoji of", "a fluent3d emoji of": "a 3d render of"}  # as emoji-flux knows them


def moved(image: Image.Image, name: str) -> Image.Image:
    """The image smaller, somewhere else and perhaps mirrored, on white; how follows from ``name``."""
    size, across, down, mirror = (byte / 255 for byte in hashlib.sha256(name.encode()).digest()[:4])
    side = round(image.width * (LEAST + (MOST - LEAST) * size))
    small = image.convert("RGB").resize((side, side), Image.Resampling.LANCZOS)
    sheet = Image.new("RGB", image.size, "white")
    sheet.paste(ImageOps.mirror(small) if mirror < 0.5 else small,
                (round(across * (image.width - side)), round(down * (image.height - side))))
    return sheet


def edges(image: Image.Image) -> Image.Image:
    """White lines where the brightness or a colour changes, on black."""
    smooth = image.filter(ImageFilter.GaussianBlur(0.6))
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
            image, prompt = Image.open(source / row["image"]), row["prompt"]
            for theirs, ours in STYLES.items():
                prompt = prompt.replace(theirs, ours)
            for k in range(COPIES):
                name = f"{Path(row['image']).stem}_{k}.png"
                copy = moved(image, name)
                copy.save(out / "images" / name)
                edges(copy).save(out / "edges" / name)
                table.writerow((f"images/{name}", f"edges/{name}", prompt))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
