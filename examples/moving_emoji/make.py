"""Build a small data set of videos: emoji of 64 x 64 pixels that move, turn and grow, 17 frames at 16 a second.

    python examples/moving_emoji/make.py data/moving_emoji

The emoji are those of examples/data/smileys64 (Noto Emoji, Apache-2.0, and Microsoft Fluent Emoji, MIT), which the
repository brings; nothing is downloaded. Every emoji may move in every way; which of these videos are made, where they
begin and how fast they are follows from their names and the seed. What is written:

    videos/           <vendor>_<code point>_<motion>.webp, animated, without loss; with --mp4 .mp4 (extra [video])
    metadata.csv      video, prompt, vendor, emoji, motion: what is trained on
    held_out.csv      the same of 5 % of the videos: emoji and motions that are trained on, but not together
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import io
import math
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from ms_diffsynth.data.previews import mp4_bytes

SIZE, FRAMES, FPS = 64, 17, 16
FINE = 4  # everything is drawn four times as large and made smaller, so that half a pixel can be seen
SOURCE = Path(__file__).parents[1] / "data/smileys64"
STYLES = {"noto": "an emoji of", "fluent3d": "a 3d render of"}
COLUMNS = ("video", "prompt", "vendor", "emoji", "motion")
HELD_OUT = 0.05
Pose = tuple[float, float, float, float]  # centre x and y, from -1 to 1; side as a part of the frame; degrees

# from the part of the time that has passed, -1 to 1, to where the emoji is, beside where it stands and how large it is
MOTIONS: dict[str, Callable[[float, float, float, float], Pose]] = {
    "moving left to right": lambda t, x, y, side: (0.42 * t, y, side, 0),
    "moving right to left": lambda t, x, y, side: (-0.42 * t, y, side, 0),
    "moving up": lambda t, x, y, side: (x, -0.42 * t, side, 0),
    "moving down": lambda t, x, y, side: (x, 0.42 * t, side, 0),
    "growing": lambda t, x, y, side: (x / 4, y / 4, 0.6 + 0.3 * t, 0),
    "shrinking": lambda t, x, y, side: (x / 4, y / 4, 0.6 - 0.3 * t, 0),
    "turning clockwise": lambda t, x, y, side: (x / 2, y / 2, side + 0.1, -180 * (t + 1)),
    "turning counterclockwise": lambda t, x, y, side: (x / 2, y / 2, side + 0.1, 180 * (t + 1)),
    "bouncing": lambda t, x, y, side: (x, 0.4 - 0.8 * abs(math.sin(math.pi * (t + 1))), side, 0),
}


def draws(*names: str) -> np.ndarray:
    """Eight numbers from 0 to 1 that follow from names alone."""
    digest = hashlib.sha256("/".join(names).encode()).digest()
    return np.frombuffer(digest, ">u4").astype(np.float64) / 2**32


def frames_of(image: Image.Image, motion: str, chance: np.ndarray) -> np.ndarray:
    """An emoji in motion, on white. Shapes: -> uint8 [17, 64, 64, 3]."""
    x, y, side = 0.3 * (2 * chance[0] - 1), 0.3 * (2 * chance[1] - 1), 0.5 + 0.1 * chance[2]
    speed, frames, wide = 0.8 + 0.2 * chance[3], [], FINE * SIZE
    for k in range(FRAMES):
        across, down, scale, angle = MOTIONS[motion]((2 * k / (FRAMES - 1) - 1) * speed, x, y, side)
        sides = round(scale * wide)
        emoji = image.resize((sides, sides), Image.Resampling.BICUBIC)
        emoji = emoji.rotate(angle, Image.Resampling.BICUBIC, fillcolor="white")
        sheet = Image.new("RGB", (wide, wide), "white")
        sheet.paste(emoji, (round((1 + across) / 2 * wide - sides / 2), round((1 + down) / 2 * wide - sides / 2)))
        frames.append(np.asarray(sheet.reduce(FINE)))
    return np.stack(frames)


def webp(video: np.ndarray) -> bytes:
    """An animated WebP without loss, which every machine reads the same way."""
    images, file = [Image.fromarray(frame) for frame in video], io.BytesIO()
    ends = [round(1000 * (k + 1) / FPS) for k in range(len(images))]
    delays = [end - begin for begin, end in zip([0, *ends], ends)]
    images[0].save(file, "WEBP", save_all=True, append_images=images[1:], duration=delays, loop=0, lossless=True)
    return file.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description="Build the data set of moving emoji.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=600, help="how many videos (default: 600)")
    parser.add_argument("--seed", default="0", help="which of all there could be (default: 0)")
    parser.add_argument("--vendor", choices=tuple(STYLES), help="emoji of one style alone")
    parser.add_argument("--only", default="", help="names that hold this, such as cat")
    parser.add_argument("--mp4", action="store_true", help="write MP4 instead of animated WebP")
    args = parser.parse_args()
    with open(SOURCE / "metadata.csv", encoding="utf-8", newline="") as file:
        emoji = [(row["image"], row["vendor"], re.sub(r"^a \w+ emoji of ", "", row["prompt"]))
                 for row in csv.DictReader(file)]
    pairs = [(*found, motion) for found in emoji for motion in MOTIONS
             if args.vendor in (None, found[1]) and args.only in found[2]]
    pairs.sort(key=lambda pair: draws(args.seed, *pair)[7])
    rows: dict[bool, list[tuple[str, ...]]] = {False: [], True: []}
    (args.folder / "videos").mkdir(parents=True, exist_ok=True)
    for image, vendor, name, motion in pairs[:args.count]:
        chance = draws(args.seed, image, motion)
        video = frames_of(Image.open(SOURCE / image).convert("RGB"), motion, chance)
        path = f"videos/{Path(image).stem}_{motion.replace(' ', '_')}.{'mp4' if args.mp4 else 'webp'}"
        (args.folder / path).write_bytes(mp4_bytes(video, FPS) if args.mp4 else webp(video))
        rows[bool(chance[4] < HELD_OUT)].append((path, f"{STYLES[vendor]} {name} {motion}", vendor, name, motion))
    for is_held_out, name in ((False, "metadata.csv"), (True, "held_out.csv")):
        with open(args.folder / name, "w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *sorted(rows[is_held_out])])
    print(f"{len(rows[False])} videos to train on and {len(rows[True])} held out in {args.folder}")


if __name__ == "__main__":
    main()
