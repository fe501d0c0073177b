"""``ms-diffsynth replay RUN STEP``: one recorded step of a run again, and where it stopped being finite."""
from __future__ import annotations

import argparse
import dataclasses
import sys

from ms_diffsynth.config import load_config
from ms_diffsynth.config.flags import add_flags, overrides_of, path_argument
from ms_diffsynth.errors import ConfigError, shortened
from ms_diffsynth.storage.lock import lock_folder


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The folder of a run and a step of it; flags are for what has another place now."""
    parser.usage = "ms-diffsynth replay RUN STEP [--setting value ...]"
    parser.description += (" The run is configured by its own config.yaml; a flag is for files that have another place "
                           "now, and for what is a flag only. Ends with code 1 when a number differs from loss.csv.")
    parser.add_argument("run", type=path_argument, metavar="RUN", help="output_path of the run")
    parser.add_argument("step", type=int, metavar="STEP", help="step to make again, as in loss.csv")
    add_flags(parser)


def execute(args: argparse.Namespace) -> int:
    """Replay the step, and say what it gave."""
    if not 0 < args.step < 1 << 31:
        raise ConfigError(f"step={shortened(str(args.step))}: expected one of the steps in loss.csv, from 1.")
    file = args.run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"{args.run} has no config.yaml, so it is not a run of ms-diffsynth train. A script replays "
                          "its own: debug.replay.replay_training_step takes what launch_training_task was given.")
    with lock_folder(args.run):  # told before any model is loaded
        pass
    # accept_changes belongs to resume, and what was accepted then is not accepted now
    overrides = {"resume": "auto", "accept_changes": "[]"} | overrides_of(args) | {"output_path": str(args.run)}
    config = load_config(file, overrides)
    from ms_diffsynth.debug.replay import replay_training_step, settings_of
    from ms_diffsynth.run.build import build_datasets, build_module
    from ms_diffsynth.run.pipeline import build_pipeline
    from ms_diffsynth.training.distributed import Accelerator

    ranks = settings_of(args.run).get("num_processes", 1)
    if ranks > 1:  # one process takes all of a batch that they shared
        sys.stderr.write(f"a run of {ranks} ranks, made again by one: equal but for the order of summation\n")
    config = dataclasses.replace(config, run=dataclasses.replace(config.run, batch_size=config.run.batch_size * ranks))
    accelerator = Accelerator.of(config.flat())
    sets = build_datasets(config)
    module = build_module(config, build_pipeline(config))
    replay = replay_training_step(accelerator, sets.instance, module, args.run, args.step, sets.classes, config)
    sys.stdout.write(f"{replay.describe()}\n{args.run / f'replay-step-{args.step}.json'}\n")
    return 0 if replay.is_reproduced else 1  # a comparison was made, and something differs
