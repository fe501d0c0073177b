"""Measure what a model drew: images of prompts, what DreamBooth taught of the cat and left of everything else, and what
became of images that were edited.

    python examples/emoji_flux/evaluate.py prompts emoji-flux data/emoji out/prompts
    python examples/emoji_flux/evaluate.py cat emoji-flux data/emoji out/cat --lora runs/emoji-cat/step-600.safetensors
    python examples/emoji_flux/evaluate.py edit emoji-flux data/emoji out/edit --weights WEIGHTS_OF_A_RUN

An image is found again among all images of its style, as the VAE gives them back, by what EfficientNet-Lite0 sees in
them: the cosine of features from which the mean of all is taken. Needs ``pip install '.[eval]'``.
"""
from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from mindspore import Tensor
from PIL import Image

from ms_diffsynth import FluxImagePipeline, runtime
from ms_diffsynth.data.images import grid, to_pil, to_pixels
from ms_diffsynth.evaluate.features import Describer
from ms_diffsynth.evaluate.kid import floor, kid

SEEN, SHOWN, COLUMNS = 200, 64, 8  # captions of training that are drawn; images in the grid, and in its row
CAT_PROMPTS = ["a 3d render of sks cat"] * 4  # and the nine captions of the cat
CLASS_PROMPTS = [f"a 3d render of {name}" for name in ("koala", "dog face", "panda", "pig face", "fox", "grinning face",
                                                       "face with tears of joy", "crying face")]
NEW_PROMPTS = ["a 3d render of sleeping sks cat", "a 3d render of sks cat with sunglasses"]


class Emoji:
    """The images of make_images.py, as the VAE gives them back, and their features [N, 1280]."""

    def __init__(self, folder: Path, pipe: FluxImagePipeline, splits: Sequence[str]):
        self.rows = [row | {"split": split} for split in splits for row in table(folder / f"{split}.csv")]
        self.images = [rebuilt(pipe, Image.open(folder / row["image"])) for row in self.rows]
        self.describe = Describer()
        self.features = self.describe(self.images).features

    def where(self, **wanted: str) -> np.ndarray:
        """Indices of the rows that have these values."""
        return np.array([k for k, row in enumerate(self.rows) if all(row[n] == v for n, v in wanted.items())])

    def nearest(self, images: Sequence[Image.Image], pool: np.ndarray) -> np.ndarray:
        """Of each image, the pool's indices from the most alike on: int [N, len(pool)]."""
        mean = self.features[pool].mean(0)
        known, found = unit(self.features[pool] - mean), unit(self.describe(images).features - mean)
        return pool[np.argsort(-(found @ known.T), axis=1)]


def table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def rebuilt(pipe: FluxImagePipeline, image: Image.Image) -> Image.Image:
    """An image after the VAE: no network can draw it better."""
    moments = pipe.vae.encode(Tensor(to_pixels(image.convert("RGB"))[None]))[0].asnumpy()
    return to_pil(pipe.vae.decode(Tensor(np.split(moments, 2, 1)[0]))[0].asnumpy()[0])


def draw(pipe: FluxImagePipeline, prompts: Sequence[str], first_seed: int, **how: Any) -> list[Image.Image]:
    return [pipe(prompt=prompt, seed=first_seed + k, **how) for k, prompt in enumerate(prompts)]


def sheet(images: Sequence[Image.Image], names: Sequence[str], path: Path) -> None:
    """Eight in a row, their names above the row."""
    parts = range(0, len(images), COLUMNS)
    grid([images[k : k + COLUMNS] for k in parts],
         captions=[" | ".join(names[k : k + COLUMNS]) for k in parts]).save(path, optimize=True)


