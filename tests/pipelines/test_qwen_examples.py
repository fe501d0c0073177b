"""The two training scripts of Qwen-Image, and the memory its configuration promises."""
from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from device import DEVICE
from low_rank import lora_pairs, set_lora
from mindspore import Tensor
from PIL import Image

from ms_diffsynth import runtime
from ms_diffsynth.draws import Draws
from ms_diffsynth.training.optim import AdamW
from ms_diffsynth.training.prepared import in_bucket
from ms_diffsynth.training.program_step import ProgramTrainStep

ROOT = Path(__file__).parents[2]
SIMPLE = ROOT / "examples/qwen_image/model_training/special/simple/train.py"
FULL = ROOT / "examples/train.py"
CAT = ROOT / "examples/data/dreambooth_cat_fluent"
TARGETS = "to_q,to_k,to_v,add_q_proj,add_k_proj,add_v_proj"


@pytest.fixture(autouse=True)
def places(tiny_qwen, tmp_path, monkeypatch):
    """The tiny model and the pictures of a cat, where the documents' script looks for Qwen-Image and for its data."""
    (tmp_path / "models/Qwen").mkdir(parents=True)
    (tmp_path / "models/Qwen/Qwen-Image").symlink_to(tiny_qwen)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/example_image_dataset").symlink_to(CAT)
    monkeypatch.setenv("MS_DIFFSYNTH_MODEL_BASE_PATH", str(tmp_path / "models"))
    yield
    runtime.configure("graph", DEVICE)


@pytest.mark.slow
def test_the_simple_script_trains():
    """As it stands, but for nine steps of 32 x 32 pixels instead of 450 of 512 x 512."""
    text = SIMPLE.read_text().replace("512", "32").replace("repeat=50", "repeat=1")
    exec(compile(text, str(SIMPLE), "exec"), {"__name__": "__main__"})
    lines = Path("models/toy_model/loss.csv").read_text().splitlines()
    assert len(lines) == 1 + 9 and list(Path("models/toy_model").glob("*.safetensors"))


def run_full(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [str(FULL), "--family", "qwen_image", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(FULL), run_name="__main__")
    return end.value.code


@pytest.mark.slow
def test_the_full_script_trains_on_batches_of_different_prompts(monkeypatch):
    code = run_full(
        monkeypatch, "--model_paths", "models/Qwen/Qwen-Image", "--dataset_base_path", CAT, "--dataset_metadata_path",
        CAT / "metadata.csv", "--height", 32, "--width", 32, "--max_train_steps", 2, "--batch_size", 3, "--mode",
        "pynative", "--lora_rank", 2, "--sample_prompts", "a cat", "--num_inference_steps", 1, "--output_path", "out")
    assert code == 0 and Path("out/step-2.safetensors").is_file() and Path("out/samples/before_after.png").is_file()


def test_two_tokenizers_are_refused(monkeypatch, capsys):
    code = run_full(monkeypatch, "--model_paths", "models/Qwen/Qwen-Image", "--dataset_base_path", CAT,
                    "--dataset_metadata_path", CAT / "metadata.csv", "--num_epochs", 1, "--tokenizer_1_path", "x")
    assert code == 64
    assert "QwenImagePipeline has no tokenizer_1; it has tokenizer. Remove the setting." in capsys.readouterr().err


@pytest.mark.slow
def test_both_scripts_give_the_same_loss_for_the_same_draws(monkeypatch):
    runtime.configure("pynative", DEVICE)
    simple = runpy.run_path(str(SIMPLE))["QwenImageTrainingModule"](DEVICE)
    namespace = runpy.run_path(str(FULL))
    words = ["--model_paths", "models/Qwen/Qwen-Image", "--dataset_base_path", str(CAT), "--dataset_metadata_path",
             str(CAT / "metadata.csv"), "--lora_rank", "32", "--lora_target_modules", TARGETS, "--num_epochs", "1"]
    config, _ = namespace["training_parser"]("qwen_image").parse_config(words)
    full = namespace["build_module"](config, namespace["build_pipeline"](config), module=namespace["TrainingModule"]())
    assert simple.has_own_forward and not full.has_own_forward
    rng = np.random.default_rng(3)  # away from its start, where a LoRA adds nothing
    values = {n: tuple((0.1 * rng.standard_normal(x.shape)).astype(np.float32) for x in pair)
              for n, pair in lora_pairs(full.pipe.dit).items()}
    for module in (simple, full):
        set_lora(module.pipe.dit, values)
    data = {"image": Image.open(CAT / "1f638.png").convert("RGB").resize((32, 48)), "prompt": "a cat that smiles"}
    simple.pipe.random = Draws(5).of(np.array([0]))
    draws = {name: full.pipe.objective.draw(name, (1, 16, 6, 4), 1000, simple.pipe.random)
             for name in ("noise", "timestep_index")}
    wanted = float(simple.forward(data).asnumpy())
    cut = full.training_cut()
    slots = {n: v[None] for n, v in in_bucket(full.prepare(data, cut), (48, 32), full.pipe).slots.items()} | draws
    step = ProgramTrainStep(full, cut, AdamW(full.trainable_parameters(), learning_rate=1e-3), mode="graph")
    found = step.step(*[Tensor(slots[n]) for n in (*cut.cache, *cut.draws)])
    assert float(found.loss.asnumpy()) == pytest.approx(wanted, rel=2e-6)
    assert 0 < float(found.grad_norm.asnumpy()) and slots["prompt_mask"].shape == (1, 64)
