"""The command line: what is refused before anything is started, and what each worker runs."""
from __future__ import annotations

import os
import socket
import sys

import pytest

from ms_diffsynth.cli.main import main
from ms_diffsynth.launch import supervise

TOKEN = "hf_0123456789abcdefghij"
SCRIPT = ["--", sys.executable, "script.py"]


@pytest.fixture
def jobs(monkeypatch):
    """The jobs that would have been run."""
    found = []
    monkeypatch.setattr(supervise, "launch", lambda job: found.append(job) or 0)
    return found


def launch(capsys, *words):
    code = main(["launch", *words])
    found = capsys.readouterr()
    assert "Traceback" not in found.err
    return code, found.err


@pytest.mark.parametrize("words, expected", [
    (["train", "a.yaml"], "--workers"), (["--worker", "2", *SCRIPT], "--workers"),
    (["--workers", "2"], "expected  train CONFIG.yaml ...  or  -- python script.py ..."),
    (["--workers", "2", "--"], "nothing to launch"),
    (["--workers", "0", *SCRIPT], "workers=0: expected 1 <= workers <= 1024"),
    (["--workers", "2", "--grace_seconds", "-1", "--nodes", "2", "--node_rank", "2", *SCRIPT],
     "grace_seconds=-1.0: expected 0 < grace_seconds <= 31536000; node_rank=2: expected 0 to 1, for nodes=2; nodes=2 "
     "without master_address"),
    (["--workers", "2", "--master_port", "70000", *SCRIPT], "master_port=70000: expected 1 to 65535"),
    (["--workers", "2", "trian"], "Did you mean 'train'?"),
    (["--workers", "2", "--", "script.py"], "'script.py' is not a program"),
    (["--workers", "2", "train", "no.yaml"], "no.yaml"),
    (["--workers", "2", "train", "--learning_rat", "1"], "--learning_rat. Did you mean"),
    (["--workers", "2", "--master_address", "203.0.113.7", *SCRIPT], "master_address=203.0.113.7 is not an address"),
], ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "")
def test_what_cannot_be_meant(jobs, capsys, words, expected, tmp_path):
    code, err = launch(capsys, *words)
    assert code == 64 and err.startswith("ConfigError: ") and expected in err and len(err.splitlines()) == 1
    assert not jobs and not list(tmp_path.iterdir())


@pytest.mark.parametrize("words", [
    ["--hub_token", TOKEN, *SCRIPT], ["--token=" + TOKEN, *SCRIPT], [*SCRIPT, "--hub_token", "abc"],
    [*SCRIPT, "--hub_token=abc"], [*SCRIPT, "-token", "abc"], [*SCRIPT, TOKEN], [*SCRIPT, f"--key={TOKEN}"],
    [*SCRIPT, "https://me:secret@host/x"], ["train", "--hub_token", TOKEN], [*SCRIPT, "plain-but-in-the-environment"],
])
def test_tokens_are_refused_and_not_repeated(jobs, capsys, monkeypatch, words):
    monkeypatch.setenv("WANDB_API_KEY", "plain-but-in-the-environment")
    code, err = launch(capsys, "--workers", "2", *words)
    assert code == 64 and "a token is never a flag" in err and not jobs
    assert TOKEN not in err and "secret@" not in err and "plain-but" not in err


def test_what_only_sounds_like_a_token(jobs, capsys):
    assert launch(capsys, "--workers", "2", *SCRIPT, "--max_token=77", "--tokens", "12", "token")[0] == 0
    assert jobs[0].command == (*SCRIPT[1:], "--max_token=77", "--tokens", "12", "token")


def test_a_training_run(jobs, capsys, tmp_path):
    words = ["train", "a.yaml", "--output_path", "runs/a", "--debug"]
    (tmp_path / "a.yaml").write_text("model:\n  family: toy\n  model_paths: m\ndata:\n  dataset_base_path: d\nrun:\n"
                                     "  num_epochs: 1\n")
    assert launch(capsys, "--workers", "2", "--grace_seconds", "30", *words)[0] == 0
    job, = jobs
    assert job.command == (sys.executable, "-m", "ms_diffsynth.cli.main", *words)
    assert str(job.log_dir) == "runs/a/logs" and job.log_dir.is_dir() and list(job.log_dir.iterdir()) == []
    assert (job.workers, job.nodes, job.node_rank, job.master_address) == (2, 1, 0, "127.0.0.1")
    assert (job.grace_seconds, job.hang_seconds, job.compile_seconds) == (30, 20, 1800)
    with socket.socket() as server:
        server.bind(("127.0.0.1", job.master_port))


def test_several_machines(jobs, capsys, monkeypatch):
    monkeypatch.setattr("ms_diffsynth.cli.launch.check_port", lambda *_: None)  # another job may have msrun's port here
    words = ["--workers", "4", "--nodes", "2", "--master_address", "127.0.0.1", "--log_dir", "logs"]
    assert launch(capsys, *words, *SCRIPT)[0] == 0
    assert (jobs[0].master_port, jobs[0].hang_seconds, jobs[0].world_size) == (8118, 300, 8)
    code, err = launch(capsys, *words, "--node_rank", "1", "--start_seconds", "1", "--master_port", "1", *SCRIPT)
    assert code == 69
    assert "DeviceError: no process listens on 127.0.0.1:1 after 1 s" in err


def test_a_folder_that_cannot_be_written(jobs, capsys, tmp_path):
    (tmp_path / "logs").touch()
    code, err = launch(capsys, "--workers", "2", "--log_dir", "logs/x", *SCRIPT)
    assert code == 74 and err.startswith("OutputError: log_dir=logs/x cannot be written to: Not a directory. "
                                          "Choose another log_dir.")
    assert not jobs


def test_the_output_path_of_a_training_that_cannot_be_written_is_named(jobs, capsys, tmp_path):
    (tmp_path / "run").touch()
    (tmp_path / "c.yaml").write_text("model: {family: toy, model_paths: m}\ndata: {dataset_base_path: d}\n"
                                     "run: {output_path: run, num_epochs: 1}\n")
    code, err = launch(capsys, "--workers", "2", "train", "c.yaml")
    assert code == 74 and "log_dir=run/logs cannot be written to: Not a directory. Choose another output_path or" in err
    assert not jobs


def test_no_launch_inside_a_launch(jobs, capsys, monkeypatch):
    monkeypatch.setitem(os.environ, "MS_ROLE", "MS_WORKER")
    code, err = launch(capsys, "--workers", "2", *SCRIPT)
    assert code == 64 and "MS_ROLE=MS_WORKER is set: this is a worker of msrun or of another launch" in err


def test_help_of_what_is_launched(jobs, capsys):
    with pytest.raises(SystemExit):
        main(["launch", "--workers", "2", "train", "--help"])
    assert "ms-diffsynth train" in capsys.readouterr().out and not jobs
