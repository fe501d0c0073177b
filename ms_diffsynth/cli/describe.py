"""``ms-diffsynth describe CONFIG.yaml``: what a run prepares, what it compiles, what crosses. Loads no weights."""
from __future__ import annotations

import argparse
import sys

from ms_diffsynth.config import load_config
from ms_diffsynth.config.flags import add_flags, overrides_of, path_argument
from ms_diffsynth.errors import ConfigError, listing, nearest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The same as of ``train``."""
    parser.usage = "ms-diffsynth describe [CONFIG.yaml] [--setting value ...]"
    parser.add_argument("config", nargs="?", type=path_argument, metavar="CONFIG.yaml")
    add_flags(parser)


def execute(args: argparse.Namespace) -> int:
    """Print the cut of the configured run."""
    config = load_config(args.config, overrides_of(args))
    from ms_diffsynth import runtime
    from ms_diffsynth.run.build import build_task
    from ms_diffsynth.run.pipeline import build_pipeline

    runtime.configure(config.run.mode, config.run.device)
    pipe = build_pipeline(config)
    schedule = pipe.training_schedule(config.objective.task.split(":")[0])
    trainable = [n.strip() for n in (config.model.trainable_models or config.model.lora_base_model).split(",")
                 if n.strip()]
    program = pipe.training_program(build_task(config), schedule.sigmas)
    known = [component.name for component in pipe.store.components if not component.is_tokenizer]
    if odd := [name for name in trainable if name.split(".")[0] not in known]:
        setting = "trainable_models" if config.model.trainable_models else "lora_base_model"
        raise ConfigError(f"{setting}: '{odd[0]}' cannot be trained: expected some of {listing(known)}."
                          f"{nearest(odd[0], known)}")
    cut = program.cut(("loss",), trainable, (*pipe.always_fused, *config.model.fuse))
    sys.stdout.write(cut.describe() + "\n")
    for stage in ("prepare", "step"):
        sys.stdout.write(f"{stage} loads: {', '.join(cut.models(stage)) or 'nothing'}\n")
    return 0
