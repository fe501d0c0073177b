"""``ms-diffsynth describe CONFIG.yaml``: what a run prepares, what it compiles, what crosses. Loads no weights."""
from __future__ import annotations

import argparse
import sys

from ms_diffsynth.config import load_config
from ms_diffsynth.config.flags import add_flags, overrides_of, path_argument
from ms_diffsynth.errors import listing


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The same as of ``train``."""
    parser.usage = "ms-diffsynth describe [CONFIG.yaml] [--setting value ...]"
    parser.description += " It runs on any machine, and downloads nothing but config.json of models that are not known."
    parser.add_argument("config", nargs="?", type=path_argument, metavar="CONFIG.yaml")
    add_flags(parser)


def execute(args: argparse.Namespace) -> int:
    """Print the cut of the configured run."""
    config = load_config(args.config, overrides_of(args))
    from ms_diffsynth import runtime
    from ms_diffsynth.run.plan import cut_of, planned_dtype
    from ms_diffsynth.run.skeleton import skeleton

    runtime.configure(config.run.mode, "CPU")
    pipe, unknown = skeleton(config, planned_dtype(config))
    cut, _ = cut_of(config, pipe)
    sys.stdout.write(cut.describe() + "\n")
    for stage in ("prepare", "step"):
        sys.stdout.write(f"{stage} loads: {', '.join(cut.models(stage)) or 'nothing'}\n")
    if config.model.template_model_id_or_path and "template_model" not in pipe.models:
        sys.stdout.write("the template is left out: its code is run only with --trust_template_code\n")
    if unknown:
        sys.stdout.write(f"not known before they are downloaded: {listing(unknown)}\n")
    return 0
