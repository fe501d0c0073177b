"""What the tensors of an adapter mean: each kind that files hold, and how it changes the weight of a layer.

LoRA and DoRA are trained here; the others are read, added to weights, renamed and made into a LoRA.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ms_diffsynth.errors import WeightError

Parts = Mapping[str, np.ndarray]  # part -> tensor of one module
A, B, MAGNITUDE, ROWS = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector", "rows"
SMALLEST = 1e-24  # of the squared norm of a row: below it the row counts as zero


def rank_of(parts: Parts) -> int:
    """The rank r of A [r, in] and B [out, r]; 0 when they do not fit together."""
    a, b = parts[A], parts[B]
    return a.shape[0] if a.ndim == 2 and b.ndim == 2 and a.shape[0] == b.shape[1] else 0


def fits(parts: Parts, weight: tuple[int, int]) -> bool:
    """Whether A [r, in] and B [out, r] belong to a weight [out, in]."""
    return (parts[B].shape[0], parts[A].shape[1]) == weight


def product(parts: Parts) -> np.ndarray:
    """B A, float32 [out, in]."""
    return parts[B].astype(np.float32) @ parts[A].astype(np.float32)


@dataclass(frozen=True, eq=False)
class Format:
    """A kind of adapter: the tensors of a module, what files and metadata say of them, and what they do to a weight.

    Attributes:
        name: what messages call it. group, shapes: what they call the tensors of a module, and expect of them.
        parts: part -> what it is called in files, before a ``.default`` and a ``.weight`` that readers of all kinds add
            or leave out. A part is the end of a tensor's name as it is written, behind the module.
        scaled: the part that takes the scale of the file: the weight depends on the scale times it.
        rank: of the tensors of a module, 0 when they do not fit together.
        fits: whether these belong to a weight of this shape [out, in].
        fused: the weight of a layer with the change in it, float32 [out, in], of the weight, float32 [out, in], the
            tensors of the layer in any float dtype, and a factor on the change.
        settings: what peft's adapter sets, such as ``use_dora``, next to its rank, scale and modules.
        product: the change alone, float32 [out, in]; None where it depends on the weight.
        layouts: of `interchange.LAYOUTS`, those whose programs read it; None is all of them.
        gathered: for kinds with optional tensors: from those that there are to the parts, and the rank that divides
            alpha, which is None where alpha means nothing.
    """

    name: str
    group: str
    shapes: str
    parts: Mapping[str, tuple[str, ...]]
    scaled: str
    rank: Callable[[Parts], int]
    fits: Callable[[Parts, tuple[int, int]], bool]
    fused: Callable[[np.ndarray, Parts, float], np.ndarray]
    settings: Mapping[str, Any] = field(default_factory=dict)
    product: Callable[[Parts], np.ndarray] | None = None
    layouts: tuple[str, ...] | None = None
    gathered: Callable[[dict[str, np.ndarray]], tuple[dict[str, np.ndarray], int | None]] | None = None

    def missing(self, parts: Iterable[str]) -> list[str]:
        """The parts that are not among ``parts``, as messages call them."""
        return [label(part) for part in self.parts if part not in parts] if self.gathered is None else []


def label(part: str) -> str:
    """What messages call a part: ``A`` for ``lora_A.weight``."""
    return part.partition(".")[0].removeprefix("lora_")


LORA = Format(name="LoRA", group="pair", shapes="A [r, in] and B [out, r]", scaled=B, rank=rank_of, fits=fits,
              parts={A: ("lora_A", "lora_down", "down"), B: ("lora_B", "lora_up", "up")}, product=product,
              fused=lambda weight, parts, scale: weight + np.float32(scale) * product(parts))


def _fused_dora(weight: np.ndarray, parts: Parts, scale: float) -> np.ndarray:
    """``scale`` is a factor on B A, as peft has it: with 0 only the magnitudes change."""
    direction = weight + np.float32(scale) * product(parts)
    norms = np.linalg.norm(direction, axis=1, keepdims=True)
    return parts[MAGNITUDE].astype(np.float32)[:, None] / np.maximum(norms, np.sqrt(SMALLEST)) * direction


DORA = replace(LORA, name="DoRA", group="triple", parts={**LORA.parts, MAGNITUDE: (MAGNITUDE, "dora_scale")},
               shapes="A [r, in], B [out, r] and magnitude_vector [out]", settings={"use_dora": True}, product=None,
               rank=lambda parts: rank_of(parts) * (parts[MAGNITUDE].shape == parts[B].shape[:1]),
               fused=_fused_dora, layouts=("diffusers", "comfy", "kohya"))

# -- read, not trained -------------------------------------------------------------------------------------------------


def _additive(change: Callable[[Parts], np.ndarray], name: str, shapes: str, parts: tuple[str, ...], scaled: str,
              gathered: Callable[[dict[str, np.ndarray]], tuple[dict[str, np.ndarray], int | None]]) -> Format:
    """A kind whose tensors are multiplied to the change, of which a module may have some ``rows`` [first, end]."""

    def rows(parts: Parts) -> np.ndarray:
        whole = change({name: array.astype(np.float32) for name, array in parts.items() if name != ROWS})
        return whole[slice(*parts[ROWS])] if ROWS in parts else whole

    return Format(name=name, group="group", shapes=shapes, parts={part: (part,) for part in parts}, scaled=scaled,
                  rank=lambda parts: 1, fits=lambda parts, weight: rows(parts).shape == weight, product=rows,
                  fused=lambda weight, parts, scale: weight + np.float32(scale) * rows(parts),
                  layouts=("comfy", "kohya"), gathered=gathered)


def _gather_lokr(found: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int | None]:
    parts, rank = {}, None
    for name in ("lokr_w1", "lokr_w2"):
        if name in found:
            parts[name] = found[name]
        elif f"{name}_a" in found and f"{name}_b" in found:
            a, b = (found[f"{name}_{side}"].astype(np.float32) for side in "ab")
            parts[name], rank = _matmul(a, b, name), b.shape[0]
        else:
            raise WeightError(f"no {name}, nor {name}_a and {name}_b")
    if any(array.ndim != 2 for array in parts.values()):
        raise WeightError("is of a convolution: expected matrices lokr_w1 and lokr_w2")
    return parts, rank


def _gather_loha(found: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int | None]:
    names = [f"hada_w{k}_{side}" for k in (1, 2) for side in "ab"]
    if lost := [name for name in names if name not in found]:
        raise WeightError(f"no {' and no '.join(lost)}")
    for k in (1, 2):
        _matmul(*(found[f"hada_w{k}_{side}"] for side in "ab"), f"hada_w{k}")
    return {name: found[name] for name in names}, found["hada_w1_b"].shape[0]


def _matmul(a: np.ndarray, b: np.ndarray, name: str) -> np.ndarray:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise WeightError(f"{name}_a {a.shape} and {name}_b {b.shape} cannot be multiplied")
    return a.astype(np.float32) @ b.astype(np.float32)


def _gather_full(found: dict[str, np.ndarray]) -> tuple[dict[str, np.ndarray], int | None]:
    if found["diff"].ndim != 2:
        raise WeightError(f"diff {found['diff'].shape}: expected the change of a linear layer, [out, in]")
    return found, None


def _hadamard(parts: Parts) -> np.ndarray:
    return (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])


# Source: LyCORIS 3.2, modules/lokr.py: alpha divides by the rank of what is itself a product, and means nothing else
LOKR = _additive(lambda parts: np.kron(parts["lokr_w1"], parts["lokr_w2"]), "LoKr", "lokr_w1 and lokr_w2",
                 ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"), "lokr_w1", _gather_lokr)
LOHA = _additive(_hadamard, "LoHa", "hada_w1_a @ hada_w1_b and hada_w2_a @ hada_w2_b",
                 ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), "hada_w1_a", _gather_loha)
FULL = _additive(lambda parts: parts["diff"], "weight change", "diff [out, in]", ("diff",), "diff", _gather_full)

READ = (LORA, DORA, LOKR, LOHA, FULL)
