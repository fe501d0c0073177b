"""The table of operators, and how a recorded call becomes arrays and results.

A signature says what the arguments of an aclnn function are, one letter each, as CANN's public description lists them:

    t  tensor (float16 and bfloat16 given as float32)     i  integer of 64 bits     b  boolean
    r  tensor as it lies in memory                        j  integer of 32 or 8     d  double
    T  list of tensors as they lie in memory              c  text                   f  float
    s  scalar object                                      I  array of integers, booleans or floats

What comes after ``->`` is written: the function returns it, a tuple for several. ``&t`` is a tensor that is read and
written in place; it is returned too. ``_`` is an output that is left alone. A tensor that is not given is None.
"""
from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

Array = np.ndarray
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_HALVES = (BFLOAT16, np.dtype(np.float16))
_LETTERS = "trTsijbdfcI_"

ACLNN: dict[str, tuple[str, Callable[..., Any]]] = {}
ACLOP: dict[str, Callable[..., Any]] = {}


def aclnn(name: str, signature: str, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Register the function of ``aclnn<name>``, as a decorator or directly."""
    assert all(part.lstrip("&") in _LETTERS for part in signature.replace("->", " ").split()), signature

    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        ACLNN[f"aclnn{name}"] = (signature, f)
        return f

    return register(function) if function is not None else register


def aclop(name: str, function: Callable[..., Any] | None = None) -> Callable[..., Any]:
    """Register a function(attributes, *inputs) of the older path; it returns its output, or a tuple of them."""
    def register(f: Callable[..., Any]) -> Callable[..., Any]:
        ACLOP[name] = f
        return f

    return register(function) if function is not None else register


def run(call: dict[str, Any]) -> None:
    """Compute a call.

    Raises: NotImplementedError when the table does not have it; TypeError when its arguments are not as the table says.
    """
    name = call["name"]
    with np.errstate(all="ignore"):  # a device divides by zero without a word
        if call["path"] == "aclop":
            if name not in ACLOP:
                raise NotImplementedError(_missing(call, f'@aclop("{name}")  def f(attributes, x, ...)'))
            result = ACLOP[name](call["attributes"], *(promoted(view(t)) for t in call["inputs"]))
            _write(result, [view(t) for t in call["outputs"]])
            return
        if name not in ACLNN:
            short = name.removeprefix("aclnn")
            raise NotImplementedError(_missing(call, f'@aclnn("{short}", "SIGNATURE")  def f(x, ...)'))
        signature, function = ACLNN[name]
        inputs, outputs = _arguments(signature, call["arguments"], call["floats"])
        _write(function(*inputs), outputs)


def view(tensor: dict[str, Any]) -> Array:
    """The array at a tensor's address. It is the memory itself: writing into it writes the tensor."""
    dtype = BFLOAT16 if tensor["dtype"] == "bfloat16" else np.dtype(tensor["dtype"])
    shape = tensor["shape"]
    if 0 in shape:
        return np.empty(shape, dtype)
    size = dtype.itemsize
    strides = tensor.get("strides")
    if strides is None:
        memory = (ctypes.c_char * (size * int(np.prod(shape, dtype=np.int64)))).from_address(tensor["address"])
        return np.ndarray(shape, dtype, memory)
    extent = 1 + sum((n - 1) * s for n, s in zip(shape, strides))
    memory = (ctypes.c_char * (size * extent)).from_address(tensor["address"] + tensor["offset"] * size)
    return np.ndarray(shape, dtype, memory, strides=[s * size for s in strides])


def promoted(array: Array) -> Array:
    """float16 and bfloat16 as float32, anything else as it is."""
    return array.astype(np.float32) if array.dtype in _HALVES else array


def rounded(value: Any, dtype: np.dtype) -> Array:
    """A result in the dtype of its output; NumPy and ml_dtypes round floats to nearest, ties to even."""
    return np.asarray(value).astype(dtype, copy=False)


def _arguments(signature: str, given: Sequence[Any], bits: Sequence[int]) -> tuple[list[Any], list[Any]]:
    """A function's inputs and the arrays to write, from what was recognised of a call."""
    before, _, after = signature.partition("->")
    values, floats = iter(given), iter(bits)
    inputs: list[Any] = []
    outputs: list[Any] = []
    for part in before.split():
        letter = part.lstrip("&")
        if letter in "df":  # these are in registers of their own
            inputs.append(_real(next(floats), letter))
            continue
        value = next(values, _MISSING)
        inputs.append(_input(value, letter, signature))
        if part.startswith("&"):
            outputs.append(view(value) if value != 0 else None)
    for letter in after.split():  # options may stand behind the outputs
        value = next(values, _MISSING)
        if letter in "tT_":
            outputs.append(_output(value, letter, signature))
        else:
            inputs.append(_input(value, letter, signature))
    if next(values, _MISSING) is not _MISSING:
        raise TypeError(f"has more arguments than the table says ('{signature}'): {len(given)}")
    if any(isinstance(x, np.ndarray) and x.dtype == np.float32 for x in inputs):
        inputs = [np.float32(x) if isinstance(x, _Scalar) else x for x in inputs]
    return [float(x) if isinstance(x, _Scalar) else x for x in inputs], outputs


class _Scalar(float):
    """A scalar object's float: it takes the precision of the tensor beside it."""


_MISSING = object()


def _real(bits: int, letter: str) -> float:
    whole = struct.pack("<q", bits)
    return struct.unpack("<d", whole)[0] if letter == "d" else struct.unpack("<f", whole[:4])[0]


def _output(value: Any, letter: str, signature: str) -> Any:
    if value == 0 or letter == "_":
        return None
    if letter == "T" and isinstance(value, dict) and "list" in value:
        return [view(t) for t in value["list"]]
    if letter == "t" and isinstance(value, dict) and "shape" in value:
        return view(value)
    raise TypeError(f"has an output that is not what the table says ('{signature}'): {value}")


def _input(value: Any, letter: str, signature: str) -> Any:
    if letter in "trTsI" and value == 0:
        return None
    if letter in "tr" and isinstance(value, dict) and "shape" in value:
        return promoted(view(value)) if letter == "t" else view(value)
    if letter == "T" and isinstance(value, dict) and "list" in value:
        return [None if t is None else view(t) for t in value["list"]]
    if letter == "s" and isinstance(value, dict) and "scalar" in value:
        return _Scalar(value["scalar"]) if isinstance(value["scalar"], float) else value["scalar"]
    if letter == "I" and isinstance(value, list):
        return value
    if letter == "c" and isinstance(value, str):
        return value
    if letter in "ijb" and isinstance(value, int):
        return {"i": value, "j": (value + 2**31) % 2**32 - 2**31, "b": bool(value & 255)}[letter]
    if value is _MISSING:
        raise TypeError(f"has fewer arguments than the table says ('{signature}')")
    raise TypeError(f"has an argument that is not what the table says ('{signature}', letter {letter}): {value}")


def _write(results: Any, outputs: list[Any]) -> None:
    """Round results into outputs; a result of as many elements may have another shape (a mean kept or not)."""
    if len(outputs) == 1:
        results = (results,)
    for result, output in zip(results, outputs, strict=True):
        if output is None or result is None:
            continue
        if isinstance(output, list):
            _write(tuple(result) if len(output) > 1 else result[0], output)
            continue
        array = rounded(result, output.dtype)
        output[...] = array.reshape(output.shape) if array.size == output.size else array


def _missing(call: dict[str, Any], how: str) -> str:
    def text(argument: Any) -> str:
        if isinstance(argument, dict) and "shape" in argument:
            return f"{argument['dtype']}{argument['shape']}".replace(" ", "")
        if isinstance(argument, dict) and "list" in argument:
            return "[" + ", ".join(text(a) for a in argument["list"]) + "]"
        return f"scalar {argument['dtype']}" if isinstance(argument, dict) else repr(argument)

    arguments = call["arguments"] if call["path"] == "aclnn" else [*call["inputs"], "->", *call["outputs"]]
    return (f"is not computed by the stand-in; it was called with ({', '.join(text(a) for a in arguments)}). Write it "
            f"in ms_diffsynth/standin/compute, from CANN's public description:  {how}  or run with shapes_only")
