"""Sigmas as lists: the grid that training draws from, and the steps that sampling walks. NumPy only.

A `Grid` spaces n sigmas evenly and warps them; a `Schedule` is one grid for training and one for sampling. Everything
is float32. Training grids equal the reference cases' to the last bit, and sampling sigmas those of diffusers 0.42: a
sinusoid of 1000 sigma, and what a network makes of it, is off by 1e-5 where a sigma is off by its last bit.
"""
from __future__ import annotations

import math
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from ms_diffsynth.errors import ConfigError, listing, naming
from ms_diffsynth.formats.json_text import is_of, shown, words_of

_f32 = np.float32

# A warp maps sigmas float32 [n] to sigmas float32 [n]; some depend on the length of the image sequence, in tokens.
Warp = Callable[[np.ndarray, int | None], np.ndarray]


def linspace(first: float, last: float, n: int) -> np.ndarray:
    """``n`` float32 values from ``first`` to ``last``, equal to torch.linspace's on a CPU.

    Counted from the nearer end with one rounding each (fused multiply-add), which float64 reproduces here.
    np.linspace, rounded to float32, differs in one bit at up to 300 of 1000 values after a shift.
    """
    step = float(_f32((_f32(last) - _f32(first)) / _f32(max(n - 1, 1))))
    i = np.arange(n)
    from_first = float(_f32(first)) + step * i
    from_last = float(_f32(last)) - step * (n - 1 - i)
    return np.where((i < n // 2) | (n == 1), from_first, from_last).astype(_f32)


def to_one_nth(n: int) -> np.ndarray:
    """1, ..., 1/n: diffusers' spacing."""
    return linspace(1.0, 1.0 / n, n)


def to_one_nth_by_numpy(n: int) -> np.ndarray:
    """The same, computed in float64 and rounded: that of diffusers' pipelines, in the last bit another."""
    return np.linspace(1.0, 1.0 / n, n).astype(_f32)


def one_to_zero(n: int) -> np.ndarray:
    """n even steps from 1 down towards 0, which is not reached: DiffSynth-Studio's for Qwen-Image and Z-Image."""
    return linspace(1.0, 0.0, n + 1)[:-1]


def to_three_thousandths(n: int) -> np.ndarray:
    """1, ..., 0.003/1.002: DiffSynth-Studio's spacing for FLUX.1."""
    return linspace(1.0, 0.003 / 1.002, n)


@dataclass(frozen=True)
class Shift:
    """s -> f s / (1 + (f - 1) s): more steps at high noise for f > 1.

    Source: Esser et al. 2024, equation 23.
    """

    factor: float

    def __call__(self, sigmas: np.ndarray, seq_len: int | None = None) -> np.ndarray:
        return _f32(self.factor) * sigmas / (_f32(1) + _f32(self.factor - 1) * sigmas)


@dataclass(frozen=True)
class ExponentialShift:
    """s -> e^mu / (e^mu + 1/s - 1); the same as `Shift` by e^mu.

    Source: diffusers 0.39, FlowMatchEulerDiscreteScheduler._time_shift_exponential.
    """

    mu: float

    def __call__(self, sigmas: np.ndarray, seq_len: int | None = None) -> np.ndarray:
        growth = _f32(np.exp(self.mu))
        return growth / (growth + (_f32(1) / sigmas - _f32(1)))


@dataclass(frozen=True)
class TorchExponentialShift(ExponentialShift):
    """The same in torch's arithmetic, which differs in the last bit at 268 of 1000 sigmas.

    There a number over a tensor is the tensor's reciprocal times the number.

    Source: DiffSynth-Studio 2.1.12, FlowMatchScheduler, set_timesteps_flux2 and set_timesteps_qwen_image.
    """

    def __call__(self, sigmas: np.ndarray, seq_len: int | None = None) -> np.ndarray:
        growth = _f32(np.exp(self.mu))
        return growth * (_f32(1) / (growth + (_f32(1) / sigmas - _f32(1))))


@dataclass(frozen=True)
class LinearShift:
    """s -> mu / (mu + 1/s - 1); the same as `Shift` by mu.

    Source: diffusers 0.42, FlowMatchEulerDiscreteScheduler._time_shift_linear.
    """

    mu: float

    def __call__(self, sigmas: np.ndarray, seq_len: int | None = None) -> np.ndarray:
        return _f32(self.mu) / (_f32(self.mu) + (_f32(1) / sigmas - _f32(1)))


TIME_SHIFTS = {"exponential": ExponentialShift, "linear": LinearShift}


@dataclass(frozen=True, kw_only=True)
class LinearMu:
    """mu grows linearly with the image sequence, through two given points (tokens, mu); not clamped outside them.

    Source: diffusers 0.39, pipelines/flux/pipeline_flux.py, calculate_shift.
    """

    base_seq_len: int = 256
    max_seq_len: int = 4096
    base_mu: float = 0.5
    max_mu: float = 1.15

    def __call__(self, seq_len: int, steps: int | None = None) -> float:
        slope = (self.max_mu - self.base_mu) / (self.max_seq_len - self.base_seq_len)
        return seq_len * slope + self.base_mu - slope * self.base_seq_len


@dataclass(frozen=True)
class DynamicShift:
    """A shift that follows the size of the image: ``mu(image tokens, sampling steps)``, then one of ``TIME_SHIFTS``.

    Raises: ConfigError when no sequence length is given.
    """

    mu: Callable[[int, int], float] = LinearMu()
    time_shift: str = "exponential"

    def __call__(self, sigmas: np.ndarray, seq_len: int | None = None) -> np.ndarray:
        if seq_len is None:
            raise ConfigError("seq_len=None: this schedule shifts by the image's size, so it needs the number of image "
                              "tokens. Pass seq_len = (height // 16) * (width // 16) pixels for FLUX.1.")
        return TIME_SHIFTS[self.time_shift](self.mu(seq_len, len(sigmas)))(sigmas)


@dataclass(frozen=True)
class TerminalStretch:
    """Stretch 1 - s linearly so that the last sigma becomes ``terminal``: as NumPy 2 computes it, all in float32.

    Source: diffusers 0.39, FlowMatchEulerDiscreteScheduler.stretch_shift_to_terminal.
    """

    terminal: float

    def __call__(self, sigmas: np.ndarray, seq_len: int | None = None) -> np.ndarray:
        rest = _f32(1) - sigmas
        if rest[-1] == 0:  # a single step from pure noise: nothing to stretch
            return sigmas
        return _f32(1) - rest / (rest[-1] / _f32(1 - self.terminal))


@dataclass(frozen=True)
class Grid:
    """Evenly spaced sigmas, then warped, in float32, or in float64 where ``spacing(n)`` gives that."""

    spacing: Callable[[int], np.ndarray]
    warps: tuple[Warp, ...] = ()

    def __call__(self, n: int, seq_len: int | None = None) -> np.ndarray:
        """``n`` decreasing sigmas, float32, none of them 0.

        Raises: ConfigError for n < 1.
        """
        if n < 1:
            raise ConfigError(f"num_inference_steps={n}: expected at least 1.")
        sigmas = self.spacing(n)
        for warp in self.warps:
            sigmas = warp(sigmas, seq_len)
        return sigmas.astype(_f32)


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The sigmas of a model: ``sigmas`` is the grid training draws from, ``sampling(n)`` the steps of sampling."""

    training: Grid
    inference: Grid
    num_train_timesteps: int = 1000

    @cached_property
    def sigmas(self) -> np.ndarray:
        """Training sigmas, float32 [num_train_timesteps], decreasing; read-only. Index it, never search in it."""
        grid = self.training(self.num_train_timesteps)
        grid.setflags(write=False)
        return grid

    def sampling(self, num_inference_steps: int, seq_len: int | None = None) -> np.ndarray:
        """Sampling sigmas, float32 [n + 1], decreasing to exactly 0. ``seq_len``: image tokens, for dynamic shifts."""
        return sampling_sigmas(num_inference_steps, self.inference, seq_len)


def sampling_sigmas(num_inference_steps: int, grid: Grid, seq_len: int | None = None) -> np.ndarray:
    """``num_inference_steps`` sigmas of ``grid`` and a final 0: float32 [n + 1]."""
    return np.append(grid(num_inference_steps, seq_len), _f32(0))


def last_steps(sigmas: np.ndarray, denoising_strength: float = 1.0) -> np.ndarray:
    """Of sampling sigmas [n + 1] those that sampling from an image walks: its last n * denoising_strength steps.

    A part of a step is a step; at 1 all are kept. Raises: ConfigError for a strength that is not in (0, 1].
    Source: diffusers 0.39, FluxImg2ImgPipeline.get_timesteps. (DiffSynth-Studio spreads all n steps over the levels
    below sigma = denoising_strength, before the shift.)
    """
    check_strength(denoising_strength)
    n = len(sigmas) - 1
    return sigmas[int(max(n - min(n * denoising_strength, n), 0)):]


def check_strength(denoising_strength: float) -> None:
    """Raises: ConfigError for what is not a number in (0, 1]."""
    if not _is_number(denoising_strength) or not 0 < denoising_strength <= 1:
        raise ConfigError(f"denoising_strength={denoising_strength!r}: expected a number above 0, at most 1. 1 keeps "
                          "nothing of the image, 0.3 most of it.")


def diffsynth_flux(shift: float = 3.0) -> Schedule:
    """FLUX.1 as DiffSynth-Studio trains and samples it.

    Source: DiffSynth-Studio 2.1.12, FlowMatchScheduler(template="FLUX.1").
    """
    grid = Grid(to_three_thousandths, (Shift(shift),))
    return Schedule(training=grid, inference=grid)


def flow_match_euler(shift: float = 3.0) -> Schedule:
    """The grid of diffusers' FlowMatchEulerDiscreteScheduler with a fixed shift, sampled from 1 to 1/n.

    The training grid is torch.linspace(1, 1/1000, 1000), shifted, as in the reference cases. The scheduler divides
    1000, 999, ... by 1000 instead, which differs in the last bit at 305 of the 1000 places for shift 3.

    Source: diffusers 0.39, scheduling_flow_match_euler_discrete.py. With ``use_dynamic_shifting``, as in FLUX.1-dev's
    configuration, that scheduler's training grid is not shifted: ``flow_match_euler(1.0)``.
    """
    grid = Grid(to_one_nth, (Shift(shift),))
    return Schedule(training=grid, inference=grid)


# -- scheduler_config.json ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FlowMatchSettings:
    """How a flow-matching model spaces its sigmas; every field is diffusers' setting of that name, with its default.

    Raises: ConfigError listing every value that cannot be computed.
    Source: diffusers 0.42, FlowMatchEulerDiscreteScheduler.
    """

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    time_shift_type: str = "exponential"

    def __post_init__(self):
        numbers = {n: getattr(self, n) for n in ("shift", "base_shift", "max_shift", "base_image_seq_len",
                                                 "max_image_seq_len")}
        wrong = [f"{n}={v!r}: expected a finite number" for n, v in numbers.items() if not _is_number(v)]
        if not wrong and not self.shift > 0:
            wrong.append(f"shift={self.shift}: expected a number above 0")
        if not wrong and not self.base_image_seq_len < self.max_image_seq_len:
            wrong.append(f"max_image_seq_len={self.max_image_seq_len}: expected more than base_image_seq_len="
                         f"{self.base_image_seq_len}")
        if not isinstance(self.use_dynamic_shifting, bool):
            wrong.append(f"use_dynamic_shifting={self.use_dynamic_shifting!r}: expected true or false")
        if self.shift_terminal is not None and not (_is_number(self.shift_terminal) and 0 <= self.shift_terminal < 1):
            wrong.append(f"shift_terminal={self.shift_terminal!r}: expected null, or a number from 0 to below 1")
        if self.time_shift_type not in TIME_SHIFTS:
            wrong.append(f"time_shift_type={self.time_shift_type!r}: expected one of {', '.join(TIME_SHIFTS)}")
        if wrong:
            raise ConfigError(f"scheduler_config.json: {'; '.join(wrong)}. Copy the file of the model again.")

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> FlowMatchSettings:
        """The settings of a ``scheduler_config.json``.

        Raises: ConfigError for another class, and listing every setting that is not supported.
        """
        fixed = {"num_train_timesteps": 1000, "invert_sigmas": False, "use_karras_sigmas": False,
                 "use_exponential_sigmas": False, "use_beta_sigmas": False, "stochastic_sampling": False}
        with naming("scheduler_config.json"):
            return cls(**obeyed(cls, config, ("FlowMatchEulerDiscreteScheduler",), fixed))

    def schedule(self, mu: Callable[[int, int], float] | None = None,
                 spacing: Callable[[int], np.ndarray] = to_one_nth_by_numpy) -> Schedule:
        """The grid training draws from, and the steps of sampling. Dynamic shifting leaves training unshifted.

        Args:
            mu: the model's own rule for dynamic shifting, from (image tokens, sampling steps); None is `LinearMu`
                through ``base_shift`` and ``max_shift``.
            spacing: of sampling.
        """
        if self.use_dynamic_shifting:
            mu = mu or LinearMu(base_seq_len=self.base_image_seq_len, max_seq_len=self.max_image_seq_len,
                                base_mu=self.base_shift, max_mu=self.max_shift)
            training, warps = (), (DynamicShift(mu, self.time_shift_type),)
        else:
            training = warps = (Shift(self.shift),)
        if self.shift_terminal:
            warps = (*warps, TerminalStretch(self.shift_terminal))
        return Schedule(training=Grid(to_one_nth, training), inference=Grid(spacing, warps))

    @property
    def training_shift(self) -> float:
        """The shift of the training grid; 1 means no shift."""
        return 1.0 if self.use_dynamic_shifting else self.shift

    def to_config(self) -> dict[str, Any]:
        """A ``scheduler_config.json`` that diffusers reads."""
        return {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.35.2",
                "num_train_timesteps": 1000, **asdict(self)}


def obeyed(settings: type, config: Mapping[str, Any], kinds: Sequence[str], fixed: Mapping[str, Any],
           unused: Sequence[str] = ()) -> dict[str, Any]:
    """Of a ``scheduler_config.json`` what the dataclass ``settings`` takes.

    Args:
        kinds: classes of diffusers whose file it may be.
        fixed: settings that are computed for one value only, and that value.
        unused: settings that only serve one of ``fixed`` at another value.

    Raises: ConfigError for another class, and listing every setting that is not supported.
    """
    kind = config.get("_class_name")
    if kind not in kinds:
        raise ConfigError(f"scheduler_config.json describes a {kind}: expected a {' or a '.join(kinds)}. "
                          "Give the noise schedule the network was trained with in that form.")
    names = [f.name for f in fields(settings)]
    given = {name: value for name, value in config.items() if not name.startswith("_") and name not in unused}
    wrong = [f"{n}={v}" for n, v in given.items()
             if n not in names and (v != fixed[n] if n in fixed else v not in (None, False))]
    if wrong:
        raise ConfigError(f"scheduler_config.json sets {listing(wrong)}, which is not computed here: expected "
                          f"{listing(f'{n}={v}' for n, v in fixed.items())}, and nothing beside {listing(names)}.")
    found, hints = {name: value for name, value in given.items() if name in names}, typing.get_type_hints(settings)
    wrong = [f"{n}={shown(v)}: expected {words_of(hints[n])}" for n, v in found.items() if not is_of(v, hints[n])]
    if wrong:
        raise ConfigError(f"scheduler_config.json says {listing(wrong)}. Copy the file of the model again.")
    return found


def _is_number(value: Any) -> bool:
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    return is_number and math.isfinite(value)


# as published with FLUX.1-dev and FLUX.1-schnell
FLUX_DEV = FlowMatchSettings(shift=3.0, use_dynamic_shifting=True)
FLUX_SCHNELL = FlowMatchSettings()
