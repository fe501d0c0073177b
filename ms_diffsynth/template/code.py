"""The code of a template, ``model.py``: read once, shown, and run only when its user trusts it.

``model.py`` runs with all permissions of the user; there is no sandbox. So it never runs without
``trust_template_code``, not even from a local folder. The bytes whose SHA-256 is shown and
pinned are the bytes that run: they are read once, and what compiles them again later (MindSpore reads the source of a
cell when it compiles it) is given the same text.
"""
from __future__ import annotations

import ast
import atexit
import hashlib
import io
import linecache
import shutil
import sys
import tempfile
import traceback
import types
from dataclasses import dataclass
from importlib.util import decode_source
from pathlib import Path

from ms_diffsynth.data.paths import open_regular
from ms_diffsynth.errors import DataError, TemplateError, UntrustedCodeError, WeightError, is_mistake, said, shortened

LARGEST = 1 << 20  # bytes; a model.py is a few kilobytes
PATH_NAME = "TEMPLATE_MODEL_PATH"


@dataclass(frozen=True)
class TemplateCode:
    """The bytes of one ``model.py``. ``origin`` is what messages call it, e.g. with the hub's commit."""

    folder: Path
    source: bytes
    origin: str = ""

    @property
    def path(self) -> Path:
        return self.folder / "model.py"

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.source).hexdigest()

    def __str__(self) -> str:
        origin = f", {self.origin}" if self.origin else ""
        return f"{self.path} ({len(self.source)} bytes, sha256 {self.sha256}{origin})"


def read_code(folder: Path, origin: str = "") -> TemplateCode:
    """Read ``model.py`` of a template's folder; nothing runs. Raises: TemplateError."""
    path = Path(folder) / "model.py"
    if not path.is_file():
        raise TemplateError(f"{folder} is not a template: expected a folder with a model.py that defines "
                            "TEMPLATE_MODEL. Give the folder itself, or owner/name: of one on a hub.")
    try:
        with open_regular(path) as file:
            source = file.read(LARGEST + 1)
    except (OSError, DataError) as error:
        raise TemplateError(f"{path} cannot be read ({error}): expected a file of Python code.") from error
    if len(source) > LARGEST:
        raise TemplateError(f"{path} has more than {LARGEST} bytes: expected the code of one model. Put weights into "
                            "a safetensors file beside it.")
    return TemplateCode(Path(folder), source, origin)


def check_trust(code: TemplateCode, trust_template_code: bool, trust_template_sha256: str | None = None) -> None:
    """Accept code that its user trusts.

    Args:
        trust_template_code: True when the user trusts the code; any other value means no.
        trust_template_sha256: also ask for exactly these bytes.

    Raises: UntrustedCodeError showing path, size and SHA-256.
    """
    if trust_template_code is not True:
        raise UntrustedCodeError(f"{code} is Python code; if it runs, it has all your permissions. None of it has run. "
                                 "Read it, then pass --trust_template_code (trust_template_code=True), with "
                                 f"--trust_template_sha256 {code.sha256} to allow exactly these bytes.")
    if trust_template_sha256 is not None and trust_template_sha256.strip().lower() != code.sha256:
        raise UntrustedCodeError(f"{code} is not what was allowed: expected the bytes of trust_template_sha256="
                                 f"{shortened(trust_template_sha256, 80)}. None of it has run. Find out who changed "
                                 "it; read it again before you allow its new sha256.")


_loaded: dict[tuple[Path, str], types.ModuleType] = {}


