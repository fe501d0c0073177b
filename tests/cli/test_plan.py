"""`plan` on any machine: every configuration that comes with the package, what it says, and that its remedies hold."""
from __future__ import annotations

import re
import shutil
import socket
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ms_diffsynth.cli.main import main
from ms_diffsynth.config import load_config
from ms_diffsynth.config.bases import BASES
from ms_diffsynth.run import plan as planning
from ms_diffsynth.run.build import build_datasets
from ms_diffsynth.run.memory import GIB, Network, network_of

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "examples").rglob("*.yaml"))
QWEN = "examples/qwen_image/lora_910b.yaml"


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def checkout(tmp_path, monkeypatch, tiny_model):
    """The examples with their data; models that a command makes are tiny ones, made when they are asked for."""
    for folder in ("examples", "docs"):
        (tmp_path / folder).symlink_to(ROOT / folder)

    def give(config):
        paths = config.model.model_paths
        if paths and "/" in paths:
            target = tmp_path / paths
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(tiny_model(config.model.family))
        if not Path(config.data.dataset_base_path).exists():
            target = tmp_path / config.data.dataset_base_path
            target.mkdir(parents=True)
            Image.new("RGB", (64, 64)).save(target / "0.png")
            if config.data.dataset_metadata_path:
                (tmp_path / config.data.dataset_metadata_path).write_text("image,prompt\n0.png,a face\n")
            else:
                (target / "0.txt").write_text("a face")

    return give


@pytest.fixture
def plan(capsys):
    """``plan(word, ...)`` -> exit code, and what was said."""

    def run(*words):
        code = main(["plan", *map(str, words)])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def snapshot(folder: Path) -> set[str]:
    return {str(path) for path in folder.rglob("*")}


@pytest.mark.parametrize("path", FILES, ids=name)
def test_every_example_is_planned_without_device_network_or_a_file_written(path, checkout, plan, no_network, tmp_path):
    config = load_config(path)
    checkout(config)
    before = snapshot(tmp_path)
    code, said, err = plan(name(path), "--offline")
    assert code == 0, said + err
    assert snapshot(tmp_path) == before
    assert max(map(len, said.splitlines())) <= 80, "wider than a terminal"
    assert re.search(r"(?m)^fits.*: [\d.]+ of [\d.]+ GiB$", said)
    for label in ("images", "trained at", "download", "learns", "steps", "memory", "  train"):
        assert re.search(f"(?m)^{label} ", said), f"{label} is not told"
    if config.run.device == "Ascend":
        assert "57.6 GiB can be used" in said


@pytest.mark.parametrize("memory", (64, 32))
@pytest.mark.parametrize("base", [base for base in BASES if BASES[base].fits])
def test_every_preset_fits_its_card_and_is_as_large_as_was_measured(base, memory, plan, no_network, tmp_path, capsys):
    job = "lora"
    if memory not in BASES[base].fits[job]:
        pytest.skip("the preset is not for this card")
    data = ROOT / "examples/data/dreambooth_cat_fluent"
    words = ["init", str(data), "--base", base, "--device-memory", str(memory), "--caption_column", "caption",
             "--height", "1024", "--width", "1024", "--output", "run.yaml"]
    assert main(words) == 0
    capsys.readouterr()
    code, said, _ = plan("run.yaml", "--offline", "--card", memory)
    assert code == 0, said
    config = load_config("run.yaml")
    found = planning.plan_run(config, build_datasets(config), memory)
    train = next(stage for stage in found.stages if stage.name == "train")
    beside = sum(size for model, size in train.models.items() if model != "dit")
    assert (train.peak - beside) / GIB == pytest.approx(BASES[base].fits[job][memory].peak, rel=0.1)
