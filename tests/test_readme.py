"""README.md does what it says: every command and every snippet is run, or listed here as needing more than a CPU."""
from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from ms_diffsynth.cli.main import main
from ms_diffsynth.config import load_config
from ms_diffsynth.hub import bundled

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
LINES = [line for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()]
COMMANDS = [part.strip() for line in LINES for part in line.split("&&")]
SETUP = {  # run by whoever installs, and by .ci/run
    "python3 -m venv .venv", ".venv/bin/pip install -e .", ".venv/bin/pip install -e '.[test]'",
    ".venv/bin/ruff check .", ".venv/bin/pytest -n 2 --dist loadfile"}
NEEDS_ASCEND = {".venv/bin/ms-diffsynth train examples/flux/dreambooth_dev_910b.yaml"}
NEEDS_AN_OLD_MINDSPORE = {
    "python3 -m venv .venv-oldest", ".venv-oldest/bin/pip install -e '.[test]' 'mindspore==2.8.0'",
    ".venv-oldest/bin/pytest -n 2 --dist loadfile"}
OURS = [c for c in COMMANDS if c not in SETUP | NEEDS_ASCEND | NEEDS_AN_OLD_MINDSPORE]
SMALL = ["--max_train_steps", "2", "--lr_warmup_steps", "1", "--mode", "pynative", "--height", "32", "--width", "32",
         "--num_inference_steps", "1"]
SMALL_SAMPLE = ["--mode", "pynative", "--num_inference_steps", "1"]


@pytest.fixture(autouse=True)
def checkout(tmp_path, request):
    """The commands are given in the top folder; here it is one that holds the examples and may be written to."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    if "emoji-flux" not in bundled.names():
        request.getfixturevalue("emoji_flux")


def test_ci_runs_the_test_command_word_for_word():
    path = ROOT / ".ci/run"
    assert LINES[1] in path.read_text().splitlines() and os.access(path, os.X_OK)


def test_every_command_is_known():
    assert OURS and {shlex.split(c)[0] for c in OURS} == {".venv/bin/ms-diffsynth", ".venv/bin/python"}
    assert SETUP | NEEDS_ASCEND | NEEDS_AN_OLD_MINDSPORE <= set(COMMANDS)
    assert {kind for kind, _ in BLOCKS} == {"bash", "python", "text"}
    for command in NEEDS_ASCEND:
        load_config(ROOT / shlex.split(command)[-1])


def run(command: str, *more: str) -> int:
    program, *words = shlex.split(command)
    if program == ".venv/bin/python":
        return subprocess.run([sys.executable, *words, *more], env=os.environ | {"PYTHONPATH": str(ROOT)}).returncode
    return main([*words, *more])


def test_its_commands_and_snippets_run_in_their_order(capsys):
    """With two eager steps of 32 x 32 pixels instead of 600 compiled ones of 64 x 64, and images of one step."""
    code = {"text": [block for kind, block in BLOCKS if kind == "text"],
            "python": [block for kind, block in BLOCKS if kind == "python"]}
    for command in OURS:
        small = SMALL if " train " in command else SMALL_SAMPLE if " sample " in command else []
        small = [*small, "--count", "2"] if " --count " in command else small
        capsys.readouterr()
        assert run(re.sub(r"/step-\d+", "/step-2", command), *small) == 0, command
        if " describe " in command:
            assert code["text"] == [capsys.readouterr().out]
    for snippet in code["python"]:
        snippet = snippet.replace("step-600", "step-2").replace("seed=0)", "seed=0, num_inference_steps=1)")
        exec(compile(snippet, "README.md", "exec"), {})
    assert Path("cat.png").is_file() and list(Path("samples").iterdir())


@pytest.mark.slow
def test_the_main_job_leaves_the_files_it_names_and_learns():
    assert run(OURS[0]) == 0
    folder = Path(load_config("examples/flux/emoji_dreambooth.yaml").run.output_path)
    assert f"`{folder}/`" in TEXT
    table = TEXT[TEXT.index("| file | content |") : TEXT.index("Once in the run")]
    named = {name for row in table.splitlines()[2:] if row
             for name in re.findall(r"`([^`]+\.\w+)`", row.split("|")[1])}
    found = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
    assert {name for name in found if not name.startswith(("checkpoints/", "."))} == named
    losses = [float(line.split(",")[2]) for line in (folder / "loss.csv").read_text().splitlines()[1:]]
    assert len(losses) >= 60 and sum(losses[-5:]) < 0.55 * sum(losses[:5])
