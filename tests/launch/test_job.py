"""What is handed to the processes, and what the package may import."""
from __future__ import annotations

import os
from pathlib import Path

from processes import run_python

from ms_diffsynth.launch.job import Job
from ms_diffsynth.launch.worker import HEARTBEAT

JOB = {"command": ("x",), "workers": 4, "log_dir": Path("logs"), "master_address": "10.0.0.1", "master_port": 8118}


def test_the_variables_are_those_of_msrun(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdefghij")
    monkeypatch.setenv("RANK_ID", "9")
    job = Job(**JOB, nodes=2, node_rank=1)
    assert job.ranks == range(4, 8) and job.world_size == 8
    found = job.environment(6)
    assert found.items() >= {
        "MS_ROLE": "MS_WORKER", "MS_SCHED_HOST": "10.0.0.1", "MS_SCHED_PORT": "8118", "MS_WORKER_NUM": "8",
        "MS_NODE_ID": "6", "RANK_ID": "6", "RANK_SIZE": "8", "DEVICE_ID": "2", "MS_TOPO_TIMEOUT": "600",
        HEARTBEAT: str(tmp_path / "logs/worker-6.beat")}.items()
    assert found["HF_TOKEN"] == os.environ["HF_TOKEN"], "tokens come this way"
    assert found["MS_NODE_TIMEOUT"] == "25" and Job(**JOB).environment(0)["MS_NODE_TIMEOUT"] == "1800"
    monkeypatch.setenv("MS_NODE_TIMEOUT", "7")
    assert job.environment(6)["MS_NODE_TIMEOUT"] == "7", "what was set outside wins"
    scheduler = Job(**JOB).environment(None)
    assert scheduler["MS_ROLE"] == "MS_SCHED" and scheduler["RANK_ID"] == "0" and scheduler["MS_WORKER_NUM"] == "4"
    assert HEARTBEAT not in scheduler


def test_the_launcher_imports_no_mindspore():
    code = "import sys, ms_diffsynth.launch.supervise, ms_diffsynth.cli.launch; sys.exit('mindspore' in sys.modules)"
    assert run_python("-c", code).returncode == 0


def test_a_heartbeat_imports_next_to_nothing():
    code = ("import sys, ms_diffsynth.launch.worker; "
            "sys.exit(bool({'numpy', 'mindspore', 'huggingface_hub'} & sys.modules.keys()))")
    assert run_python("-c", code).returncode == 0
