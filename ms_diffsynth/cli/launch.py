"""``ms-diffsynth launch --workers N train CONFIG.yaml ...``: one run in N processes; docs/how_to/several_devices.md."""
from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from ms_diffsynth.config import NO_TOKEN, TOKEN_FLAGS, load_config
from ms_diffsynth.config.flags import overrides_of, path_argument, refuse_tokens
from ms_diffsynth.config.setting import out_of_range
from ms_diffsynth.errors import ConfigError, DeviceError, OutputError, nearest
from ms_diffsynth.launch.job import Job
from ms_diffsynth.launch.ports import PORT, check_port, free_port, resolve, wait_for_scheduler
from ms_diffsynth.redact import redact


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of the launcher, then what each worker runs."""
    parser.usage = ("ms-diffsynth launch --workers N [--flag value ...] train CONFIG.yaml [--setting value ...]\n"
                    "       ms-diffsynth launch --workers N [--flag value ...] -- PROGRAM [word ...]")
    refuse_tokens(parser)
    add = parser.add_argument
    add("--workers", type=int, required=True, metavar="N", help="processes on this machine, one for each device")
    add("--log_dir", type=path_argument, metavar="DIR", help="folder for worker-K.log (default: logs in the run's "
        "output_path, for other programs launch-DATE-TIME)")
    add("--hang_seconds", type=float, metavar="S", help="end the job when every worker has been in one step for this "
        "long, and for five times its longest step (default: 20; with several machines 300)")
    add("--compile_seconds", type=float, default=1800.0, metavar="S", help="the same for everything that is not a "
        "step, such as compiling and saving, and for the first step (default: 1800)")
    add("--grace_seconds", type=float, default=10.0, metavar="S", help="kill what has not saved and ended this long "
        "after a signal (default: 10)")
    add("--start_seconds", type=int, default=600, metavar="S", help="how long workers and machines wait for one "
        "another at the start (default: 600)")
    add("--nodes", type=int, default=1, metavar="N", help="machines; every one starts --workers workers (default: 1)")
    add("--node_rank", type=int, default=0, metavar="K", help="which machine this is, from 0 (default: 0)")
    add("--master_address", metavar="HOST", help="an address of machine 0 that all reach (default: 127.0.0.1)")
    add("--master_port", type=int, metavar="PORT", help=f"a free port of machine 0 (default: one is chosen; with "
        f"several machines {PORT})")
    add("job", nargs=argparse.REMAINDER, metavar="train CONFIG.yaml ... | -- PROGRAM ...", help="what each worker runs")


def execute(args: argparse.Namespace) -> int:
    """Check all that can be checked before anything is started, then run the job."""
    if sys.platform != "linux":
        raise DeviceError(f"launch runs on Linux only, not on {sys.platform}: elsewhere no system ends what a killed "
                          "launcher leaves behind. Start workers by msrun.")
    _check(args)
    command, folder = _program(args.job)
    if "MS_ROLE" in os.environ:
        raise ConfigError(f"MS_ROLE={os.environ['MS_ROLE']} is set: this is a worker of msrun or of another launch. "
                          "Start it without launch there, or unset MS_ROLE.")
    address = resolve(args.master_address or "127.0.0.1")
    port = args.master_port or (free_port(address) if args.nodes == 1 else PORT)
    if args.node_rank == 0:
        check_port(address, port)
    else:
        sys.stderr.write(f"waiting for {address}:{port}, at most {args.start_seconds} s\n")
        wait_for_scheduler(address, port, args.start_seconds)
    log_dir = args.log_dir or folder
    try:
        log_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=log_dir).close()
    except OSError as error:
        choices = "log_dir" if args.log_dir or args.job[0] == "--" else "output_path or log_dir"
        raise OutputError(f"log_dir={log_dir} cannot be written to: {error.strerror}. Choose another "
                          f"{choices}.") from error
    hang_seconds = args.hang_seconds or (20.0 if args.nodes == 1 else 300.0)
    job = Job(command=command, workers=args.workers, nodes=args.nodes, node_rank=args.node_rank, master_address=address,
              master_port=port, log_dir=log_dir, hang_seconds=hang_seconds,
              compile_seconds=args.compile_seconds, grace_seconds=args.grace_seconds, start_seconds=args.start_seconds)
    from ms_diffsynth.launch.supervise import launch

    return launch(job)


def _check(args: argparse.Namespace) -> None:
    ranges = {"workers": "1 <= workers <= 1024", "nodes": "1 <= nodes <= 65536"} | {
        f"{what}_seconds": f"0 < {what}_seconds <= 31536000" for what in ("hang", "compile", "grace", "start")}
    wrong = [f"{name}={value}: {problem}" for name, allowed in ranges.items()
             if (value := getattr(args, name)) is not None and (problem := out_of_range(value, allowed))]
    if not 0 <= args.node_rank < args.nodes:
        wrong.append(f"node_rank={args.node_rank}: expected 0 to {args.nodes - 1}, for nodes={args.nodes}")
    if args.nodes > 1 and args.master_address is None:
        wrong.append(f"nodes={args.nodes} without master_address: expected an address of machine 0 that all reach")
    if args.master_port is not None and not 0 < args.master_port < 65536:
        wrong.append(f"master_port={args.master_port}: expected 1 to 65535")
    if wrong:
        raise ConfigError("; ".join(wrong) + ". See ms-diffsynth launch --help.")


def _program(words: Sequence[str]) -> tuple[tuple[str, ...], Path]:
    """The command of a worker, and the folder for its logs. Raises: ConfigError for what no worker could run."""
    for word in words:
        flag, _, value = word.partition("=")
        if flag.lstrip("-") in TOKEN_FLAGS and flag.startswith("-"):
            raise ConfigError(f"{flag}: {NO_TOKEN}")
        if any(redact(part) != part for part in (flag, value)):
            raise ConfigError(f"{word}: {NO_TOKEN}")
    if not words or words == ["--"]:
        raise ConfigError("there is nothing to launch: expected  train CONFIG.yaml ...  or  -- python script.py ...")
    if words[0] == "--":
        if shutil.which(words[1]) is None:
            raise ConfigError(f"'{words[1]}' is not a program: expected one, such as  -- python script.py ...")
        return tuple(words[1:]), Path(time.strftime("launch-%Y%m%d-%H%M%S"))
    if words[0] != "train":
        raise ConfigError(f"'{words[0]}' cannot be launched: expected  train CONFIG.yaml ...  or  -- python script.py "
                          f"...{nearest(words[0], ['train'])}")
    from ms_diffsynth.cli.main import parser

    given = parser("train").parse_args(words)  # a mistake is told once, and before anything is started
    config = load_config(given.config, overrides_of(given))
    return (sys.executable, "-m", "ms_diffsynth.cli.main", *words), Path(config.run.output_path) / "logs"
