"""The command line in this process, on a model whose files are not there: what is wrong with the data comes first."""
from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
from PIL import Image

from ms_diffsynth.cli.main import main


@pytest.fixture
def run(capsys):
    """``run(word, ...)`` runs the command and returns (exit code, what it complained of)."""

    def call(*words):
        code = main([str(word) for word in words])
        found = capsys.readouterr().err
        assert "Traceback" not in found
        return code, found

    return call


@pytest.fixture
def not_for_ever():
    """What blocks, as the opening of a pipe does, fails after a while instead of stopping all tests."""

    def stop(*_):
        raise TimeoutError("20 seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """What a process imports once, for the command and for reading an image, is not counted."""
    folder = tmp_path_factory.mktemp("warm")
    Image.new("RGB", (32, 32)).save(folder / "whole.png")
    (folder / "metadata.csv").write_text("image,prompt\nwhole.png,a\nabsent.png,b\n")
    assert main(["train", "--family", "toy", "--num_epochs", "1", "--height", "16", "--width", "16",
                 "--dataset_base_path", str(folder), "--dataset_metadata_path", str(folder / "metadata.csv"),
                 "--model_paths", "absent"]) == 65


@pytest.fixture
def train(run, warm):
    """``train(folder)`` trains on folder/metadata.csv, as far as that goes: exit code, complaint, seconds it computed.

    Other processes do not count in these; `not_for_ever` sees to what waits.
    """

    def call(folder, metadata="metadata.csv"):
        source = ("--dataset_metadata_path", folder / metadata) if metadata else ()
        start = time.thread_time()
        code, err = run("train", "--family", "toy", "--model_paths", "absent", "--height", 16, "--width", 16,
                        "--num_epochs", 1, "--output_path", "out", "--dataset_base_path", folder, *source)
        seconds = time.thread_time() - start
        assert code != 66 and not Path("out").exists(), "it went on to the model"
        return code, err, seconds

    return call
