"""Errors on the command line: docs/reference/errors.md has a section for every kind and code, and its examples run."""
from __future__ import annotations

import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import constants
from PIL import Image
from processes import environment

import ms_diffsynth
from ms_diffsynth.cli.main import main
from ms_diffsynth.errors import INTERNAL, UserError
from ms_diffsynth.run import task as run_module
from ms_diffsynth.training.signals import HUNG, SIGNALS

PACKAGE = Path(ms_diffsynth.__file__).parent
TEXT = (PACKAGE.parent / "docs/reference/errors.md").read_text(encoding="utf-8")
SECTIONS = {int(code): body for code, body in re.findall(r"(?ms)^## (\d+)\n(.*?)(?=^## |\Z)", TEXT)}
KINDS = {name: (code, body) for code, section in SECTIONS.items()
         for name, body in re.findall(r"(?ms)^### (\w+)\n(.*?)(?=^### |\Z)", section)}
IN_A_PROCESS = {"ConfigError", "DeviceError"}  # the device target of a process can be set once

COMMAND = "import sys\nfrom ms_diffsynth.cli.main import main\nsys.exit(main(sys.argv[1:]))"
CONFIG = """\
model:
  family: toy
  model_paths: toy
  lora_rank: 2
data:
  dataset_base_path: cats
  dataset_metadata_path: cats/metadata.csv
  height: 16
  width: 16
run:
  max_train_steps: 40
  mode: pynative
  output_path: runs/cats
"""


def every_kind(cls: type = UserError) -> set[type]:
    own = [sub for sub in cls.__subclasses__() if sub.__module__.startswith("ms_diffsynth.")]
    return {kind for sub in own for kind in (sub, *every_kind(sub))}


def example(text: str) -> list[str]:
    """The indented lines of a section."""
    return [line.removeprefix("    ") for line in text.splitlines() if line.startswith("    ")]


def fits(said: str, shown: str) -> bool:
    """Whether an example, with ... for what it leaves out, is what was said; other lines may be around it."""
    end = "" if shown.endswith("...") else "$"
    return re.search("(?ms)^" + ".*?".join(map(re.escape, shown.split("..."))) + end, said) is not None


@pytest.fixture
def world(tmp_path, tiny_model, monkeypatch):
    """The folder that docs/reference/errors.md speaks of; the tests run in it. No user is logged in."""
    (tmp_path / "cats.yaml").write_text(CONFIG)
    shutil.copytree(tiny_model("toy"), tmp_path / "toy")
    for folder in ("cats", "brightness"):
        (tmp_path / folder).mkdir()
    for k in range(2):
        Image.fromarray(np.full((16, 16, 3), 100 * k, np.uint8)).save(tmp_path / f"cats/{k}.png")
    (tmp_path / "cats/metadata.csv").write_text("image,prompt\n0.png,a cat\n1.png,a cat\n")
    (tmp_path / "cats/typo.csv").write_text("image,prompt\n0.png,a cat\nblu.png,a cat\n")
    (tmp_path / "cats.ckpt").write_bytes(b"\x80\x04.")
    (tmp_path / "brightness/model.py").write_text("TEMPLATE_MODEL = None\n")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    return tmp_path


def process(code: str, *words: str) -> subprocess.Popen:
    """Python in a process of its own."""
    return subprocess.Popen([sys.executable, "-c", code, *words], text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, env=environment(PYTHONUNBUFFERED=""))


def test_every_kind_has_a_section_under_its_code():
    kinds = {kind.__name__: kind.exit_code for kind in every_kind()}
    assert {name: code for name, (code, _) in KINDS.items()} == kinds and len(kinds) >= 12


def test_every_code_has_a_section():
    by_signal = {128 + number for number in (*SIGNALS, signal.SIGPIPE)}
    codes = {kind.exit_code for kind in every_kind()} | {INTERNAL, HUNG} | by_signal
    codes |= {0, 1, 129}  # 1: tests/cli/test_parity.py, tests/cli/test_replay.py; 129: tests/launch/test_front.py
    assert set(SECTIONS) == codes
    assert {int(n) for row in re.findall(r"^\| (\d[\d, ]*) \|", TEXT, re.MULTILINE) for n in row.split(",")} == codes


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.few(4)
def test_the_examples_are_real(world, name, capsys):
    code, body = KINDS[name]
    command, *shown = example(body)
    words = shlex.split(command)
    assert words[:2] == ["$", "ms-diffsynth"]
    if name in IN_A_PROCESS:
        child = process(COMMAND, *words[2:])
        out, err = child.communicate(timeout=120)
        found = child.returncode
    else:
        found = main(words[2:])
        out, err = capsys.readouterr()
    assert found == code and out == "" and "Traceback" not in err
    assert re.findall(r"^(\w+Error): ", err, re.MULTILINE) == [name]
    assert fits(err, "\n".join(shown)), err


def test_an_internal_error_ends_with_its_traceback_and_what_to_report(world, monkeypatch, capsys):
    def fail(*_):
        raise ZeroDivisionError("hf_abcdefghijklmnop0123 is no divisor")

    monkeypatch.setattr(run_module, "build_pipeline", fail)
    for more in ((), ("--debug",)):
        assert main(["train", "cats.yaml", *more]) == INTERNAL
        err = capsys.readouterr().err
        told, _, traceback = err.partition("Traceback (most recent call last):\n")
        assert ", in fail\n" in traceback and len(told.splitlines()) == 2, "only what `train` says of the run is before"
        assert err.splitlines()[-2] == "ZeroDivisionError: [redacted] is no divisor"
        assert fits(err.splitlines()[-1], example(SECTIONS[INTERNAL])[-1])


FAILS = """
from ms_diffsynth.training.trainer import Trainer
original = Trainer.train_on
def train_on(self, *batch):
    if self.logger.num_steps == 2:
        raise RuntimeError("a kernel failed")
    return original(self, *batch)
Trainer.train_on = train_on
"""


def test_a_step_that_fails_ends_the_process_with_that_code_and_the_run_can_go_on(world, capsys):
    child = process(FAILS + COMMAND, "train", "cats.yaml", "--save_steps", "1", "--max_train_steps", "4")
    _, err = child.communicate(timeout=120)
    assert child.returncode == INTERNAL and "RuntimeError: a kernel failed\nThis is an internal error." in err
    assert main(["train", "cats.yaml", "--max_train_steps", "4", "--resume", "auto"]) == 0
    assert "/runs/cats/checkpoints/step-00000002\n" in capsys.readouterr().err


def test_debug_changes_the_traceback_and_not_the_code(world, capsys):
    assert main(["--debug", "train", "absent.yaml"]) == main(["train", "absent.yaml"]) == 64
    first, *_, last, plain = capsys.readouterr().err.splitlines()
    assert first.startswith("Traceback") and last == f"ms_diffsynth.errors.{plain}"


@pytest.mark.parametrize("reads", [True, False])
def test_what_reads_the_output_may_close_it(reads):
    child = process("import sys\nfrom ms_diffsynth.cli.run_main import run_main\n"
                    "sys.exit(run_main(lambda: sys.stdout.write('a line\\n' * 100_000) and 0))")
    if reads:
        assert child.stdout.readline() == "a line\n"
    child.stdout.close()
    err = child.stderr.read()
    assert child.wait(timeout=60) == 141 and err == ""


def test_a_process_without_an_output_ends_as_any_other():
    child = process("import sys\nfrom ms_diffsynth.cli.run_main import run_main\nsys.stdout = None\n"
                    "sys.exit(run_main(lambda: 3))")
    assert child.communicate(timeout=60)[1] == "" and child.returncode == 3
