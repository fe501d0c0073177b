"""What the package's own code never does: read pickles, run text, start shells, unpack archives."""
from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ms_diffsynth

pytestmark = pytest.mark.fault

ROOT = Path(ms_diffsynth.__file__).parents[1]
SOURCES = [path for folder in ("ms_diffsynth", "examples") for path in sorted((ROOT / folder).rglob("*.py"))]
TRUSTED = {"ms_diffsynth/template/code.py": {"exec"},  # runs a template's model.py, once its user vouches for it
           "ms_diffsynth/ops/cpu/source.py": {"exec_module"}}  # imports mindone
# modules whose only use here would be one of these
MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "zipfile", "tarfile",
           "torch", "code", "codeop", "imp"}
CALLS = {"eval", "exec", "__import__", "execfile", "os.system", "os.popen", "tempfile.mktemp", "yaml.load",
         "yaml.load_all", "yaml.full_load", "yaml.unsafe_load", "shutil.unpack_archive", "ms.load_checkpoint",
         "mindspore.load_checkpoint", "ms.load", "ms.save_checkpoint"}
METHODS = {"extractall", "exec_module", "load_module"}  # of whatever object
FLAGS = {"shell", "allow_pickle", "trust_remote_code"}  # keywords that may not be True
RULES = "S102,S301,S302,S306,S307,S310,S313,S314,S318,S501,S506,S602,S604,S605,S608,S202"  # bandit's, in ruff


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def forbidden(text: str) -> set[str]:
    """What a source does that it may not."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] in MODULES}
        if isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module} if node.module.split(".")[0] in MODULES else set()
            found |= {f"{node.module}.{alias.name}" for alias in node.names} & CALLS
        if isinstance(node, ast.Call):
            found |= {dotted(node.func)} & CALLS | {dotted(node.func).rpartition(".")[2]} & METHODS
            found |= {word.arg for word in node.keywords if word.arg in FLAGS
                      and not (isinstance(word.value, ast.Constant) and word.value.value is False)}
    return found


def test_no_source_does_what_data_could_abuse():
    found = {path.relative_to(ROOT).as_posix(): forbidden(path.read_text(encoding="utf-8")) for path in SOURCES}
    assert {name: things for name, things in found.items() if things} == TRUSTED and len(found) > 150


def test_the_rules_of_bandit_find_nothing_either():
    words = [sys.executable, "-m", "ruff", "check", "--no-cache", "--isolated", "--output-format", "concise",
             "--select", RULES, "ms_diffsynth", "examples"]
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    found = [line.partition(":")[0] for line in result.stdout.splitlines() if ".py:" in line]
    assert set(found) <= set(TRUSTED) and result.returncode < 2, result.stdout + result.stderr


@pytest.mark.parametrize("text", [
    "import pickle", "from pickle import loads", "import joblib", "from zipfile import ZipFile", "import torch.nn",
    "eval('1')", "exec(code)", "os.system('x')", "from os import system", "tempfile.mktemp()", "yaml.load(file)",
    "archive.extractall()", "shutil.unpack_archive(a)", "subprocess.run(x, shell=True)", "subprocess.run(x, shell=y)",
    "np.load(f, allow_pickle=True)", "A.from_pretrained(x, trust_remote_code=True)", "spec.loader.exec_module(m)",
    "ms.load_checkpoint('a.ckpt')"])
def test_each_of_these_would_be_found(text):
    assert forbidden(text)
    assert not forbidden("np.load(f, allow_pickle=False); yaml.compose(f); re.compile(x); model.eval()")
