"""Parameters by the names PyTorch gives them, and weights put into cells.

MindSpore's own layers name some parameters differently (``gamma``, ``beta``, ``embedding_table``) and keep 1-D
convolutions as 2-D ones; checkpoints in diffusers and transformers format use PyTorch's names and shapes.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn, ops

from ms_diffsynth.errors import WeightError, listing

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d)
_RENAMED = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def torch_parameters(cell: nn.Cell) -> dict[str, Parameter]:
    """Every parameter of ``cell`` under the name PyTorch gives it, in the cell's order."""
    kinds = dict(cell.cells_and_names())
    named = {}
    for name, parameter in cell.parameters_and_names():
        owner, _, last = name.rpartition(".")
        kind = kinds.get(owner)
        if isinstance(kind, _NORMS):
            last = _RENAMED.get(last, last)
        elif isinstance(kind, nn.Embedding) and last == "embedding_table":
            last = "weight"
        named[f"{owner}.{last}" if owner else last] = parameter
    return named


def trainable_parameters(cell: nn.Cell) -> dict[str, Parameter]:
    """`torch_parameters` without PyTorch's buffers, which are loaded and saved, but learn nothing.

    These are the running statistics of norms, and what a cell names in ``buffer_names``.
    """
    buffers = {f"{owner}.{name}" if owner else name for owner, part in cell.cells_and_names()
               for name in (*getattr(part, "buffer_names", ()), "running_mean", "running_var")}
    return {name: parameter for name, parameter in torch_parameters(cell).items() if name not in buffers}


def torch_shapes(cell: nn.Cell) -> dict[str, tuple[int, ...]]:
    """PyTorch name -> PyTorch shape of every parameter."""
    flat = {f"{name}.weight" for name, c in cell.cells_and_names() if isinstance(c, (nn.Conv1d, nn.Conv1dTranspose))}
    return {name: tuple(n for i, n in enumerate(p.shape) if not (name in flat and i == 2))
            for name, p in torch_parameters(cell).items()}


def assign(cell: nn.Cell, tensors: Iterable[tuple[str, np.ndarray]],
           dtype: ms.Type | Callable[[str], ms.Type] | None = None) -> None:
    """Put named arrays into the parameters of ``cell``, one at a time, so that one tensor at most is held twice.

    Args:
        cell: its parameters may be uninitialised (built under ``no_init_parameters``).
        tensors: (PyTorch name, array); names and shapes have been checked before (`formats.weights.match`).
        dtype: the dtype parameters get, for all or by name; None keeps each parameter's own.
    """
    parameters = torch_parameters(cell)
    for name, array in tensors:
        parameter = parameters[name]
        if array.dtype.name.startswith("float8"):  # of others' files; MindSpore takes no such array (2.10)
            array = array.astype(np.float32)
        wanted = (dtype if isinstance(dtype, ms.Type) else dtype(name)) if dtype else parameter.dtype
        if parameter.dtype != wanted:
            parameter.set_dtype(wanted)
        parameter.set_data(Tensor(np.ascontiguousarray(array).reshape(parameter.shape), wanted))


def state_dict(cell: nn.Cell) -> dict[str, np.ndarray]:
    """PyTorch name -> array in PyTorch's shape, copied to the host."""
    shapes = torch_shapes(cell)
    return {name: to_numpy(p).reshape(shapes[name]) for name, p in torch_parameters(cell).items()}


def load_state(own: Mapping[str, Parameter], state: Mapping[str, Tensor | np.ndarray]) -> None:
    """Assign ``state`` to the Parameters of the same names, in place.

    Raises: WeightError that lists every missing, superfluous or misshapen tensor; nothing is assigned then.
    """
    check_state({n: parameter.shape for n, parameter in own.items()}, shapes_of(state))
    for name, parameter in own.items():
        ops.assign(parameter, Tensor(state[name]).astype(parameter.dtype))


def shapes_of(state: Mapping[str, Tensor | np.ndarray]) -> dict[str, tuple[int, ...]]:
    """Name -> shape; of arrays that are read when they are asked for, such as a checkpoint's, as its ``shapes`` say."""
    return state.shapes if hasattr(state, "shapes") else {name: tensor.shape for name, tensor in state.items()}


def check_state(own: Mapping[str, tuple[int, ...]], state: Mapping[str, tuple[int, ...]]) -> None:
    """Compare names and shapes of what there is with those of what is to be loaded.

    Raises: WeightError that lists every missing, superfluous or misshapen tensor.
    """
    wrong = [f"missing: {listing(sorted(own.keys() - state.keys()))}"] if own.keys() - state.keys() else []
    if state.keys() - own.keys():
        wrong.append(f"superfluous: {listing(sorted(state.keys() - own.keys()))}")
    shapes = [f"{name} {tuple(state[name])}, expected {tuple(shape)}" for name, shape in own.items()
              if name in state and tuple(state[name]) != tuple(shape)]
    if shapes:
        wrong.append(f"shape: {listing(shapes)}")
    if wrong:
        raise WeightError(f"saved state does not fit what it is loaded into: {'; '.join(wrong)}. Resume with the "
                          "model, LoRA and optimizer settings the checkpoint was written with.")


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A copy on the host; bfloat16 comes back as ml_dtypes.bfloat16. (``asnumpy`` may be a view of reused memory.)"""
    if tensor.dtype == ms.bfloat16:
        import ml_dtypes

        return tensor.astype(ms.float32).asnumpy().astype(ml_dtypes.bfloat16)
    return tensor.asnumpy().copy()
