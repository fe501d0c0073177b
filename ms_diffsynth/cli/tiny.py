"""``ms-diffsynth tiny FAMILY DIR``: write a tiny model with random weights in the family's real checkpoint format."""
from __future__ import annotations

import argparse
import sys

from ms_diffsynth.config.flags import path_argument
from ms_diffsynth.errors import ConfigError, listing, nearest
from ms_diffsynth.registry import FAMILIES, family


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Which family, where, from which seed."""
    parser.add_argument("family", metavar="FAMILY", help=f"one of {', '.join(sorted(FAMILIES))}")
    parser.add_argument("folder", type=path_argument, metavar="DIR",
                        help="where to write; kept as it is when it already holds a model")
    parser.add_argument("--variant", help="of the family; edit, edit-2509 or edit-2511 of qwen_image have the vision "
                                          "tower that editing needs (default: the plain model)")
    parser.add_argument("--seed", type=int, default=0, help="of the random weights (default: 0)")


def execute(args: argparse.Namespace) -> int:
    """Write the model, unless the folder already holds one."""
    if (args.folder / "model_index.json").is_file():
        sys.stderr.write(f"{args.folder} already holds a model: kept\n")
        return 0
    chosen, variant = family(args.family), args.variant
    if variant and variant not in chosen.tiny_variants:
        raise ConfigError(f"variant={variant}: the family {args.family} has {listing(chosen.tiny_variants) or 'none'}."
                          f"{nearest(variant, chosen.tiny_variants)}")
    write_tiny = chosen.tiny_variants[variant] if variant else chosen.write_tiny
    from ms_diffsynth import runtime

    runtime.configure("pynative", "CPU")
    write_tiny(args.folder, args.seed)
    size = sum(f.stat().st_size for f in args.folder.rglob("*") if f.is_file())
    sys.stderr.write(f"wrote a tiny {args.family} model with random weights to {args.folder} ({size / 1e6:.1f} MB)\n")
    return 0
