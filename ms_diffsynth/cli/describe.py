"""``ms-diffsynth describe CONFIG.yaml``: what a run prepares, what it compiles, what crosses. Loads no weights."""
from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from ms_diffsynth import runtime
from ms_diffsynth.cli.train import build_pipeline, objective_of
from ms_diffsynth.config import SETTINGS, add_flags, load_config, overrides_of


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser("describe", allow_abbrev=False, help="print a run's two halves as straight-line code, loading no weights")
    parser.add_argument("config", nargs="?", type=Path, metavar="CONFIG.yaml")
    add_flags(parser)
    parser.set_defaults(execute=execute, known_flags=tuple(SETTINGS))


def execute(args: argparse.Namespace) -> int:
    """Print the cut of the configured run."""
    config = load_config(args.config, overrides_of(args))
    runtime.configure(config.run.mode, config.run.device)
    pipe = build_pipeline(config)
    schedule = pipe.training_schedule(config.objective.objective)
    trainable = [n for n in (config.model.trainable_models or config.model.lora_base_model).split(",") if n]
    program = pipe.training_program(objective_of(config), schedule.sigmas)
    cut = program.cut(("loss",), trainable, ("sample_latents", *config.model.fuse))
    sys.stdout.write(cut.describe() + "\n")
    for stage in ("prepare", "step"):
        sys.stdout.write(f"{stage} loads: {', '.join(cut.models(stage)) or 'nothing'}\n")
    return 0
