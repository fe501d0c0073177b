"""Document 000, DiffSynth-Studio's "Standard Supervised Training": its script of Qwen-Image, in both modes."""
from __future__ import annotations

from pathlib import Path

import pytest
from device import DEVICE
from records import column

from ms_diffsynth import load_state_dict, runtime

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples/qwen_image/model_training/special/simple/train.py"
TARGETS = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


@pytest.fixture(autouse=True)
def places(tiny_model, tmp_path, monkeypatch):
    """A tiny model and images of a cat, where the script looks for Qwen-Image and for its data."""
    (tmp_path / "models/Qwen").mkdir(parents=True)
    (tmp_path / "models/Qwen/Qwen-Image").symlink_to(tiny_model("qwen_image"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/example_image_dataset").symlink_to(ROOT / "examples/data/dreambooth_cat_fluent")
    monkeypatch.setenv("MS_DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    yield
    runtime.configure("graph", DEVICE)


@pytest.mark.parametrize("mode, dtype, said", [("graph", "torch_dtype", "in graph mode, by the module's own forward"),
                                               ("pynative", "mindspore_dtype", "eagerly, by the module's own forward")])
@pytest.mark.few(1)
def test_the_script_trains_by_either_name_of_the_dtype(mode, dtype, said, capsys):
    """As it stands, but for nine steps of 32 x 32 pixels instead of 450 of 512 x 512, and its mode."""
    text = SCRIPT.read_text()
    for old, new in {"512": "32", "repeat=50": "repeat=1", "mindspore_dtype=": f"{dtype}=",
                     "kwargs_handlers=": f'mode="{mode}", kwargs_handlers='}.items():
        assert old in text
        text = text.replace(old, new)
    exec(compile(text, str(SCRIPT), "exec"), {"__name__": "__main__"})
    assert said in capsys.readouterr().err
    out = Path("models/toy_model")
    assert len(column(out)) == 9 and (column(out, "grad_norm") > 0).all()
    assert column(out, "learning_rate") == pytest.approx([1e-5] * 9)  # from the first step on
    saved = load_state_dict(next(out.glob("*.safetensors")))
    layers = {name.rsplit(".", 3)[1] if name.endswith(".weight") else name for name in saved}
    assert layers == set(TARGETS) and not any(name.startswith("pipe.") for name in saved)
    assert {min(array.shape) for array in saved.values()} == {32}  # lora_rank
