"""Frozen linear layers stored in 8 bits with one float32 scale per output channel, computed in the input's dtype.

w[o, i] ~ scale[o] q[o, i] with scale = max_i |w| / largest q. (DiffSynth-Studio's float8 storage has no scale: there
5e-4 becomes 0 and 1e-3 becomes 2e-3.) q is float8 (e4m3) where the device can cast it, else int8, which is three times
as exact on normally distributed weights: 0.8 % of the norm of a row of 3072, against 2.6 % (NumPy, 2026-11-21). By its
documentation CANN's Cast has no float8 on Atlas A2 and A3, only on Ascend 950; not tried.
"""
from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, mint, nn, ops
from mindspore.ops import operations as P

from ms_diffsynth import runtime
from ms_diffsynth.errors import ConfigError, WeightError, listing, nearest
from ms_diffsynth.nn.names import to_numpy
from ms_diffsynth.ops import network

logger = logging.getLogger(__name__)

LARGEST = {"int8": 127.0, "float8_e4m3fn": 448.0}  # of the stored numbers
# T5 casts its hidden states to the dtype of this layer's weight, unless that is int8
_ALWAYS_INT8 = ".wo"


@dataclass(frozen=True, kw_only=True)
class StorageReport:
    """What 8-bit storage did to a model. An error is |w - stored| / |w|, norms over one output channel."""

    layers: int
    bytes_before: int  # all parameters of the model
    bytes_after: int
    largest_error: float
    mean_error: float
    dtype: str

    def __str__(self) -> str:
        return (f"{self.layers} linear layers in {self.dtype}: {self.bytes_before / 1e6:.1f} MB -> "
                f"{self.bytes_after / 1e6:.1f} MB, error of a channel {self.mean_error:.2%} (largest "
                f"{self.largest_error:.2%})")


class StoredProduct(nn.Cell):
    """x (scale q)^T, as scale (x q^T): the numbers of q are exact in every dtype, and nothing as large as q is made but
    q in the dtype of x.

    That copy depends on what is computed before it. Else MindSpore makes those of all layers when a step begins, and
    keeps them for backward: FLUX.2-dev in 8 bits took 152 GiB instead of 37.
    """

    def construct(self, x, q, scale):
        # 128 keeps the product within float16, and changes no digit
        product = network.linear_without_bias(x * (1 / 128), ops.depend(q, x).astype(x.dtype))
        return (product.astype(ms.float32) * (scale * 128)).astype(x.dtype)

    def bprop(self, x, q, scale, out, dout):
        scaled = (dout.astype(ms.float32) * scale).astype(x.dtype).reshape(-1, dout.shape[-1])
        dx = _matmul(scaled, ops.depend(q, dout).astype(x.dtype)).reshape(x.shape)
        return dx, _zeros_like(q), _zeros_like(scale)


_stored_product = StoredProduct(auto_prefix=False)
# ops.zeros_like is Python, which MindSpore 2.10 fails to compile in a bprop when other cells have one too (Ascend)
_matmul, _zeros_like = P.MatMul(), P.ZerosLike()


class StoredLinear(mint.nn.Linear):
    """A mint.nn.Linear whose ``weight`` is 8 bits [out, in] and whose ``weight_scale`` is float32 [out]."""

    def construct(self, input):
        out = _stored_product(input, self.weight, self.weight_scale)
        return out if self.bias is None else out + self.bias


class StoredDense(nn.Dense):
    """The same for nn.Dense."""

    def construct(self, x):
        out = _stored_product(x, self.weight, self.weight_scale)
        if self.has_bias:
            out = out + self.bias
        return self.activation(out) if self.activation_flag else out


_STORED = {mint.nn.Linear: StoredLinear, nn.Dense: StoredDense}


def storage_dtype() -> ms.Type:
    """float8 (e4m3) where the device casts it, else int8."""
    if runtime.current().device == "CPU" or not hasattr(ms, "float8_e4m3fn"):
        return ms.int8  # MindSpore 2.10 has the dtype on the CPU, but no cast to it
    try:
        back = Tensor([1.5, -448.0], ms.float32).astype(ms.float8_e4m3fn).astype(ms.float32).asnumpy()
    except (RuntimeError, TypeError, ValueError) as error:
        logger.info("this device does not cast to float8 (%s): int8 is used.", str(error).strip().split("\n")[0])
        return ms.int8
    return ms.float8_e4m3fn if back.tolist() == [1.5, -448.0] else ms.int8


