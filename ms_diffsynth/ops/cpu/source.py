"""Adapts mindone's modules while they are imported; the files on disk, and their byte code, stay as they are.

In a compiled graph ``x.chunk(2)`` is resolved inside MindSpore's C++ front end to a primitive without CPU kernel and
cannot be replaced from Python (MindSpore 2.7 to 2.10). So ``x.chunk(2)`` becomes ``cpu_chunk((x), 2)`` in the text that
Python and the graph compiler see. Line numbers stay, so that a traceback points at the right line of mindone's file.
"""
from __future__ import annotations

import ast
import gc
import importlib.abc
import importlib.machinery
import linecache
import re
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.common import dtype as mstype

from ms_diffsynth.ops.cpu import tensor


def cpu_clone(x):
    """A copy; what is not a tensor is asked for its own."""
    if not isinstance(x, Tensor):
        return x.clone()
    if x.dtype == mstype.bool_:
        return ops.logical_or(x, x)
    return x * 1


def cpu_split(x, *args, **kwargs):
    """The method of a tensor, or that of a string."""
    if isinstance(x, Tensor):
        return tensor.split(x, *args, **kwargs)
    return x.split(*args, **kwargs)


def cpu_nonzero(x, *, as_tuple=False):
    """Indices of what is not zero, int64 [n, axes], or [n] for each axis; what is not a tensor is asked for its own."""
    if not isinstance(x, Tensor):
        return x.nonzero()
    indices = ops.nonzero(x)
    return ops.unbind(indices, 1) if as_tuple else indices


METHODS: dict[str, Callable] = {"chunk": tensor.chunk, "clone": cpu_clone, "nonzero": cpu_nonzero,
                                "repeat_interleave": tensor.repeat_interleave}
if tuple(int(n) for n in ms.__version__.split(".")[:2]) < (2, 10):
    METHODS["split"] = cpu_split
PREFIX = "cpu_"
_CALL = re.compile(rb"\.(?:" + "|".join(METHODS).encode() + rb")\(")
MODULES = ("F", "mindspore", "mindspore.mint", "mindspore.ops", "mint", "ms", "ms.mint", "ms.ops", "np", "ops", "re",
           "torch")


def adapt(source: str) -> str:
    """``source`` with each call of a tensor method in METHODS as a call of ``cpu_<method>``, line by line the same."""
    text = source.encode()
    rows = [text.count(b"\n", 0, hit.start()) + 1 for hit in _CALL.finditer(text)]
    if not rows:
        return source
    lines = [0, *(newline.end() for newline in re.finditer(b"\n", text))]  # where each line starts
    edits = []  # (start, -end of the call, end, replacement); at the same start the outer call comes first
    for node in _method_calls(ast.parse(source), rows):
        method = node.func.attr
        start, stop = lines[node.lineno - 1] + node.col_offset, lines[node.end_lineno - 1] + node.end_col_offset
        name_end = lines[node.func.end_lineno - 1] + node.func.end_col_offset
        dot, opening = text.rindex(b".", 0, name_end - len(method) + 1), text.index(b"(", name_end)
        edits.append((start, -stop, start, f"{PREFIX}{method}((".encode()))
        edits.append((dot, -stop, opening + 1, b"), " if node.args or node.keywords else b")"))
    out, done = [], 0
    for start, _, end, replacement in sorted(edits):
        out += [text[done:start], replacement]
        done = end
    return b"".join([*out, text[done:]]).decode()


def _method_calls(node: ast.AST, rows: list[int]) -> Iterator[ast.Call]:
    """The calls below ``node``; looks only where one of ``rows`` is."""
    for child in ast.iter_child_nodes(node):
        first = getattr(child, "lineno", None)
        if first is not None and bisect_left(rows, first) == bisect_right(rows, child.end_lineno):
            continue
        if _is_method_call(child):
            yield child
        yield from _method_calls(child, rows)


def _is_method_call(node: ast.AST) -> bool:
    """A call of a method in METHODS; ``mint.chunk(x, 2)`` is not one, and neither is ``clone`` with arguments."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in METHODS):
        return False
    if node.func.attr == "clone" and (node.args or node.keywords):
        return False
    return ast.unparse(node.func.value) not in MODULES


@contextmanager
def _no_collection() -> Iterator[None]:
    """A syntax tree is many small objects: collecting them in vain takes four times as long as parsing."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads one module of mindone from its adapted text, then replaces the names ``after`` lists for it; a
    ``Class.method`` by what its function there makes of the original.
    """

    after: dict[str, dict[str, object]] = {}

    def get_code(self, fullname: str):
        path = self.get_filename(fullname)
        source = self.get_source(fullname)
        with _no_collection():
            adapted = adapt(source)
        if adapted == source:
            return super().get_code(fullname)
        # the graph compiler reads a function's source from here; no modification time means: never look at the file
        linecache.cache[path] = (len(adapted), None, [line + "\n" for line in adapted.split("\n")], path)
        return compile(adapted, path, "exec", dont_inherit=True)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update({PREFIX + method: function for method, function in METHODS.items()})
        super().exec_module(module)
        for path, value in self.after.get(module.__name__, {}).items():
            owner, name = module, path
            if "." in path:
                owner, name = getattr(module, path.split(".")[0], None), path.split(".")[1]
            if not hasattr(owner, name):
                raise AttributeError(f"{module.__name__} has no {path} for the CPU layer to replace: expected "
                                     "mindone 0.5. Install mindone 0.5.")
            setattr(owner, name, value if owner is module else value(getattr(owner, name)))


# mindone imports every model it has, some 700 modules, as soon as one is asked for. Only the families' networks and
# what they are built from are adapted: parsing the rest would take another 3 s (2026-11-21).
_TEXT_ENCODERS = ("bert", "clip", "llama", "mistral", "mistral3", "pixtral", "qwen2", "qwen2_5_vl", "qwen2_vl", "qwen3",
                  "t5")
_ADAPTED = re.compile(r"mindone\.(?:diffusers\.(?:models|schedulers|utils|pipelines\.flux)\b|models\.|utils\.|"
                      rf"transformers\.(?:[a-z_]+$|(?:integrations|generation)\b|models\.(?:{'|'.join(_TEXT_ENCODERS)})\b))")


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if not (_ADAPTED.match(fullname) or fullname in _Loader.after):
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


def adapt_imports(replace: dict[str, dict[str, object]]) -> None:
    """From now on adapt the networks of mindone; ``replace`` maps a module to the names to replace in it."""
    _Loader.after = replace
    sys.meta_path.insert(0, _Finder())
