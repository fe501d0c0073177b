"""``ms-diffsynth evaluate --generated DIR --reference DIR``: how near generated images come to real ones."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ms_diffsynth.config.flags import path_argument
from ms_diffsynth.errors import ConfigError, naming
from ms_diffsynth.evaluate import evaluate
from ms_diffsynth.evaluate.features import ImageFolder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Two folders of images, and where to write."""
    parser.description += (" Kernel inception distance on EfficientNet-Lite0 features, with an interval, and a search "
                           "for copies of reference images. Needs the extra [eval].")
    parser.add_argument("--generated", type=path_argument, required=True, metavar="DIR", help="the generated images")
    parser.add_argument("--reference", type=path_argument, required=True, metavar="DIR",
                        help="real ones: the training set")
    parser.add_argument("--output", type=path_argument, default=Path("evaluation"), metavar="DIR",
                        help="where evaluation.json and nearest.png are written (default: evaluation)")
    parser.add_argument("--seed", type=int, default=0, metavar="INT", help="of the random halves (default: 0)")


def execute(args: argparse.Namespace) -> int:
    """Evaluate, write, and say what was found."""
    for name in ("generated", "reference"):
        folder = getattr(args, name)
        if args.output.resolve().is_relative_to(folder.resolve()):
            raise ConfigError(f"--output {args.output} is inside --{name} {folder}: the next evaluation would take its "
                              "grid for an image. Expected a folder elsewhere.")
    if args.seed < 0:
        raise ConfigError(f"--seed {args.seed}: expected 0 or more.")
    for name in ("generated", "reference"):
        with naming(f"--{name} {getattr(args, name)}"):
            ImageFolder(getattr(args, name))
    result = evaluate(args.generated, args.reference, args.seed)
    paths = result.save(args.output)
    sys.stdout.write("\n".join([result.summary(), *(f"  {path}" for path in paths)]) + "\n")
    return 0
