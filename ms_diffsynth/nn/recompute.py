"""Recompute (gradient checkpointing): a block keeps its inputs and computes the rest again in backward.

A property of the cells, set before the step is compiled and after an adapter was injected. Two forms:

**Blocks that are one cell with their weights as arguments** (`nn.blocks`): `Recomputed`, a cell whose ``bprop`` runs
the block again, on inputs that depend on the gradient that comes in, so that the compiler cannot share what forward
computed. Everything in the block is computed twice and nothing is kept; gradients are equal bit for bit.

**Any other cell**: MindSpore's ``cell.recompute``. In compiled code it goes by the names of scopes: what a block calls
in plain functions and objects, or in a ``bprop`` of its own, may stay kept. Of MindSpore 2.10's settings,

- ``use_reentrant=True``, the default, collects the trainable parameters when it is called: in PyNative a LoRA injected
  later gets no gradient and nothing says so. With ``early_stop=True``, the default of the other form, an exception
  ends the second forward, and a cell with a ``bprop`` of its own does not survive that.
- ``ms.recompute`` in compiled code adds up gradients in another order: equal to 1e-6 only.

``cell.recompute(use_reentrant=False, early_stop=False)`` is equal bit for bit, eager and compiled.
"""
from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn, ops
from mindspore.ops.primitive import constexpr

from ms_diffsynth import runtime
from ms_diffsynth.errors import ConfigError, DeviceError, listing, nearest
from ms_diffsynth.nn.names import to_numpy

# MindSpore before 2.8 has one form only, and 2.8 no early stop
_KNOWN = inspect.signature(ms.recompute).parameters
_OPTIONS = {name: False for name in ("use_reentrant", "early_stop") if name in _KNOWN}


class Kept(nn.Cell):
    """A block that computes once and keeps what backward needs.

    Args:
        block: a cell without parameters: ``block(*activations, weights, lora)``. Activations are Tensors, weights a
            tuple of Parameters, nested or not, lora a tuple of LoRA matrices. One such cell serves all equal blocks.
    """

    def __init__(self, block: nn.Cell):
        super().__init__(auto_prefix=False)
        self.block = block

    def construct(self, activations, weights, lora):
        # Nothing of the block may begin before the first activation is there: MindSpore would compute what needs the
        # others only (modulations by the time embedding, with weights unpacked of 8 bits) for all blocks at once.
        begun = (activations[0],)
        for x in activations[1:]:
            begun += (ops.depend(x, activations[0]),)
        return self.block(*begun, weights, lora)


class Recomputed(Kept):
    """The same, computed again in backward."""

    def __init__(self, block: nn.Cell):
        super().__init__(block)
        self.again = _Again(block)

    def __call__(self, activations, weights, lora):
        """Eager code, where a ``bprop`` cannot take tuples; compiled code reads ``construct``."""
        return ms.recompute(self.block, *activations, weights, lora, **_OPTIONS)

    def construct(self, activations, weights, lora):
        return self.again(activations, _each(_value, weights), lora)


_each, _reshape = ops.HyperMap(), ops.Reshape()


def _value(weight):
    """A weight as what it holds now, by a reshape to its own shape, of which the compiled graph keeps nothing."""
    return _reshape(weight, weight.shape)


def _after(dout, weight):
    return ops.depend(weight, dout)


class _Again(Kept):
    """What `Recomputed` compiles. Its weights are values, not Parameters: those MindSpore 2.10 reads anew in ``bprop``,
    and where a view (``mint.split``, say) lies between two readings, it copies the weights before each of them: all of
    the network, twice, at the beginning of forward and of backward (TensorMove), which is three times its memory.
    """

    def __init__(self, block: nn.Cell):
        super().__init__(block)
        self.gradient = ops.GradOperation(get_all=True, sens_param=True)

    def bprop(self, activations, weights, lora, out, dout):
        again = ()
        for x in activations:
            again += (ops.depend(x, dout),)
        # weights too: what is unpacked of 8 bits would be shared
        gradients = self.gradient(self.block)(*again, _each(ops.partial(_after, dout), weights), lora, dout)
        return gradients[:-2], gradients[-2], gradients[-1]


class Offloaded(Kept):
    """The same, computed again in backward from activations that are kept on the host; eager code only."""

    def __call__(self, activations, weights, lora):
        return _offloaded_forward(self.block.construct, *activations, weights, lora)


