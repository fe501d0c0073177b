"""Sigmas as lists: the grid that training draws from, and the steps that sampling walks. NumPy only.

A `Grid` spaces n sigmas evenly and warps them; a `Schedule` is one grid for training and one for sampling. Everything
is float32. Training grids equal the reference cases' to the last bit; sampling sigmas equal diffusers' to 1.2e-7, one
unit in the last place (diffusers 0.39, compared for FLUX.1 at 1, 4, 28 and 50 steps).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ms_diffsynth.errors import ConfigError

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


@dataclass(frozen=True, kw_only=True)
class DynamicShift:
    """`ExponentialShift` whose mu grows linearly with the image sequence, through two given points (tokens, mu).

    Raises: ConfigError when no sequence length is given.
    Source: diffusers 0.39, pipelines/flux/pipeline_flux.py, calculate_shift.
    """

    base_seq_len: int = 256
    max_seq_len: int = 4096
    base_mu: float = 0.5
    max_mu: float = 1.15

    def mu(self, seq_len: int) -> float:
        """mu at ``seq_len`` image tokens; not clamped outside the two points."""
        slope = (self.max_mu - self.base_mu) / (self.max_seq_len - self.base_seq_len)
        return seq_len * slope + self.base_mu - slope * self.base_seq_len

    def __call__(self, sigmas: np.ndarray, seq_len: int | None = None) -> np.ndarray:
        if seq_len is None:
            raise ConfigError("seq_len=None: this schedule shifts by the image's size, so it needs the number of image "
                              "tokens. Pass seq_len = (height // 16) * (width // 16) pixels for FLUX.1.")
        return ExponentialShift(self.mu(seq_len))(sigmas)


@dataclass(frozen=True)
class TerminalStretch:
    """Stretch 1 - s linearly so that the last sigma becomes ``terminal``.

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
    """Evenly spaced sigmas, then warped. ``spacing(n)`` and every warp work in float32."""

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
        return sigmas


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


def flux_dev(training_shift: float = 3.0) -> Schedule:
    """FLUX.1-dev: sampled with a shift that grows with the image; trained on diffusers' grid."""
    return Schedule(training=flow_match_euler(training_shift).training, inference=Grid(to_one_nth, (DynamicShift(),)))


def flux_schnell(training_shift: float = 3.0) -> Schedule:
    """FLUX.1-schnell: sampled in one to four steps, without a shift; trained on diffusers' grid."""
    return Schedule(training=flow_match_euler(training_shift).training, inference=Grid(to_one_nth))


def flux_sampling(num_inference_steps: int, seq_len: int, is_guided: bool) -> np.ndarray:
    """Sampling sigmas of FLUX.1-dev (``is_guided``: it embeds a guidance scale) or FLUX.1-schnell, float32 [n + 1]."""
    return (flux_dev() if is_guided else flux_schnell()).sampling(num_inference_steps, seq_len)
