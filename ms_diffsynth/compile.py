"""The only place that compiles. One compilation per bucket, announced with a timer and counted.

A compiled step takes single Tensors, positionally: a tuple or dict of Tensors as an argument compiles again at every
call. It is compiled with ``fullgraph=True`` (STRICT): the default, lax level accepts code that writes into an argument
and then returns gradients that are exactly zero (MindSpore 2.7 to 2.10).
"""
from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from typing import Any

import mindspore as ms
from mindspore import Tensor

from ms_diffsynth import runtime
from ms_diffsynth.errors import TrainingError, listing

try:  # MindSpore 2.10 moved the module
    from mindspore.graph.api import _pynative_executor, ms_compile_cache
except ImportError:
    from mindspore.common.api import _pynative_executor, ms_compile_cache

logger = logging.getLogger(__name__)

# Called with (name, shapes) when a compilation begins; returns a function to call with the seconds it took.
Announce = Callable[[str, str], Callable[[float], None]]


def log_only(name: str, shapes: str) -> Callable[[float], None]:
    logger.info("compiling %s for %s", name, shapes)
    return lambda seconds: logger.info("compiled %s in %.1f s", name, seconds)


def _no_breakpoint(*_: Any, **__: Any) -> None:
    """A debugger would stop in MindSpore's compiler, which has none of the values."""
    raise TrainingError("breakpoint() in code that is compiled: there are no values to look at. Expected mode "
                        "pynative: --mode pynative, Accelerator(mode='pynative') or TrainStep(..., mode='pynative').")


def eagerly(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function that may compute gradients.

    What ends it early, an interrupt too, would leave MindSpore 2.10 inside the gradient it was computing: every later
    one of the process would count as nested in it, and fail where a Tensor is indexed with an integer.
    """
    try:
        return function(*arguments)
    except BaseException:
        _pynative_executor.clear_res()
        raise


class CompiledStep:
    """A function of Tensors, compiled once per set of input shapes in mode ``"graph"``, plain in ``"pynative"``.

    Args:
        function: bound method or function; single Tensors in, a tuple of Tensors out.
        name: what the announcement calls it.
        mode: ``"graph"`` or ``"pynative"``.
        planned: the number of compilations the data can need; None for no limit.
        announce: shows the compile phase; see ``Announce``.

    Attributes:
        compilations: how often MindSpore compiled so far, counted in its own cache.
        compile_seconds: time spent in calls that compiled, their first execution included.

    Raises: TrainingError from a call that compiles once more than planned, or again for shapes it has seen, or with an
        argument that is not a Tensor, or where a name has no value on some path.
    """

    def __init__(self, function: Callable[..., Any], name: str, mode: str, planned: int | None = None,
                 announce: Announce = log_only):
        self.name, self.mode, self.planned, self.announce = name, mode, planned, announce
        self._function = function
        if mode == "graph":
            self._function = ms.jit(function, fullgraph=True, jit_level=runtime.current().jit_level)
        self._seen: set[tuple] = set()
        self.compilations, self.compile_seconds = 0, 0.0

    def __call__(self, *tensors: Tensor) -> Any:
        if self.mode != "graph":
            return eagerly(self._function, *tensors)
        odd = [f"argument {k} is a {type(t).__name__}" for k, t in enumerate(tensors) if not isinstance(t, Tensor)]
        if odd:
            raise TrainingError(f"{self.name} takes single Tensors only, but {listing(odd)}: anything else would be a "
                                "constant, compiled in again whenever it changes. Wrap it in a Tensor.")
        shapes = tuple((t.shape, str(t.dtype)) for t in tensors)
        if shapes not in self._seen:
            return self._first_call(shapes, tensors)
        before = len(ms_compile_cache)
        result = self._function(*tensors)
        if len(ms_compile_cache) > before:
            self.compilations += 1
            raise TrainingError(f"{self.name} was compiled again for shapes it had been compiled for: {shapes}. A "
                                "value that should be a Tensor enters the step as a Python constant, or a cell was "
                                "changed after compilation; set it before the first step.")
        return result

    def _first_call(self, shapes: tuple, tensors: tuple[Tensor, ...]) -> Any:
        if self.planned is not None and self.compilations >= self.planned:
            raise TrainingError(f"{self.name} would be compiled once more (compilation {self.compilations + 1}), for "
                                f"{shapes}, but {self.planned} were planned from the buckets: a batch has a shape that "
                                "no bucket allows. Crop or resize the images to the sizes of the buckets.")
        done = self.announce(self.name, " ".join("x".join(map(str, s)) or "scalar" for s, _ in shapes))
        began, before = time.perf_counter(), len(ms_compile_cache)
        hook, sys.breakpointhook = sys.breakpointhook, _no_breakpoint
        try:
            result = self._function(*tensors)
        except NameError as error:
            raise TrainingError(f"{self.name} cannot be compiled: {str(error).splitlines()[0]} In compiled code a name "
                                "has a value on every path: give it one before the 'if', or let the 'if' ask an "
                                "attribute of the step itself (if self.flag; self.args.flag is known too late). A "
                                "global of a script, such as args, becomes an attribute (self.args). In mode pynative "
                                "the code runs as it is.") from error
        finally:
            sys.breakpointhook = hook
        seconds = time.perf_counter() - began
        self._seen.add(shapes)
        self.compilations += len(ms_compile_cache) - before
        self.compile_seconds += seconds
        done(seconds)
        return result
