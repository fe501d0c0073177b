"""``ms-diffsynth train`` and ``describe``: what a run leaves behind, and that a mistake leaves nothing."""
from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ms_diffsynth.config import load_config
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.formats.lora import load_lora, metadata_of
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.registry import FAMILIES
from ms_diffsynth.run.build import build_module, build_task
from ms_diffsynth.run.pipeline import build_pipeline

EAGER = ("--mode", "pynative", "--max_train_steps", 1, "--sample_prompts", "[]")


def test_a_whole_run(run, config):
    code, out, err = run("train", config)
    assert code == 0 and out == ""
    files = sorted(str(p.relative_to("out")) for p in Path("out").rglob("*") if p.is_file())
    kept = [f"checkpoints/step-0000000{step}/{name}" for step in (2, 4) for name in (
        "MANIFEST.json", "moments.safetensors", "pictures.safetensors", "state.json", "weights.safetensors")]
    assert files == [".lock", *kept, "config.yaml", "events.jsonl", "loss.csv", "loss.png", "report.html",
                     "samples/before_after.png", "samples/step-0.png", "samples/step-4.png", "step-2.safetensors",
                     "step-4.safetensors", "training_args.json"]
    rows = list(csv.DictReader(open("out/loss.csv")))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert all(np.isfinite(float(row["loss"])) and row["is_skipped"] == "0" for row in rows)
    assert set(load_lora("out/step-4.safetensors")) == {"layer_1", "layer_2"}
    assert all(name.startswith("transformer.layer_") for name in load_state_dict("out/step-4.safetensors"))
    assert load_config("out/config.yaml") == load_config(config)
    settings = json.loads(Path("out/training_args.json").read_text())
    assert settings["learning_rate"] == 0.01 and settings["family"] == "toy" and settings["mode"] == "graph"
    assert len({Image.open(f"out/{name}").size for name in files if name.startswith("samples/step")}) == 1
    assert err.startswith("toy: 3 images, batch size 2, task sft, output in out\n4 steps, 2 epochs; "), "the short form"
    assert err.count("batch size") == 1 and "compiled the training step" in err


def test_the_header_of_a_lora_tells_of_its_training_without_paths_and_captions(run, config, pictures, tmp_path):
    words = ["--instance_prompt", "sks square", "--lora_alpha", "5"]
    assert run("train", config, *words, *EAGER)[0] == 0
    header = metadata_of("out/step-1.safetensors")
    told = {"ss_output_name": "out", "modelspec.title": "out", "step": "1", "ss_steps": "1", "ss_network_dim": "2",
            "ss_network_alpha": "2", "modelspec.resolution": "16x16", "ss_resolution": "(16, 16)", "format": "pt",
            "modelspec.trigger_phrase": "sks square", "ms_diffsynth.family": "toy", "ss_num_train_images": "3",
            "ss_learning_rate": "0.01", "ss_seed": "42", "modelspec.sai_model_spec": "1.0.1"}
    assert header.items() >= told.items()
    assert json.loads(header["ss_network_args"]) == {"adapter": "lora", "trained_alpha": 5.0}
    assert "ss_network_module" not in header  # the names are not kohya's
    text = json.dumps(header)
    assert str(tmp_path) not in text and str(pictures) not in text and "a red square" not in text


def test_the_resolved_configuration_repeats_the_run(run, config):
    assert run("train", config, "--mode", "pynative", "--sample_prompts", "[]", "--seed", 3)[0] == 0
    assert run("train", "out/config.yaml", "--output_path", "again")[0] == 0
    assert Path("out/loss.csv").read_text().splitlines()[0] == Path("again/loss.csv").read_text().splitlines()[0]
    first, second = (load_state_dict(f"{folder}/step-4.safetensors") for folder in ("out", "again"))
    assert all(np.array_equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("line, code, expected", [
    ("model:\n  lora_ranks: 4", 64, "lora_ranks in bad.yaml line 2 is not a setting. Did you mean 'lora_rank'?"),
    ("optimizer:\n  learning_rate: 1e4", 64, "expected 0 < lr <= 10. Did you mean 1e-4?"),
])
def test_a_bad_file(run, tmp_path, line, code, expected):
    (tmp_path / "bad.yaml").write_text(line + "\n")
    found, _, err = run("train", tmp_path / "bad.yaml", "--family", "toy", "--dataset_base_path", ".",
                        "--num_epochs", 1, "--output_path", "out")
    assert found == code and expected in err.replace(f"{tmp_path}/", "") and not Path("out").exists()


@pytest.mark.parametrize("words, code, expected", [
    (["--family", "flxu"], 64, f"family='flxu' is unknown: expected one of {', '.join(sorted(FAMILIES))}. Did you mean "
     "'flux'?"),
    (["--model_paths", "absent"], 66, "absent does not exist"),
    (["--model_paths", "[absent"], 64, "model_paths=[absent is not JSON"),
    (["--model_paths", "null"], 64, "neither model_paths nor model_id_with_origin_paths is set"),
    (["--model_id_with_origin_paths", "no-colon"], 64, "'no-colon' is not of the form owner/name:pattern"),
    (["--lora_target_modules", "layer_3"], 64, "'layer_3' selects none of the linear layers of ToyTransformer"),
    (["--lora_base_model", "unet"], 64, "'unet' cannot be trained: ToyImagePipeline has the models"),
    (["--trainable_models", "dit.layer_9"], 64, "names no weights"),
    (["--fuse", "encode_imag"], 64, "Did you mean 'encode_image'?"),
    (["--tokenizer_1_path", "tokens"], 64, "ToyImagePipeline has no tokenizer_1; it has none at all"),
    (["--max_sequence_length", 8], 64, "prompts of the family toy have one fixed length"),
    (["--dataset_metadata_path", "absent.csv"], 65, "absent.csv"),
    (["--data_file_keys", "imgae"], 65, "has no column imgae; it has image, prompt. Did you mean 'image'?"),
    (["--lora_checkpoint", "absent.safetensors"], 66, "absent.safetensors"),
    (["--sample_prompts", "[]", "--sample_steps", 2], 64, "sample_steps=2 without sample_prompts"),
    (["--trainable_models", "dit", "--lora_checkpoint", "x"], 64, "lora_checkpoint=x with trainable_models"),
], ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "")
def test_a_mistake_leaves_nothing_behind(run, config, words, code, expected):
    found, _, err = run("train", config, *words)
    assert found == code and expected in err and not Path("out").exists()


def test_a_metadata_file_without_prompts(run, config, tmp_path, pictures):
    (tmp_path / "m.csv").write_text("image\nred.png\nblue.png\n")
    words = ("train", config, "--dataset_metadata_path", tmp_path / "m.csv", *EAGER)
    code, _, err = run(*words)
    assert code == 65 and "has no column prompt" in err and not Path("out").exists()
    assert run(*words, "--instance_prompt", "a square")[0] == 0


def test_broken_weights_are_told_before_anything_is_written(run, config, tmp_path, toy_model):
    folder = shutil.copytree(toy_model, tmp_path / "broken")
    file = next((folder / "vae").glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-8])
    code, _, err = run("train", config, "--model_paths", folder)
    assert code == 66 and "vae" in err and not Path("out").exists()


