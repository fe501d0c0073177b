"""Compared quantities: what was found, what a reference holds, how far they differ, and how far they may."""
from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ms_diffsynth.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Tolerances:
    """The largest relative error allowed, by what is compared: the loss of given weights, values of the network,
    gradients, what five updates make of the weights, and the losses in between."""

    loss: float
    value: float
    gradient: float
    trained: float
    losses: float

    def at_least(self, value: float, gradient: float) -> Tolerances:
        """Wider where a case's reference is itself off by this much in bfloat16: half as much again, because another
        order of roundings is another error of that size. What follows from gradients is as far off as they are."""
        value, gradient = 1.5 * value, 1.5 * gradient
        return replace(self, value=max(self.value, value), gradient=max(self.gradient, gradient),
                       trained=max(self.trained, gradient))


# Float32: other orders of sums, and 1e-4 where sums cancel. Bfloat16: one rounding is up to 2 ** -8 = 0.4 % of a
# number, and about forty are between the weights and a value of a tiny network or VAE. They are compared with the
# reference's float32 as vectors in the Euclidean norm, where errors of random sign add up as the root of their number:
# sqrt(40) * 2 ** -8 = 2.5 % of a value, twice that of a gradient, which goes the way back as well (found: 1.8 % and
# 1.4 %, 2026-11-29). Of a mean over thousands of elements, such as a loss, one rounding is left; the losses of five
# updates see weights that are off by some percent (found: 5.4e-3, of FLUX.1-Kontext, 2026-11-30).
TOLERANCES = {"float32": Tolerances(loss=1e-5, value=1e-5, gradient=1e-4, trained=1e-4, losses=1e-4),
              "bfloat16": Tolerances(loss=4e-3, value=2.5e-2, gradient=5e-2, trained=5e-2, losses=1e-2)}

# A device has an exp and a tanh of its own, and Adam multiplies what is off in a gradient near its eps (`together`):
# 6e-5 of a gradient became 3e-4 of the weights. On the stand-in at most 4.2e-5 of them is off (sdxl, 2026-11-30).
ON_ASCEND = {"float32": replace(TOLERANCES["float32"], trained=1e-3), "bfloat16": TOLERANCES["bfloat16"]}


def tolerances(dtype: str, device: str) -> Tolerances:
    """What is allowed for a dtype on "CPU" or "Ascend"."""
    return (ON_ASCEND if device == "Ascend" else TOLERANCES)[dtype]


@dataclass(frozen=True)
class Quantity:
    """One compared quantity.

    Attributes:
        error: the largest difference relative to the reference's largest element, or a count of ``unit``.
        where: where it is largest.
        unit: what is counted (``"of 255"``, ``"of 48 texts"``); empty for a relative error.
    """

    name: str
    error: float
    tolerance: float
    where: str = ""
    unit: str = ""

    @property
    def passes(self) -> bool:
        return self.error <= self.tolerance  # NaN fails

    def __str__(self) -> str:
        verdict = "ok  " if self.passes else "FAIL"
        where = f"  ({self.where})" if self.where else ""
        if self.unit:
            return f"  {verdict} {self.name:<36} {self.error:9g}  <= {self.tolerance:g} {self.unit}{where}"
        return f"  {verdict} {self.name:<36} {self.error:9.1e}  <= {self.tolerance:.0e}{where}"


def relative_error(found: np.ndarray, expected: np.ndarray, scale: float | None = None) -> float:
    """Largest difference over ``scale``, None for the largest expected element; NaN counts as infinite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        raise DataError(f"shape {found.shape} was computed where the reference holds {expected.shape}: the case and "
                        "the pipeline disagree about a size.")
    scale = np.abs(expected).max(initial=0.0) if scale is None else scale
    error = np.abs(found - expected).max(initial=0.0) / (scale if scale > 0 else 1.0)
    return float(error) if np.isfinite(error) else float("inf")


def worst(name: str, pairs: dict[str, tuple[np.ndarray, np.ndarray]], tolerance: float) -> Quantity:
    """The worst of many tensors, each relative to its own largest element, or to a thousandth of the largest of all.

    What is smaller is a sum that cancels, such as the gradient for a bias of keys under a softmax: its error is that of
    what was summed. PyTorch's own float32 is 8e-4 off its float64 there, in a tensor of 6e-5 of the largest (Wan).
    """
    sizes = {key: np.abs(expected).max(initial=0.0) for key, (_, expected) in pairs.items()}
    least = 1e-3 * max(sizes.values())
    errors = {key: relative_error(*pair, max(sizes[key], least)) for key, pair in pairs.items()}
    key = max(errors, key=errors.get)
    return Quantity(f"{name} ({len(errors)} tensors)", errors[key], tolerance, key)


def together(name: str, pairs: dict[str, tuple[np.ndarray, np.ndarray]], tolerance: float) -> Quantity:
    """All tensors as one vector, in the Euclidean norm; the largest single error is shown, but does not decide.

    Adam's first updates are lr g / (|g| + eps): where a gradient is near eps they magnify its last bit, so that even
    two versions of the reference differ by 2e-3 in a single weight of the case flux (docs/explanation/parity.md).
    """
    single = worst(name, pairs, tolerance)
    difference = sum(np.square(np.asarray(a, np.float64) - b).sum() for a, b in pairs.values())
    size = sum(np.square(np.asarray(b, np.float64)).sum() for _, b in pairs.values())
    return Quantity(single.name, float(np.sqrt(difference / size)), tolerance,
                    f"largest single error {single.error:.0e} in {single.where}")
