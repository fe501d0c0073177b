"""The documents' training script of Qwen-Image."""
from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SIMPLE = ROOT / "examples/qwen_image/model_training/special/simple/train.py"
CAT = ROOT / "examples/data/dreambooth_cat_fluent"


@pytest.fixture(autouse=True)
def places(tiny_qwen, tmp_path, monkeypatch):
    """The tiny model and the pictures of a cat, where the documents' script looks for Qwen-Image and for its data."""
    (tmp_path / "models/Qwen").mkdir(parents=True)
    (tmp_path / "models/Qwen/Qwen-Image").symlink_to(tiny_qwen)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/example_image_dataset").symlink_to(CAT)
    monkeypatch.setenv("MS_DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))


def test_the_simple_script_trains():
    """As it stands, but for nine steps of 32 x 32 pixels instead of 450 of 512 x 512."""
    text = SIMPLE.read_text().replace("512", "32").replace("repeat=50", "repeat=1")
    exec(compile(text, str(SIMPLE), "exec"), {"__name__": "__main__"})
    lines = Path("models/toy_model/loss.csv").read_text().splitlines()
    assert len(lines) == 1 + 9 and list(Path("models/toy_model").glob("*.safetensors"))