@pytest.mark.parametrize("command", [["train", "toy.yaml"], ["sample", "toy", "m", "--prompt", "a"]])
@pytest.mark.few(1)
def test_a_device_that_is_not_there(config, python, command):
    """In a process of its own: the device target can be set once."""
    done = python("-m", "ms_diffsynth.cli.main", *command, "--device", "Ascend")
    assert done.returncode == 69, done.stderr
    assert done.stderr.splitlines()[-1].startswith("DeviceError: device='Ascend' cannot be used on this machine: Mind")
    assert done.stderr.rstrip().endswith("or run with --device CPU.")
    assert "Traceback" not in done.stderr and not Path("out").exists()


def test_class_images(run, config, pictures):
    code, _, err = run("train", config, *EAGER, "--task", "dreambooth", "--with_prior_preservation",
                       "--class_base_path", pictures, "--class_prompt", "a square", "--posterior", "sample")
    assert code == 0 and "3 images and 3 class images" in err


def test_going_on_from_a_lora(run, config):
    assert run("train", config, *EAGER)[0] == 0
    words = ("--lora_checkpoint", "out/step-1.safetensors", "--output_path", "more", "--learning_rate", "1e-9")
    assert run("train", config, *EAGER, *words)[0] == 0
    first, second = (load_state_dict(f"{folder}/step-1.safetensors") for folder in ("out", "more"))
    assert all(np.allclose(first[name], second[name], atol=1e-6) for name in first)
    assert any(value.any() for name, value in first.items() if "lora_B" in name)


def test_training_in_full_without_clipping_on_sidecars_in_a_bucket(run, config, toy_model, caplog):
    """Settings that a LoRA run leaves alone, each seen in what it changes."""
    code, _, _ = run("train", config, *EAGER, "--trainable_models", "dit", "--max_grad_norm", "null", "--max_pixels",
                       1024, "--dtype", "bfloat16", "--dataset_metadata_path", "null", "--height", "null",
                       "--width", "null")
    assert code == 0 and "dtype=bfloat16: the CPU has no bfloat16 matrix product" in caplog.text
    trained = load_state_dict("out/step-1.safetensors")
    assert set(trained) == set(load_state_dict(next((toy_model / "transformer").glob("*.safetensors"))))


def test_the_scheme_follows_the_objective():
    base = {"family": "toy", "dataset_base_path": "d", "num_epochs": "1", "instance_prompt": "a"}
    for flags, expected in (({}, "diffsynth"), ({"task": "dreambooth"}, "none"),
                            ({"weighting_scheme": "cosmap"}, "cosmap")):
        assert build_task(load_config(None, base | flags)).weighting_scheme == expected


@pytest.mark.parametrize("flags, expected", [
    ({"family": "toy", "snr_gamma": "5"}, r"snr_gamma=5\.0: the family toy has no such setting for task=sft\."),
    ({"family": "ddpm_unet", "weighting_scheme": "cosmap", "posterior": "sample"},
     r"weighting_scheme=cosmap, posterior=sample: the family ddpm_unet has no such setting for task=sft\."),
])
def test_a_setting_of_another_objective_is_refused(flags, expected):
    config = load_config(None, {"dataset_base_path": "d", "num_epochs": "1", "instance_prompt": "a"} | flags)
    with pytest.raises(ConfigError, match=expected):
        build_task(config)


def test_a_lora_starts_from_the_seed_of_the_run(toy_model):
    def start(seed):
        config = load_config(None, family="toy", model_paths=toy_model, dataset_base_path="d", num_epochs=1, seed=seed)
        module = build_module(config, build_pipeline(config))
        return np.concatenate([p.asnumpy().ravel() for p in module.trainable_parameters()])

    assert np.array_equal(start(7), start(7)) and not np.array_equal(start(7), start(8))


def test_describe(run, config):
    code, out, err = run("describe", config)
    assert code == 0 and err == "" and not Path("out").exists()
    assert out.startswith("def prepare(prompt, input_image):\n") and "prepare loads: text_encoder, vae\n" in out
    assert out.endswith("step loads: dit\n")
    code, fused, _ = run("describe", config, "--fuse", "encode_image")
    assert code == 0 and fused.endswith("step loads: dit, vae\n")
