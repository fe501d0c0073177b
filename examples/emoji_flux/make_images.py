"""Build the images that emoji-flux is trained on: about 2,000 emoji of 64 x 64 pixels, with captions.

    pip install emoji==2.16.0
    python examples/emoji_flux/make_images.py data/emoji

``npm`` fetches two packages into ``data/emoji/packages``: emoji-datasource-google 16.0.0 (Noto Emoji, Apache-2.0) and
@lobehub/fluent-emoji-3d 1.1.0 (Microsoft Fluent Emoji, MIT). Names are the English ones of Unicode's CLDR, from the
package ``emoji`` (BSD). What is written:

    images/           <vendor>_<code points>.png
    train.csv         image, prompt, vendor, name, category: what is trained on
    held_out.csv      the same of images that are not: of 2 % of the names both vendors' images, of 5 % one vendor's
    base.csv, base_held_out.csv   those of faces, animals, food: what the base model is trained on; the VAE on all
    cats.csv          nine faces of a cat, which examples/data/dreambooth_cat_fluent teaches: never trained on here
    edits.csv         image, edit_image, prompt, kind, name: pairs for editing, one vendor's image and the other's, or
                      Noto's people and the same with another skin
    edits_held_out.csv  the same of images that are not trained on, neither here nor in train.csv, and of the cats

The split depends on the name alone, so it is the same everywhere.
"""
from __future__ import annotations

import argparse
import csv
import hashlib
import json
import subprocess
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import emoji
from PIL import Image

SIZE = 64
PACKAGES = {"noto": "emoji-datasource-google@16.0.0", "fluent": "@lobehub/fluent-emoji-3d@1.1.0"}
STYLES = {"noto": "an emoji of", "fluent": "a 3d render of"}
CATEGORIES = ("Smileys & Emotion", "Animals & Nature", "Food & Drink", "Travel & Places", "Activities", "Objects")
CATS = ("1f638", "1f639", "1f63a", "1f63b", "1f63c", "1f63d", "1f63e", "1f63f", "1f640")
OF_THE_BASE = CATEGORIES[:3]
COLUMNS = ("image", "prompt", "vendor", "name", "category")
EDIT_COLUMNS = ("image", "edit_image", "prompt", "kind", "name")
EDITS = {"fluent": "make it a 3d render", "noto": "make it a flat emoji"}  # the vendor of the result
SKINS = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}


def installed(folder: Path, package: str) -> Path:
    """The folder of an npm package, fetched when it is not there. None of its scripts is run."""
    place = folder / "node_modules" / package.rpartition("@")[0]
    if not place.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", "--ignore-scripts", "--no-save", "--no-audit", "--prefix",
                        str(folder), *PACKAGES.values()], check=True)
    return place


def name_of(entry: dict[str, str]) -> str:
    """CLDR's English name, in small letters; that of the Unicode standard where there is none."""
    for code in (entry["unified"], entry.get("non_qualified") or ""):
        character = "".join(chr(int(part, 16)) for part in code.split("-") if part)
        if found := emoji.EMOJI_DATA.get(character):
            return found["en"].strip(":").replace("_", " ").lower().translate(str.maketrans("“”’", "\"\"'"))
    return entry["name"].lower()


def split_of(name: str, vendor: str) -> str:
    """``train`` or ``held_out``, by the name's hash."""
    place = int(hashlib.md5(name.encode()).hexdigest()[:8], 16) / 2**32
    unseen = place < 0.02 or (0.02 <= place < 0.045 and vendor == "fluent") or (0.045 <= place < 0.07
                                                                              and vendor == "noto")
    return "held_out" if unseen else "train"


def square(path: Path) -> Image.Image:
    """The image on white, 64 x 64 pixels."""
    image = Image.open(path).convert("RGBA")
    image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
    result = Image.new("RGB", (SIZE, SIZE), "white")
    result.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2), image)
    return result