def use_recompute(model: nn.Cell, blocks: Sequence[str] | None = None, offload: bool = False) -> int:
    """Recompute the repeated blocks of ``model`` in backward; gradients stay the same bit for bit.

    Call it after an adapter was injected, before compilation; a second call leaves blocks that recompute as they are.

    Args:
        blocks: names of cells; a CellList means each of its cells. None takes those that the model names in
            ``repeated``; of a network whose blocks are arranged (`nn.blocks`) their lists; or every CellList that is in
            no other.
        offload: also keep the inputs of the blocks in the memory of the host. In mode ``"pynative"`` only.

    Returns: the number of blocks that recompute.
    Raises: ConfigError for a name that is not a cell of the model, or a model without CellLists; DeviceError when
        ``offload`` cannot be had.
    """
    if offload:
        _can_offload()
    cells = dict(model.cells_and_names())
    lists = [name for name, cell in cells.items() if isinstance(cell, nn.CellList)]
    outer = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    if hasattr(model, "kinds"):  # of `nn.blocks.Arranged`; its other lists hold single layers
        blocks_of = {id(block) for kind in model.kinds().values() for block in getattr(model, kind.list_name)}
        outer = [name for name in outer if any(id(block) in blocks_of for block in cells[name])]
    outer = getattr(model, "repeated", outer)
    wrong = [name for name in blocks or () if name not in cells]
    if wrong or not (outer if blocks is None else blocks):
        raise ConfigError(f"recompute: {listing(map(repr, wrong)) or 'no blocks'} found in {type(model).__name__}."
                          f"{nearest(wrong[0], cells) if wrong else ''} Expected names of its cells, e.g. its lists "
                          f"{listing(outer) or '(it has none)'}. Name some, or turn use_gradient_checkpointing "
                          "off for this model.")
    chosen: list[nn.Cell] = []
    for name in outer if blocks is None else blocks:
        chosen += list(cells[name]) if isinstance(cells[name], nn.CellList) else [cells[name]]
    for block in chosen:
        if not getattr(block, "is_recomputed", False):
            block.is_recomputed, block.is_offloaded = True, offload
            if getattr(block, "is_arranged", False):
                continue  # `nn.blocks` reads the marks
            if offload:
                block.construct = partial(_offloaded_forward, block.construct)
            else:
                block.recompute(**_OPTIONS)
    model.has_recomputed_blocks = True
    return len(chosen)


def gradient_checkpoint_forward(model: nn.Cell, use_gradient_checkpointing: bool,
                                use_gradient_checkpointing_offload: bool, *args: Any, **kwargs: Any) -> Any:
    """``model(*args, **kwargs)``, recomputed in backward when asked. Usable in eager and in compiled model code.

    A block that `use_recompute` has marked is called as it is: it recomputes already. Any other is recomputed from
    here: equal bit for bit in PyNative, to 1e-6 in a compiled step (gradients are added in another order).

    Args:
        use_gradient_checkpointing_offload: also keep the inputs on the host; eager code only.

    Raises: DeviceError for offload in a compiled step.
    """
    is_recomputed = getattr(model, "is_recomputed", False)
    if use_gradient_checkpointing_offload and not is_recomputed and _can_offload():
        return _offloaded_forward(model.construct, *args, **kwargs)
    if use_gradient_checkpointing and not is_recomputed:
        return ms.recompute(model, *args, **_OPTIONS, **kwargs)
    return model(*args, **kwargs)


@constexpr
def _can_offload() -> bool:
    """True, or the error; a constant in compiled code.

    MindSpore's own ``Cell.offload`` does not fit a compiled step: it marks primitives that are attributes of cells, of
    which networks built on mint have none, and asks for lazy_inline in a process of graph mode (2.7 to 2.10).
    """
    if runtime.current().mode == "graph":
        raise DeviceError("use_gradient_checkpointing_offload is on in mode graph: MindSpore cannot move what a "
                          "compiled step of this network keeps to the host. Expected mode pynative; or set "
                          "use_gradient_checkpointing instead, which keeps the inputs of the blocks on the device.")
    if not hasattr(ms, "saved_tensors_hooks"):
        raise DeviceError(f"use_gradient_checkpointing_offload is on with MindSpore {ms.__version__}: expected one "
                          "with saved_tensors_hooks, e.g. 2.10. Install it, or set use_gradient_checkpointing instead.")
    return True


def _offloaded_forward(construct: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # MindSpore 2.10 hands positional Tensors to the hooks, keyword arguments and tuples stay on the device
    given = inspect.signature(construct).bind(*args, **kwargs)
    given.apply_defaults()
    with ms.saved_tensors_hooks(_to_host, _to_device):
        return ms.recompute(construct, *given.args, **_OPTIONS, **given.kwargs)


def _to_host(tensor: Tensor) -> tuple[np.ndarray, ms.Type]:
    return to_numpy(tensor), tensor.dtype


def _to_device(kept: tuple[np.ndarray, ms.Type]) -> Tensor:
    return Tensor(kept[0], kept[1])
