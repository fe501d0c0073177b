"""Guards on the tree itself: imports point downward, one place compiles, no prints."""
from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import ms_diffsynth

PACKAGE = Path(ms_diffsynth.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))

# Every layer may import those before it. A file that is no layer of its own belongs to its folder.
LAYERS = ["errors", "redact", "progress", "program", "draws", "data", "formats", "storage", "hub", "launch", "registry",
          "config", "report", "ops", "runtime", "compile", "nn", "core", "evaluate", "units", "diffusion", "models",
          "pipeline", "template", "pipelines", "training", "run", "standin", "debug", "cli", "__main__"]
NO_MINDSPORE = {"errors", "redact", "progress", "program", "draws", "data", "formats", "storage", "hub", "launch",
                "config", "registry", "report", "standin"}
# a guard that asks for the device; a name for type checkers; weights are written by the commit protocol
ALLOWED = {("ops", "runtime"), ("registry", "pipeline"), ("formats", "storage")}
TRAINS = {"pipelines/flux/train_step.py"}  # a step written by hand; sampling imports none of it
EXECUTES = "template/code.py"  # runs a template's model.py, once its user trusts it
COMPILES = {"compile.py", "runtime.py"}
WRAPS_MINDONE = {"training/optim/came.py"}  # one of its optimizers


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Absolute names of modules imported anywhere in a file."""
    found = set()
    package = ["ms_diffsynth", *path.relative_to(PACKAGE).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{a.name}" for a in node.names}
    return found


def name(path: Path) -> str:
    return str(path.relative_to(PACKAGE))


@pytest.mark.parametrize("path", [f for f in FILES if layer_of(f) not in ("__init__",)], ids=name)
def test_imports_point_downward(path):
    layer = layer_of(path)
    assert layer in LAYERS, f"{layer} is no known layer: add it to LAYERS where it belongs"
    for module in imports(path):
        if module.startswith("ms_diffsynth."):
            other = module.split(".")[1]
            is_step = other == "training" and name(path) in TRAINS
            if other in LAYERS and (layer, other) not in ALLOWED and not is_step:
                assert LAYERS.index(other) <= LAYERS.index(layer), f"{name(path)} imports {module}, a layer above it"
        if module.split(".")[0] == "mindone":
            is_allowed = layer in ("pipelines", "ops") or name(path) in WRAPS_MINDONE
            assert is_allowed, f"{name(path)} imports {module}: only pipelines and ops may"
        if module.split(".")[0] == "mindspore":
            assert layer not in NO_MINDSPORE, f"{name(path)} imports {module}: this layer knows no MindSpore"
        assert module.split(".")[0] != "torch", f"{name(path)} imports torch"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_house_rules(path):
    text = path.read_text()
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, "bare except"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            allowed = ("exec",) if name(path) == EXECUTES else ()
            assert node.func.id in allowed or node.func.id not in ("print", "eval", "exec"), f"line {node.lineno}"
    if name(path) not in COMPILES:
        code = re.sub(r'""".*?"""|#[^\n]*|"[^"\n]*"', "", text, flags=re.DOTALL)
        found = re.search(r"ms\.jit\(|@ms\.jit\b|set_context\(|GRAPH_MODE", code)
        assert not found, f"{found} outside compile.py"


def test_every_public_name_is_importable_and_documented():
    for public in ms_diffsynth.__all__:
        assert getattr(ms_diffsynth, public).__doc__, f"{public} has no docstring"
    assert set(ms_diffsynth.__all__) <= set(dir(ms_diffsynth))


def test_importing_the_package_loads_no_framework():
    import subprocess
    import sys

    code = "import sys, ms_diffsynth; sys.exit(int('mindspore' in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, check=False).returncode == 0


def test_type_checkers_know_every_public_name():
    """The imports under ``if TYPE_CHECKING`` are the names that are imported when they are first used."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(n for n in tree.body if isinstance(n, ast.If) and getattr(n.test, "id", None) == "TYPE_CHECKING")
    known = {alias.name: node.module for node in block.body for alias in node.names if alias.name == alias.asname}
    assert known.pop("StaticLossScaler") == "mindspore.amp"
    assert known == {n: f"ms_diffsynth.{module}" for n, module in ms_diffsynth._MODULE_OF.items()}
    assert (PACKAGE / "py.typed").is_file() and "py.typed" in (PACKAGE.parent / "setup.py").read_text()
    assert callable(ms_diffsynth.train) and ms_diffsynth.train.__name__ == "train"  # no folder has the name