def prompts(pipe: FluxImagePipeline, emoji: Emoji, out: Path, seed: int, how: dict[str, Any]) -> dict[str, Any]:
    """Retrieval of drawn captions, the style they are of, and KID; a grid of those seen in training."""
    picked = {"seen": np.random.default_rng(0).permutation(emoji.where(split="base"))[:SEEN],
              "held out": emoji.where(split="base_held_out")}
    results: dict[str, Any] = {}
    everything = np.arange(len(emoji.rows))
    for name, rows in picked.items():
        images = draw(pipe, [emoji.rows[k]["prompt"] for k in rows], seed, **how)
        firsts, fives, styles = [], [], []
        for image, k in zip(images, rows):
            pool = emoji.where(vendor=emoji.rows[k]["vendor"])
            names = [emoji.rows[j]["name"] for j in emoji.nearest([image], pool)[0, :5]]
            firsts.append(names[0] == emoji.rows[k]["name"])
            fives.append(emoji.rows[k]["name"] in names)
            styles.append(emoji.rows[emoji.nearest([image], everything)[0, 0]]["vendor"] == emoji.rows[k]["vendor"])
        real = emoji.features[emoji.where(split="base")]
        results[name] = {
            "captions": len(rows), "top 1": float(np.mean(firsts)), "top 5": float(np.mean(fives)),
            "chance of top 5": round(5 / len(pool), 4), "style right": float(np.mean(styles)),
            "kid": kid(emoji.describe(images).features, real).value}
        sheet(images[:SHOWN], [emoji.rows[k]["name"] for k in rows[:SHOWN]], out / f"{name.replace(' ', '_')}.png")
    results["kid of real halves, up to"] = floor(real)[1]
    return results


def cat(pipe: FluxImagePipeline, emoji: Emoji, out: Path, lora: Path, seed: int, how: dict[str, Any]) -> dict[str, Any]:
    """Before and after: is the nearest neighbour one of the nine cats, which of the nine, and what became of others."""
    cats = emoji.where(split="cats")
    captions = {row["image"].removesuffix(".png"): row["prompt"] for row in
                table(Path(__file__).parents[1] / "data/dreambooth_cat_fluent/expressions.csv")}
    expressions = [captions[emoji.rows[k]["image"].rpartition("_")[2].removesuffix(".png")] for k in cats]
    asked = [*CAT_PROMPTS, *expressions]
    pool = np.concatenate([emoji.where(vendor="fluent", split="base"), cats])
    results: dict[str, Any] = {"cat prompts": len(asked), "expressions": len(expressions)}
    classes: list[np.ndarray] = []
    rows: list[list[Image.Image]] = []
    for when in ("before", "after"):
        if when == "after":
            pipe.load_lora(None, lora)
        images, others = draw(pipe, asked, seed, **how), draw(pipe, CLASS_PROMPTS, seed, **how)
        new = draw(pipe, NEW_PROMPTS, seed, **how)
        nearest = emoji.nearest(images, pool)[:, 0]
        among = emoji.nearest(images[len(CAT_PROMPTS):], cats)[:, 0]
        classes.append(unit(emoji.describe(others).features - emoji.features[pool].mean(0)))
        results[when] = {"nearest is one of the cats": int(np.isin(nearest, cats).sum()),
                         "expression right": int((among == cats).sum())}
        rows.append([*images[len(CAT_PROMPTS) - 1:], *new, *others])
    results["class images, cosine"] = {name: round(float(a @ b), 3) for name, a, b in zip(CLASS_PROMPTS, *classes)}
    titles = [asked[len(CAT_PROMPTS) - 1], *expressions, *NEW_PROMPTS, *CLASS_PROMPTS]
    for when, images in zip(("before", "after"), rows):
        sheet(images, [title.removeprefix("a 3d render of ") for title in titles], out / f"{when}.png")
    return results


