"""``ms-diffsynth cache inspect|prune DIR``: what a cache of split training holds, and room taken by what is unused."""
from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

from ms_diffsynth.config.flags import path_argument
from ms_diffsynth.errors import CacheError
from ms_diffsynth.storage.cache import Cache


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What to do, and with which folder."""
    parser.description += " inspect reads every entry and ends with code 78 when one is missing or damaged."
    parser.add_argument("action", choices=("inspect", "prune"),
                        help="inspect: verify and describe; prune: delete entries that the manifest does not name")
    parser.add_argument("folder", type=path_argument, metavar="DIR")


def execute(args: argparse.Namespace) -> int:
    """Inspect or prune."""
    cache = Cache(args.folder)
    if cache.manifest is None:
        cache.check({})  # says what the folder is instead
    return _inspect(cache) if args.action == "inspect" else _prune(cache)


def _inspect(cache: Cache) -> int:
    manifest = cache.manifest
    shapes, sizes, problems, total, texts = {}, Counter(), [], 0, {"": {}}
    for name in manifest["rows"]:
        for row in cache.rows(name):
            try:
                slots, size, text = cache.entry(row.key, row.label)
                if text not in texts:
                    found = cache.entry(text, f"the text of {row.label}").slots
                    texts[text] = {slot: f"{array.dtype} {list(array.shape)}" for slot, array in found.items()}
                    total += sum(array.nbytes for array in found.values())
            except CacheError as error:
                problems.append(str(error))
                continue
            sizes[f"{size[1]} x {size[0]}"] += 1
            total += sum(array.nbytes for array in slots.values())
            own = {slot: f"{array.dtype} {list(array.shape)}" for slot, array in slots.items()}
            for slot, shape in sorted((own | texts[text]).items()):
                shapes.setdefault(slot, Counter())[shape] += 1
    for prompt, key in cache.prompts.items():
        try:
            total += 0 if key in texts else sum(a.nbytes for a in cache.entry(key, repr(prompt)).slots.values())
        except CacheError as error:
            problems.append(str(error))
    state = "damaged" if problems else "complete" if manifest["complete"] else "incomplete"
    lines = [f"{cache.folder}: {state}, {total / 1e6:,.1f} MB"]
    lines += [f"  {name}: {len(rows)} rows" for name, rows in manifest["rows"].items()]
    lines += [f"  sample prompts: {', '.join(map(repr, cache.prompts))}"] if cache.prompts else []
    lines += [f"  {slot}: {', '.join(f'{shape} ({n})' for shape, n in found.items())}"
              for slot, found in shapes.items()]
    lines += [f"  images: {', '.join(f'{size} ({n})' for size, n in sorted(sizes.items()))}", "made by"]
    lines += [f"  {place}: {value}" for place, value in _flat(manifest["fingerprint"])]
    unused = cache.unused()
    if unused:
        lines.append(f"{len(unused)} entries ({_bytes(unused) / 1e6:,.1f} MB) are not used: ms-diffsynth cache prune "
                     f"{cache.folder}")
    sys.stdout.write("\n".join([*lines, *problems]) + "\n")
    return CacheError.exit_code if problems or not manifest["complete"] else 0


def _prune(cache: Cache) -> int:
    unused = cache.unused()
    size = _bytes(unused)
    for path in unused:
        path.unlink()
    sys.stdout.write(f"{len(unused)} entries removed, {size / 1e6:,.1f} MB\n")
    return 0


def _bytes(paths: list[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _flat(value: object, place: str = "") -> list[tuple[str, object]]:
    """The fields of nested dictionaries, digests shortened."""
    if isinstance(value, dict):
        return [pair for name, inner in value.items() for pair in _flat(inner, f"{place}.{name}".strip("."))]
    is_digest = isinstance(value, str) and len(value) == 64
    return [(place, value[:12] if is_digest else value)]