def style_edits(rows: dict[str, list[dict[str, str]]]) -> Iterator[tuple[str, dict[str, str]]]:
    """The table that a pair is for, and the pair: an emoji of one vendor that becomes the other's, in both directions.

    A pair of which the model has seen only the result is in none.
    """
    seen = {row["image"] for row in rows["train"]}
    found: dict[str, dict[str, dict[str, str]]] = {}
    for row in (row for split in ("train", "held_out", "cats") for row in rows[split]):
        vendor, _, code = row["image"].removeprefix("images/").partition("_")
        found.setdefault(code, {})[vendor] = row
    for both in found.values():
        if len(both) == 2:
            for vendor, prompt in EDITS.items():
                image, other = both[vendor]["image"], both["noto" if vendor == "fluent" else "fluent"]["image"]
                table = "edits_held_out" if image not in seen else "edits" if other in seen else ""
                yield table, {"image": image, "edit_image": other, "prompt": prompt, "kind": vendor,
                              "name": both[vendor]["name"]}


def skin_edits(folder: Path, google: Path, entries: Iterable[dict]) -> Iterator[tuple[str, dict[str, str]]]:
    """The same of Noto's people: yellow skin becomes another."""
    for entry in entries:
        code, name = entry["unified"].lower(), name_of(entry)
        tones = {tone: found["image"] for tone, found in entry.get("skin_variations", {}).items()
                 if tone in SKINS and found["has_img_google"]}
        for number, file in enumerate([entry["image"], *tones.values()] if tones else ()):
            target = folder / f"images/noto_{file}"
            if number or not target.exists():
                square(google / "img/google/64" / file).save(target, optimize=True)
        for tone, file in tones.items():
            yield "edits" if split_of(name, "noto") == "train" else "edits_held_out", {
                "image": f"images/noto_{file}", "edit_image": f"images/noto_{code}.png",
                "prompt": f"make the skin {SKINS[tone]}", "kind": "skin", "name": name}


def write_table(path: Path, columns: Sequence[str], rows: Iterable[dict[str, str]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def main(folder: Path, packages: Path) -> None:
    google, fluent = (installed(packages, PACKAGES[vendor]) for vendor in ("noto", "fluent"))
    entries = json.loads((google / "emoji.json").read_text(encoding="utf-8"))
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict[str, str]]] = {"train": [], "held_out": [], "cats": []}
    for entry in sorted(entries, key=lambda e: e["sort_order"]):
        if entry["category"] not in CATEGORIES:
            continue
        code, name = entry["unified"].lower(), name_of(entry)
        sources = {"noto": [google / "img/google/64" / entry["image"]] if entry["has_img_google"] else [],
                   "fluent": [fluent / f"assets/{c}.webp" for c in (code, code.replace("-fe0f", ""))]}
        for vendor, candidates in sources.items():
            found = next((path for path in candidates if path.is_file()), None)
            if found is None:
                continue
            file = f"images/{vendor}_{code}.png"
            square(found).save(folder / file, optimize=True)
            split = "cats" if vendor == "fluent" and code in CATS else split_of(name, vendor)
            rows[split].append({"image": file, "prompt": f"{STYLES[vendor]} {name}", "vendor": vendor, "name": name,
                                "category": entry["category"]})
    for split, name in (("train", "base"), ("held_out", "base_held_out")):
        rows[name] = [row for row in rows[split] if row["category"] in OF_THE_BASE]
    edits = [*style_edits(rows), *skin_edits(folder, google, sorted(entries, key=lambda e: e["sort_order"]))]
    for name in ("edits", "edits_held_out"):
        found = [row for table, row in edits if table == name]
        write_table(folder / f"{name}.csv", EDIT_COLUMNS, found)
        print(f"{name}: {len(found)} pairs", dict(Counter(row["kind"] for row in found)))
    for split, found in rows.items():
        write_table(folder / f"{split}.csv", COLUMNS, found)
        print(f"{split}: {len(found)} images", dict(Counter(row["vendor"] for row in found)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--packages", type=Path, help="where the npm packages are; by default <folder>/packages")
    arguments = parser.parse_args()
    main(arguments.folder, arguments.packages or arguments.folder / "packages")