class Edits:
    """The held-out pairs of make_images.py, and how near an answer is to what was asked for."""

    def __init__(self, folder: Path, pipe: FluxImagePipeline, emoji: Emoji):
        self.rows, self.emoji = table(folder / "edits_held_out.csv"), emoji
        self.references, self.targets = ([Image.open(folder / row[column]).convert("RGB") for row in self.rows]
                                         for column in ("edit_image", "image"))
        self.copies, self.wanted = ([rebuilt(pipe, image) for image in images]
                                    for images in (self.references, self.targets))

    def judge(self, answers: Sequence[Image.Image]) -> dict[str, dict[str, float]]:
        """By the kind of edit: the distance to the result that was wanted, root mean square of 0 to 1; how often that
        result is the nearest one; and how often what is nearest is of its style.

        Style edits: nearest of all images of that style, by features. Skins: of the five skins and the yellow one, by
        pixels.
        """
        found: dict[str, dict[str, float]] = {}
        for kind in dict.fromkeys(row["kind"] for row in self.rows):
            own = [k for k, row in enumerate(self.rows) if row["kind"] == kind]
            scores = {"pairs": len(own), "distance": np.mean([distance(answers[k], self.wanted[k]) for k in own]),
                      "right": np.mean([self.is_right(k, answers[k]) for k in own])}
            if kind != "skin":
                nearest = self.emoji.nearest([answers[k] for k in own], np.arange(len(self.emoji.rows)))[:, 0]
                scores["style right"] = np.mean([self.emoji.rows[j]["vendor"] == kind for j in nearest])
            found[kind] = {name: round(float(value), 4) for name, value in scores.items()}
        return found

    def is_right(self, k: int, answer: Image.Image) -> bool:
        row = self.rows[k]
        if row["kind"] == "skin":
            others = {other["image"]: self.wanted[j] for j, other in enumerate(self.rows)
                      if other["edit_image"] == row["edit_image"]} | {row["edit_image"]: self.copies[k]}
            return min(others, key=lambda name: distance(answer, others[name])) == row["image"]
        first = self.emoji.nearest([answer], self.emoji.where(vendor=row["kind"]))[0, 0]
        return self.emoji.rows[first]["image"] == row["image"]

    def sheet(self, rows: dict[str, Sequence[Image.Image]], path: Path) -> None:
        """Twelve pairs of every kind: what was given, the answers, and what was wanted."""
        shown = []
        for kind in dict.fromkeys(row["kind"] for row in self.rows):
            own = [k for k, row in enumerate(self.rows) if row["kind"] == kind]
            picked = own[:: max(1, len(own) // 12)][:12]
            shown += [(f"{kind}: {name}", [images[k] for k in picked]) for name, images in rows.items()]
        grid([images for _, images in shown], captions=[name for name, _ in shown]).save(path, optimize=True)


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.sqrt(np.mean(np.square((np.asarray(one, np.float32) - np.asarray(other)) / 255))))


def edit(pipe: FluxImagePipeline, emoji: Emoji, folder: Path, out: Path, weights: Path, seed: int,
         how: dict[str, Any]) -> dict[str, Any]:
    """Held-out pairs: the model as it was, and with the trained weights, beside the reference as it is."""
    edits = Edits(folder, pipe, emoji)

    def answers() -> list[Image.Image]:
        return [pipe(prompt=row["prompt"], edit_image=image, seed=seed + k, **how)
                for k, (row, image) in enumerate(zip(edits.rows, edits.references))]

    before = answers()
    pipe.load_weights(weights)
    after = answers()
    edits.sheet({"reference": edits.references, "before": before, "after": after, "wanted": edits.targets},
                out / "edits.png")
    return {"the reference itself": edits.judge(edits.copies), "before": edits.judge(before),
            "after": edits.judge(after), "the result, by the VAE": edits.judge(edits.wanted)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("prompts", "cat", "edit"))
    parser.add_argument("model")
    parser.add_argument("images", type=Path, help="the folder that make_images.py wrote")
    parser.add_argument("out", type=Path, help="a folder, for grids and numbers")
    parser.add_argument("--weights", type=Path, help="weights of a run, put into the model")
    parser.add_argument("--lora", type=Path)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--cfg_scale", type=float)
    arguments = parser.parse_args()
    runtime.configure("graph")
    pipe = FluxImagePipeline.from_pretrained(arguments.model)
    if arguments.weights and arguments.what != "edit":
        pipe.load_weights(arguments.weights)
    arguments.out.mkdir(parents=True, exist_ok=True)
    splits = ("train", "held_out", "cats") if arguments.what == "edit" else ("base", "base_held_out", "cats")
    emoji, how = Emoji(arguments.images, pipe, splits), {"cfg_scale": arguments.cfg_scale}
    if arguments.what == "cat":
        found = cat(pipe, emoji, arguments.out, arguments.lora, arguments.seed, how)
    elif arguments.what == "edit":
        found = edit(pipe, emoji, arguments.images, arguments.out, arguments.weights, arguments.seed, how)
    else:
        found = prompts(pipe, emoji, arguments.out, arguments.seed, how)
    (arguments.out / "numbers.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))
