"""What is started: one scheduler in all, and on every machine the same number of workers."""
from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

from ms_diffsynth.launch.worker import HEARTBEAT

# MindSpore's: it brings the workers together, returns when they are through, and needs nothing of the script. Python
# leaves SIGTERM as the system has it, which ends a process that waits in C++ too.
SCHEDULER = (sys.executable, "-c", "from mindspore.communication import init; init()")

_DEFAULTS = {  # a value set outside wins
    "PYTHONFAULTHANDLER": "1",  # SIGABRT and SIGSEGV print every thread's stack
    "PYTHONUNBUFFERED": "1",  # what was printed is in the log when the process is killed
}
# MS_NODE_TIMEOUT is how long MindSpore's scheduler waits for a lost worker, and on the CPU also how long a worker waits
# in a collective: with its default of 30 s a job ends when rank 0 saves for longer (2026-11-21). On one machine the
# launcher finds the lost by itself; on several, 25 s finds a lost machine within 30.
_NODE_SECONDS = 25


@dataclass(frozen=True, kw_only=True)
class Job:
    """The part of a job that runs on this machine.

    Args:
        command: what every worker runs.
        workers: how many of them run here; every machine of the job runs as many.
        log_dir: folder for worker-K.log, worker-K.beat and scheduler.log; K is the rank in the whole job.
        master_address, master_port: where the scheduler listens: a number of the machine with ``node_rank`` 0.
        hang_seconds: how long a step may last, or five times the longest so far, if that is more.
        compile_seconds: the same for everything else, and for the first step.
        grace_seconds: from a signal until what has not ended is killed.
        start_seconds: how long workers wait for one another at the start.
        scheduler: what the scheduler runs.
    """

    command: tuple[str, ...]
    workers: int
    log_dir: Path
    master_address: str
    master_port: int
    nodes: int = 1
    node_rank: int = 0
    hang_seconds: float = 20.0
    compile_seconds: float = 1800.0
    grace_seconds: float = 10.0
    start_seconds: int = 600
    scheduler: tuple[str, ...] = SCHEDULER

    @property
    def world_size(self) -> int:
        """Workers on all machines."""
        return self.nodes * self.workers

    @property
    def ranks(self) -> range:
        """The ranks of the workers on this machine."""
        return range(self.node_rank * self.workers, (self.node_rank + 1) * self.workers)

    def log(self, rank: int) -> Path:
        """Where a worker's output goes."""
        return self.log_dir / f"worker-{rank}.log"

    def heartbeat(self, rank: int) -> Path:
        """Where a worker says what it does."""
        return self.log_dir / f"worker-{rank}.beat"

    def environment(self, rank: int | None) -> dict[str, str]:
        """The variables of a worker, or of the scheduler: those of msrun, and where heartbeats go.

        Tokens reach the workers here and nowhere else: all variables of the launcher are handed on.
        """
        world = str(self.world_size)
        node_seconds = int(self.compile_seconds) if self.nodes == 1 else _NODE_SECONDS
        given = _DEFAULTS | {"MS_NODE_TIMEOUT": str(node_seconds)} | os.environ | {
            "MS_SCHED_HOST": self.master_address, "MS_SCHED_PORT": str(self.master_port), "MS_WORKER_NUM": world,
            "MS_TOPO_TIMEOUT": str(self.start_seconds), "RANK_SIZE": world}
        if rank is None:
            return given | {"MS_ROLE": "MS_SCHED", "RANK_ID": "0"}
        return given | {
            "MS_ROLE": "MS_WORKER", "MS_NODE_ID": str(rank), "RANK_ID": str(rank),
            "DEVICE_ID": str(rank - self.ranks.start), "LOCAL_WORLD_SIZE": str(self.workers),
            HEARTBEAT: str(self.heartbeat(rank).resolve())}