def store_8bit(model: nn.Cell, dtype: ms.Type | None = None) -> StorageReport:
    """Store the weights of every linear layer of ``model`` in 8 bits: before compilation, an adapter injected or not.

    Parameters keep their names; each layer gets one more, ``weight_scale``. A layer of a subclass is taken for what
    its base class computes. Layers that are stored already stay as they are.

    Args:
        dtype: mindspore.int8 or float8_e4m3fn; None means `storage_dtype()`.

    Raises: ConfigError when a weight is trained, naming it, or the model has no linear layer; WeightError for weights
        that are not finite.
    """
    layers = {name: cell for name, cell in model.cells_and_names() if isinstance(cell, tuple(_STORED))}
    trained = [f"{name}.weight" for name, cell in layers.items() if cell.weight.requires_grad]
    if trained:
        raise ConfigError(f"fp8_models: {listing(trained)} of {type(model).__name__} is trained, and 8 bits cannot "
                          "hold the steps of an optimizer. Take the model out of fp8_models, or train a LoRA on it.")
    if not layers:
        raise ConfigError(f"fp8_models: {type(model).__name__} has no linear layer to store in 8 bits. Take it out of "
                          "fp8_models.")
    layers = {name: cell for name, cell in layers.items() if not isinstance(cell, tuple(_STORED.values()))}
    dtype = dtype or storage_dtype()
    before, errors = _bytes(model), []
    for name, cell in layers.items():
        errors.append(_store(name, cell, ms.int8 if name.removesuffix(".base").endswith(_ALWAYS_INT8) else dtype))
    for _, cell in model.cells_and_names():
        if hasattr(cell, "weight_changed"):  # an adapter
            cell.weight_changed()
    error = np.concatenate(errors) if errors else np.zeros(1)
    return StorageReport(layers=len(layers), bytes_before=before, bytes_after=_bytes(model), dtype=_dtype_name(dtype),
                         largest_error=float(error.max()), mean_error=float(error.mean()))


def store_models_8bit(pipe: Any, text: str | None, needed: Iterable[str] | None = None) -> dict[str, StorageReport]:
    """Store the models that ``text`` names (``"dit,text_encoder_2"``) in 8 bits, loading them one after the other.

    Args:
        needed: names of the models this job uses; a model of ``text`` that is not among them is not loaded.

    Returns: model name -> what was done, logged as well.
    Raises: ConfigError for a name that is not a model of the pipeline, or a model that is trained.
    """
    names = list(dict.fromkeys(n.strip() for n in (text or "").split(",") if n.strip()))
    known = [n for n in pipe.model_names if not n.startswith("tokenizer")]
    for name in names:
        if name not in known:
            raise ConfigError(f"fp8_models: '{name}' is not a model of {type(pipe).__name__}: expected some of "
                              f"{listing(known)}.{nearest(name, known)}")
    reports = {}
    for name in names:
        if needed is None or name in needed:
            reports[name] = store_8bit(getattr(pipe, name))
            logger.info("%s: %s", name, reports[name])
    return reports


def _store(name: str, cell: nn.Cell, dtype: ms.Type) -> np.ndarray:
    """Put one layer into 8 bits; returns the relative error of each output channel."""
    weight = to_numpy(cell.weight).astype(np.float32)
    if not np.isfinite(weight).all():
        raise WeightError(f"{name}.weight holds {int((~np.isfinite(weight)).sum())} numbers that are not finite. "
                          "Expected none: download the checkpoint again.")
    largest = LARGEST[_dtype_name(dtype)]
    scale = np.abs(weight).max(axis=1) / np.float32(largest)
    scale[scale == 0] = 1
    numbers = weight / scale[:, None]
    numbers = np.clip(np.rint(numbers) if dtype == ms.int8 else numbers, -largest, largest)
    stored = Tensor(numbers, ms.float32).astype(dtype)
    hold_8bit(cell, stored, Tensor(scale))
    norm = np.linalg.norm(weight, axis=1)
    lost = np.linalg.norm(to_numpy(stored.astype(ms.float32)) * scale[:, None] - weight, axis=1)
    return lost / np.where(norm == 0, 1, norm)


def hold_8bit(cell: nn.Cell, stored: Tensor, scale: Tensor) -> None:
    """Let a linear layer hold ``stored``, 8 bits [out, in], and ``scale``, float32 [out]; its own weight is freed."""
    cell.weight = Parameter(stored, name=cell.weight.name, requires_grad=False)
    cell.weight_scale = Parameter(scale, name=f"{cell.weight.name}_scale", requires_grad=False)
    cell.__class__ = next(kind for base, kind in _STORED.items() if isinstance(cell, base))


def _bytes(model: nn.Cell) -> int:
    return sum(p.size * p.itemsize for p in {id(p): p for p in model.get_parameters()}.values())


def _dtype_name(dtype: ms.Type) -> str:
    return next((n for n in LARGEST if getattr(ms, n, None) == dtype), str(dtype))