def run_code(code: TemplateCode) -> types.ModuleType:
    """Run the code of a template, after `check_trust`, and return its module; the same code runs once.

    ``sys.path`` is as before, and its module has a name of its own, so two templates never collide.

    Raises: TemplateError for code that does not parse or raises, with the line, or defines no TEMPLATE_MODEL.
    """
    key = (code.folder.resolve(), code.sha256)
    if key in _loaded:
        return _loaded[key]
    # MindSpore and tracebacks ask for the text under the path of a copy, which has to exist, but is never read
    folder = Path(tempfile.mkdtemp(prefix="ms_diffsynth-template-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = folder / f"{key[0].name}-{code.sha256[:12]}.py"
    copy.write_bytes(code.source)
    digest = hashlib.sha256(f"{key[0]} {code.sha256}".encode()).hexdigest()
    module = types.ModuleType(f"ms_diffsynth_template_{digest[:16]}")
    module.__file__, module.__source__ = str(code.path), str(copy)
    sys.modules[module.__name__] = module
    try:
        compiled = compile(code.source, str(copy), "exec", dont_inherit=True)
        lines = io.StringIO(decode_source(code.source)).readlines()  # as Python counts lines, unlike str.splitlines
        for path in (copy, code.path):  # a reader of a function asks by the copy's path, of a class by the module's
            linecache.cache[str(path)] = (len(code.source), None, lines, str(path))  # None: never read again
        exec(compiled, module.__dict__)
    except BaseException as error:
        sys.modules.pop(module.__name__, None)
        if not is_mistake(error):
            raise
        raise TemplateError(f"{code.path}{line_in(error, module)}: {said(error)}. Expected code "
                            "that defines TEMPLATE_MODEL; correct it.") from error
    if not callable(getattr(module, "TEMPLATE_MODEL", None)):
        raise TemplateError(f"{code.path} defines no TEMPLATE_MODEL: expected TEMPLATE_MODEL = <class of the model>, "
                            "an nn.Cell with process_inputs and forward. Add that line.")
    _loaded[key] = module
    return module


def line_in(error: BaseException, module: types.ModuleType) -> str:
    """`` line 12``: the innermost line of a template's code that an error came from, or an empty string."""
    if isinstance(error, SyntaxError) and error.lineno:
        return f" line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)
             if frame.filename == module.__source__]
    return f" line {lines[-1]}" if lines else ""


def weight_files(code: TemplateCode, module: types.ModuleType) -> list[Path]:
    """The files TEMPLATE_MODEL_PATH names; none for None, or when it is not there.

    Raises: TemplateError for anything but names of safetensors files inside the template's folder; WeightError for a
        file that is missing.
    """
    named = getattr(module, PATH_NAME, None)
    if named is None:
        return []
    names = [named] if isinstance(named, (str, Path)) else named
    if not isinstance(names, (list, tuple)) or not names or not all(isinstance(n, (str, Path)) for n in names):
        raise TemplateError(f"{code.path}: {PATH_NAME}={named!r}: expected None, a file name or a list of file names.")
    files = [code.folder / name for name in names]
    for name, file in zip(names, files):
        if Path(name).is_absolute() or ".." in Path(name).parts or not is_inside(file, code.folder):
            raise TemplateError(f"{code.path}: {PATH_NAME} names '{name}', which leads out of the template's folder. "
                                "Expected a safetensors file inside it.")
        if file.suffix != ".safetensors":
            raise TemplateError(f"{code.path}: {PATH_NAME} names '{name}': expected a .safetensors file. Others can "
                                "execute code when they are read; save the weights as safetensors.")
    lost = [str(name) for name, file in zip(names, files) if not file.is_file()]
    if lost:
        raise WeightError(f"{code.path}: {PATH_NAME} names {', '.join(lost)}, which {code.folder} does not hold. Copy "
                          f"the file there, or write {PATH_NAME} = None for random weights.")
    return files


def is_inside(file: Path, folder: Path) -> bool:
    """Whether a file is in a folder; the hub's cache keeps links from a snapshot to its own blobs."""
    target, home = file.resolve(), folder.resolve()
    if target.is_relative_to(home):
        return True
    snapshots = home.parent if home.parent.name == "snapshots" else None
    return snapshots is not None and target.parent == snapshots.parent / "blobs"


def with_weight_path(code: TemplateCode, name: str) -> bytes:
    """The source with ``"<name>"`` for what it assigns to TEMPLATE_MODEL_PATH, or with that assignment at its end.

    Raises: TemplateError for code that does not parse.
    """
    try:
        tree = ast.parse(code.source)
    except SyntaxError as error:
        raise TemplateError(f"{code.path} line {error.lineno}: {error.msg}. Correct it.") from error
    lines, new = code.source.splitlines(keepends=True), f'"{name}"'.encode()  # bytes, as ast counts columns
    found = [node.value for node in tree.body if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value and
             PATH_NAME in [getattr(target, "id", "") for target in getattr(node, "targets", None) or [node.target]]]
    for value in reversed(found):
        before, after = lines[value.lineno - 1][:value.col_offset], lines[value.end_lineno - 1][value.end_col_offset:]
        lines[value.lineno - 1:value.end_lineno] = [before + new + after]
    if not found:
        lines.append(b"\n%b = %b\n" % (PATH_NAME.encode(), new))
    return b"".join(lines)
