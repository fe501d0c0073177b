"""Random numbers of training, drawn on the host and addressed by what they are for, never by when they are drawn.

A row of noise depends on (seed, stream name, global sample index, shape) and on nothing else: not on the batch it is
in, nor on the number of processes, nor on what was drawn before. So a resumed run, a run on more devices and a run
split in two stages draw the same numbers. The state of the generator is the seed.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from ms_diffsynth.errors import ConfigError

_SAMPLES, _PERMUTATIONS = 0, 1  # the highest counter word


class Draws:
    """Counter-based random numbers: NumPy's Philox4x64 with key (seed, hash of the stream's name).

    The counter is (0, 0, index, purpose). Philox advances the two low words, so one sample would have to take 2^130
    numbers before it ran into the next.

    Raises: ConfigError for a seed outside [0, 2^64).
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """

    def __init__(self, seed: int):
        if not 0 <= seed < 2**64:
            raise ConfigError(f"seed={seed}: expected 0 <= seed < 2^64.")
        self.seed = int(seed)

    def normal(self, stream: str, sample_indices: np.ndarray, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Standard normal numbers, one row a sample.

        Shapes: sample_indices int64 [B], not negative -> float32 [B, *shape].
        """
        return self._rows(stream, sample_indices, shape, lambda g, row: g.standard_normal(dtype=np.float32, out=row))

    def uniform(self, stream: str, sample_indices: np.ndarray, shape: tuple[int, ...] = ()) -> np.ndarray:
        """Uniform numbers in [0, 1), one row a sample.

        Shapes: sample_indices int64 [B], not negative -> float32 [B, *shape].
        """
        return self._rows(stream, sample_indices, shape, lambda g, row: g.random(dtype=np.float32, out=row))

    def of(self, sample_indices: np.ndarray) -> Callable[[str, str, tuple[int, ...]], np.ndarray]:
        """``random(stream, kind, shape)``: "normal" or "uniform" numbers of shape [B, ...], one row a sample."""
        kinds = {"normal": self.normal, "uniform": self.uniform}
        return lambda stream, kind, shape: kinds[kind](stream, sample_indices, shape[1:])

    def permutation(self, stream: str, epoch: int, n: int) -> np.ndarray:
        """The order of ``n`` things in an epoch: int64 [n]."""
        return self._generator(stream, epoch, _PERMUTATIONS).permutation(n)

    def _rows(self, stream: str, sample_indices: np.ndarray, shape: tuple[int, ...],
              fill: Callable[[np.random.Generator, np.ndarray], object]) -> np.ndarray:
        if len(sample_indices) and min(sample_indices) < 0:
            raise ValueError(f"sample index {min(sample_indices)}: expected at least 0.")
        rows = np.empty((len(sample_indices), int(np.prod(shape, dtype=np.int64))), np.float32)
        for row, index in zip(rows, sample_indices):
            fill(self._generator(stream, int(index), _SAMPLES), row)
        return rows.reshape((len(sample_indices), *shape))

    def _generator(self, stream: str, index: int, purpose: int) -> np.random.Generator:
        key = np.array([self.seed, _stream_id(stream)], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 0, index, purpose], np.uint64)))


def _stream_id(name: str) -> int:
    """A stable 64-bit number for a name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")
