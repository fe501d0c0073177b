"""What the tests of runs share: small runs of the toy family, bad numbers in them, deaths, and whether two agree."""
from __future__ import annotations

import hashlib
import itertools
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device import DEVICE
from PIL import Image
from records import table

from ms_diffsynth import UnifiedDataset, runtime
from ms_diffsynth.draws import Draws
from ms_diffsynth.registry import family
from ms_diffsynth.run.task import launch_training_task
from ms_diffsynth.storage.checkpoint import latest
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.logger import ModelLogger
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.trainer import Trainer

SIDE = 16


def toy_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a tiny model; afterwards the runtime is as it was."""
    path = tmp_path_factory.mktemp("models") / "toy"
    family("toy").write_tiny(path, 0)
    yield path
    runtime.configure("graph", DEVICE)


# -- data ----------------------------------------------------------------------------------------------------------


def rows(count: int, first: int = 0, side: tuple[int, int] = (SIDE, SIDE)) -> list[dict[str, Any]]:
    """Rows with pictures in memory."""
    return [{"image": Image.fromarray(np.random.default_rng(first + k).integers(0, 256, (*side, 3), np.uint8)),
             "prompt": f"picture {first + k}"} for k in range(count)]


def files(base: Path, count: int = 3, first: int = 0) -> UnifiedDataset:
    """The same rows as files."""
    base.mkdir(exist_ok=True)
    for k, row in enumerate(rows(count, first)):
        row["image"].save(base / f"{first + k}.png")
    lines = ["image,prompt", *(f"{first + k}.png,picture {first + k}" for k in range(count))]
    (base / "metadata.csv").write_text("\n".join(lines))
    return dataset_of(base)


def dataset_of(base: Path) -> UnifiedDataset:
    """The data set in a folder that `files` wrote."""
    return UnifiedDataset(str(base), str(base / "metadata.csv"), 1, "image",
                          UnifiedDataset.default_image_operator(str(base), height=SIDE, width=SIDE))


# -- runs ----------------------------------------------------------------------------------------------------------


class Module(DiffusionTrainingModule):
    """Trains a LoRA of rank 2, or what is said."""

    def __init__(self, folder, task="sft", objective=None, **how):
        super().__init__()
        self.pipe = family("toy").pipeline.from_pretrained(str(folder))
        self.switch_pipe_to_training_mode(self.pipe, task=task, objective=objective,
                                          **(how or {"lora_base_model": "dit", "lora_rank": 2}))


class Own(Module):
    """A module that computes its loss itself."""

    def forward(self, data):
        return super().forward(data) * 1.0


def train(path: Path, module: DiffusionTrainingModule, dataset: Any, mode: str = "pynative", accumulation: int = 1,
          **options: Any) -> ModelLogger:
    """A run whose folder is ``path``."""
    return launch_training_task(Accelerator(accumulation, mode, DEVICE), dataset, module, ModelLogger(path),
                                     **{"learning_rate": 1e-2, **options})


def poison(monkeypatch: pytest.MonkeyPatch, sample: int, factor: float = np.nan, stream: str | None = None) -> None:
    """From now on the draws of one sample, all or those of a stream, are multiplied by a factor."""
    normal = Draws.normal

    def poisoned(self, name, sample_indices, shape=()):
        values = normal(self, name, sample_indices, shape)
        if stream in (None, name):
            values[np.isin(sample_indices, [sample])] *= np.float32(factor)
        return values

    monkeypatch.setattr(Draws, "normal", poisoned)


class Crash(Exception):
    """What a kill is to the files: the run is not asked."""


class Crashing:
    """``crash(n)``: a run dies right after its n-th batch, before anything that is due then. None: it lives.

    ``crash.copies({n: path})`` lets it live, and copies what its death there would have left in its folder.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self._monkeypatch, self._original = monkeypatch, Trainer.train_on

    def __call__(self, count: int | None) -> None:
        def die(run, seen):
            if seen == count:
                raise Crash

        self._after_each_batch(die)

    def copies(self, paths: Mapping[int, Path]) -> None:
        def copy(run, seen):
            if seen in paths:
                shutil.copytree(run.logger.output_path, paths[seen])

        self._after_each_batch(copy)

    def _after_each_batch(self, call: Callable[[Trainer, int], None]) -> None:
        original, seen = self._original, itertools.count(1)

        def train_on(run, *batch):
            found = original(run, *batch)
            call(run, next(seen))
            return found

        self._monkeypatch.setattr(Trainer, "train_on", train_on)


# -- what they left ------------------------------------------------------------------------------------------------


def state(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Every array of a run's last checkpoint, and what is no array but for the configuration."""
    found = latest(path / "checkpoints")
    arrays = {f"{group}/{name}": array for group in found.groups for name, array in found.read(group).items()}
    return arrays, {k: v for k, v in found.state.items() if k not in ("identity", "saved", "saved_at")}


def differing_bits(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> int:
    """How many bits of the arrays differ."""
    assert one.keys() == two.keys() and all(one[k].dtype == two[k].dtype for k in one)
    return sum(int(np.unpackbits(np.frombuffer(one[k].tobytes(), np.uint8) ^ np.frombuffer(two[k].tobytes(), np.uint8))
                   .sum()) for k in one)


def equal(one: Path, two: Path) -> bool:
    """Whether two runs left the same losses, weights, moments, averages, scales and counts, to the bit."""
    (arrays, counts), (other_arrays, other_counts) = state(one), state(two)
    names, others = ({p.name for p in path.glob("*.safetensors")} for path in (one, two))
    return (table(one) == table(two) and differing_bits(arrays, other_arrays) == 0 and counts == other_counts
            and latest(one / "checkpoints").state["saved"][-1] in names & others
            and all((one / name).read_bytes() == (two / name).read_bytes() for name in names & others))


def digests(path: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, locks excepted."""
    return {p.relative_to(path).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in path.rglob("*") if p.is_file() and p.name != ".lock"}


def steps_in(path: Path) -> list[str]:
    """Names of a run's checkpoints."""
    return sorted(p.name for p in (path / "checkpoints").iterdir() if p.is_dir())
