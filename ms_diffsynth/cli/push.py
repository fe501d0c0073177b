"""``ms-diffsynth push FOLDER --hub_model_id owner/name``: publish a run's folder, or any saved model."""
from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext

from ms_diffsynth.config.flags import path_argument, refuse_tokens
from ms_diffsynth.errors import naming
from ms_diffsynth.hub.publish import HUBS, choose, publish


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What goes where, and who may see it."""
    parser.description += (" Sent are the model card, weights, their configuration and sample images; never "
                           "optimizer states, logs, hidden files or links. The repository is private unless "
                           "--hub_public is given.")
    parser.add_argument("folder", type=path_argument, metavar="FOLDER")
    parser.add_argument("--hub_model_id", required=True, metavar="OWNER/NAME", help="made when it does not exist")
    parser.add_argument("--hub", choices=HUBS, default=HUBS[0], help=f"where (default: {HUBS[0]})")
    parser.add_argument("--hub_public", action="store_true", help="make the repository public")
    parser.add_argument("--files", nargs="+", metavar="NAME",
                        help="names or patterns of what is sent instead; * stays within one folder")
    parser.add_argument("--message", default="Upload from ms_diffsynth", help="of the commit")
    parser.add_argument("--dry_run", action="store_true", help="only list what would be sent")
    refuse_tokens(parser)


def execute(args: argparse.Namespace) -> int:
    """Publish, or list."""
    with naming(f"--files {' '.join(args.files)}") if args.files else nullcontext():
        names = choose(args.folder, args.files)
    if "README.md" not in names:
        sys.stderr.write(f"{args.folder} has no README.md: it is published without a model card\n")
    if args.dry_run:
        sizes = [f"{(args.folder / name).stat().st_size / 1e6:10.2f} MB  {name}" for name in names]
        sys.stdout.write("\n".join(sizes) + "\n")
        return 0
    url = publish(args.folder, args.hub_model_id, hub=args.hub, private=not args.hub_public, files=args.files,
                  message=args.message)
    sys.stdout.write(f"{url}\n")
    return 0
