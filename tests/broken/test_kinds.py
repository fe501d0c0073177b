"""One broken input of each kind that was found: what it ends with, and what its message names."""
from __future__ import annotations

import json
import os
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ms_diffsynth.cli.main import main
from ms_diffsynth.data.images import grid
from ms_diffsynth.formats.lora import ADAPTER_METADATA, load_lora
from ms_diffsynth.formats.weights import load_state_dict, save_state_dict
from ms_diffsynth.registry import family

SAMPLE = ("--height", 32, "--width", 32, "--num_inference_steps", 1, "--mode", "pynative")
CONFIG = """\
model: {family: toy, model_paths: models/toy, lora_rank: 4}
data: {dataset_base_path: data, height: 32, width: 32}
run: {max_train_steps: 1, num_inference_steps: 1, mode: pynative, output_path: out}
"""
X300 = "x" * 300


@pytest.fixture
def run(capsys):
    """``run(word, ...)`` runs the command and returns (exit code, what it printed, what it complained of)."""

    def call(*words):
        code = main([str(word) for word in words])
        found = capsys.readouterr()
        assert "Traceback" not in found.err
        return code, found.out, found.err

    return call


@pytest.fixture
def world(tiny_model, tmp_path):
    """A toy model of its own, three images with captions, a configuration; the tests run in it."""
    shutil.copytree(tiny_model("toy"), "models/toy")
    Path("data").mkdir()
    for k in range(3):
        Image.fromarray(np.full((40, 40, 3), 50 * k, np.uint8)).save(f"data/{k}.png")
        Path(f"data/{k}.txt").write_text("a cat")
    Path("toy.yaml").write_text(CONFIG)
    return tmp_path


def change(path, **settings):
    path = Path(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def with_header(path, edit):
    """Change the header of a safetensors file."""
    data = Path(path).read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8:8 + length])
    edit(header)
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length:])


# -- the files of a model ------------------------------------------------------------------------------------------


VAE = "models/toy/vae/config.json"


@pytest.mark.parametrize("text, named", [
    ("null", "holds null, expected an object"), ("[]", "holds []"), ("3", "holds 3"), ('"x"', 'holds "x"'),
    ("", "zero bytes"),
    ("[" * 100_000, "nested deeper"), ('{"a": ' + "[" * 120 + "]" * 120 + "}", "nested deeper than 100"),
    ('{"a": NaN}', "holds NaN"),
    ('{"a": 1e999}', "too large"), ('{"a": ' + "9" * 5000 + "}", "a number of 5000 digits"),
    ('{"latent_channels": 4, "latent_channels": 8}', "names latent_channels twice"), ("\xff", "is not UTF-8"),
])
@pytest.mark.parametrize("command", ["train", "describe"])
def test_a_config_that_is_no_object(world, run, command, text, named):
    Path(VAE).write_bytes(text.encode("latin-1"))
    code, _, err = run(command, "toy.yaml")
    assert (code, command) == (66 if command == "train" else code, command)
    assert code == 0 or (f"WeightError: {VAE}" in err.replace("model_paths=models/toy: ", "") and named in err)


@pytest.mark.parametrize("key, value, expected", [
    ("latent_channels", -4, "a whole number from 1"), ("latent_channels", 0, "a whole number from 1"),
    ("latent_channels", "4", "a whole number from 1"), ("latent_channels", None, "a whole number from 1"),
    ("latent_channels", 10**12, "a number up to"), ("scaling_factor", "0.5", "a number above 0"),
    ("scaling_factor", [[1]], "a number above 0"), ("scaling_factor", 10**30, "a number up to"),
    ("shift_factor", {"a": 1}, "a number, or null"), ("shift_factor", True, "a number, or null"),
    ("num_layers", 10**6, "at most 1000"),
])
def test_a_value_of_a_config_that_cannot_be_meant(world, run, key, value, expected):
    change(VAE, **{key: value})
    code, _, err = run("train", "toy.yaml")
    assert code == 66 and VAE in err and f"{key}=" in err and expected in err and not Path("out").exists()


@pytest.mark.parametrize("file, values", [(VAE, {"latent_channels": 8}),
                                          ("models/toy/transformer/config.json", {"hidden_size": 32})])
@pytest.mark.parametrize("words", [("train", "toy.yaml"), ("sample", "toy", "models/toy", "--prompt", "x", *SAMPLE)])
def test_models_of_two_sizes(world, run, file, values, words):
    change(file, **values)
    code, _, err = run(*words)
    assert code == 66 and "models/toy" in err and "internal" not in err


def test_a_setting_that_a_newer_version_wrote_is_a_warning(world, run, caplog):
    change(VAE, later_setting=3, _own="x")
    assert run("train", "toy.yaml")[0] == 0
    (warning,) = [record.message for record in caplog.records if "does not know" in record.message]
    assert "later_setting" in warning and "_own" not in warning


@pytest.mark.parametrize("family, file, values, named", [
    ("ddpm_unet", "unet", {"mid_block_scale_factor": "x"}, "mid_block_scale_factor"),
    ("ddpm_unet", "unet", {"block_out_channels": 8}, "block_out_channels"),
    ("ddpm_unet", "unet", {"norm_num_groups": 0}, "norm_num_groups"),
    ("ddpm_unet", "unet", {"sample_size": [32]}, "sample_size"),
    ("ddpm_unet", "scheduler", {"clip_sample_range": [1]}, "clip_sample_range"),
    ("ddpm_unet", "scheduler", {"num_train_timesteps": -1}, "num_train_timesteps"),
])
def test_values_of_real_families(tiny_model, run, family, file, values, named):
    shutil.copytree(tiny_model(family), "model")
    config = Path("model", file, "scheduler_config.json" if file == "scheduler" else "config.json")
    change(config, **values)
    code, _, err = run("sample", family, "model", "--count", 1, "--num_inference_steps", 1, "--mode", "pynative")
    assert code in (64, 66) and config.name in err and named in err


@pytest.mark.parametrize("file, content, named", [
    ("vocab.json", None, "lacks vocab.json"), ("merges.txt", None, "lacks merges.txt"),
    ("tokenizer_config.json", None, "lacks tokenizer_config"),
    ("vocab.json", "null", "vocab.json holds null"), ("vocab.json", '{"a": "b"}', "tokenizer"),
    ("added_tokens.json", "", "added_tokens.json"),
    ("vocab.json", '{"a": 1}', "tokenizer"),
    ("tokenizer_config.json", '{"a": ' + "9" * 5000 + "}", "a number of 5000 digits"),
])
def test_a_tokenizer_that_is_not_whole(tiny_model, file, content, named):
    from ms_diffsynth.errors import WeightError
    from ms_diffsynth.models import build_tokenizer
    from ms_diffsynth.pipelines.qwen_image.pipeline import COMPONENTS

    shutil.copytree(tiny_model("qwen_image") / "tokenizer", "tokenizer")
    path = Path("tokenizer", file)
    path.unlink(missing_ok=content is None)
    if content is not None:
        path.write_text(content)
    with pytest.raises(WeightError, match="tokenizer") as caught:
        build_tokenizer(COMPONENTS[0], Path("tokenizer"))
    assert named in str(caught.value)


def test_a_sentencepiece_model_of_noise(tiny_model):
    from ms_diffsynth.errors import WeightError
    from ms_diffsynth.models import build_tokenizer
    from ms_diffsynth.pipelines.flux.pipeline import COMPONENTS

    shutil.copytree(tiny_model("flux") / "tokenizer_2", "tokenizer_2")
    Path("tokenizer_2/spiece.model").write_bytes(bytes(range(256)) * 4)  # of which transformers makes False
    with pytest.raises(WeightError, match="tokenizer_2"):
        build_tokenizer(COMPONENTS[1], Path("tokenizer_2"))


def test_a_tokenizer_with_more_tokens_than_the_encoder_has_rows(tiny_model, run):
    shutil.copytree(tiny_model("qwen_image"), "model")
    change("model/tokenizer/vocab.json", a=10**6)
    code, _, err = run("sample", "qwen_image", "model", "--prompt", "x", *SAMPLE)
    assert code == 66 and "number 1000000, but 'text_encoder' has a vocab_size of" in err


@pytest.mark.parametrize("text", ["null", "[]", "{"])
def test_a_model_index_that_is_damaged(world, run, text):
    Path("models/toy/model_index.json").write_text(text)
    code, _, err = run("train", "toy.yaml")
    assert code == 66 and "models/toy/model_index.json" in err


@pytest.mark.parametrize("name", ["prompt", "negative_prompt"])
def test_a_prompt_that_a_script_gives(tiny_model, name):
    from ms_diffsynth.errors import ConfigError
    from ms_diffsynth.pipelines.toy.pipeline import ToyImagePipeline

    pipe = ToyImagePipeline.from_pretrained(str(tiny_model("toy")))
    with pytest.raises(ConfigError, match=name):
        pipe(**{"prompt": "a cat", name: "caf\udce9"}, height=32, width=32)


@pytest.mark.parametrize("name, before, behind", [
    ("qwen_image", (), (151645, 198, 151644, 77091, 198)), ("flux2", (151644, 872), (151668, 271))])
@pytest.mark.few(1)
def test_line_breaks_at_an_end_of_a_prompt(tiny_model, name, before, behind):
    """The tokenizer makes one token of them and of the template's, which is no other model's tokenizer."""
    pipe = family(name).pipeline.from_pretrained(str(tiny_model(name)))
    tokenize, = (unit for unit in pipe.units if unit.name == "tokenize_prompt")
    cat, = pipe.tokenizer(" cat").input_ids
    for prompt in ("\n", "\n\na cat", " \n a cat", "a cat\n"):
        ids = tokenize.process(pipe, prompt)["prompt_ids"].asnumpy()[0].tolist()
        ids = ids[:len(ids) - ids[::-1].index(behind[-1])]  # FLUX.2 pads
        assert tuple(ids[-len(behind):]) == behind and tuple(ids[:len(before)]) == before
        assert (cat in ids) == ("cat" in prompt)


def test_a_link_in_place_of_a_tokenizers_file_is_told(tiny_model):
    from ms_diffsynth.errors import WeightError
    from ms_diffsynth.models import build_tokenizer
    from ms_diffsynth.pipelines.qwen_image.pipeline import COMPONENTS

    shutil.copytree(tiny_model("qwen_image") / "tokenizer", "tokenizer")
    Path("tokenizer/added_tokens.json").unlink()
    Path("tokenizer/added_tokens.json").symlink_to("added_tokens.json")
    with pytest.raises(WeightError, match=r"added_tokens\.json"):
        build_tokenizer(COMPONENTS[0], Path("tokenizer"))


WEIGHTS = "models/toy/vae/diffusion_pytorch_model.safetensors"


def test_a_file_of_weights_without_metadata_is_read(world, run):
    with_header(WEIGHTS, lambda header: header.update(__metadata__=None))
    assert run("train", "toy.yaml")[0] == 0


@pytest.mark.parametrize("dtype", ["U32", "I32"])
def test_whole_numbers_are_no_weights(world, run, dtype):
    with_header(WEIGHTS, lambda header: [entry.update(dtype=dtype) for name,
                                         entry in header.items() if "shape" in entry])
    code, _, err = run("train", "toy.yaml")
    assert code == 66 and WEIGHTS in err and f"{dtype.replace('I', 'int').replace('U', 'uint')}" in err


def test_a_pipe_in_place_of_weights_is_not_waited_for(world, run):
    os.mkfifo("pipe.safetensors")
    code, _, err = run("train", "toy.yaml", "--lora_checkpoint", "pipe.safetensors")
    assert code == 66 and "pipe.safetensors is a named pipe" in err


# -- settings and flags --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag, value", [
    ("batch_size", 10**20), ("dataset_repeat", 10**20), ("lora_rank", 10**20), ("lora_rank", 10**8),
    ("learning_rate", "1e-320"),
    ("max_grad_norm", "1e-46"), ("lora_alpha", "1e-320"), ("loss_scale", "1e308"), ("max_pixels", 10**18),
    ("num_inference_steps", 1001),
    ("grace_seconds", "1e300"), ("height", 10**9), ("evaluation_count", 10**30), ("output_path", X300),
    ("model_paths", X300),
    ("cache_dir", X300), ("dataset_base_path", "a/" * 3000), ("lora_checkpoint", X300), ("resume", X300),
    ("model_paths", "[1]"),
    ("model_paths", "[[]]"), ("model_paths", "[null]"), ("model_paths", "*"),
    ("model_id_with_origin_paths", "toy.yaml"),
    ("instance_prompt", "caf\udce9"), ("sample_prompts", "a\x07b"), ("sample_prompts", "x" * 10_001),
    ("sample_prompts", '["a\\u0000b"]'),
    ("class_prompt", "\x1b[31m"), ("lora_checkpoint", "absent"), ("trainable_models", "absent"),
    ("lora_base_model", "absent"),
    ("dataset_metadata_path", "rows"), ("dataset_base_path", "absent"), ("adam_epsilon", "1e-31"),
    ("optimizer_args", "beta1=nan"),
    ("trust_template_sha256", "rubbish"), ("trust_template_code", "true"), ("evaluation_reference", "absent"),
    ("tokenizer_path", "absent"),
    ("seed", "9" * 5000), ("batch_size", "٣x"), ("family", "x" * 70_000),
])
def test_a_setting_that_cannot_be_meant_is_named(world, run, flag, value):
    code, _, err = run("train", "toy.yaml", f"--{flag}", value)
    assert code in (64, 65, 66) and flag in err and len(err) < 4000 and not Path("out").exists()


@pytest.mark.parametrize("setting", ["output_path", "cache_dir"])
def test_a_file_in_place_of_a_folder_is_named_with_its_setting(world, run, setting):
    code, _, err = run("train", "toy.yaml", f"--{setting}", "models/toy/model_index.json")
    assert code == 74 and f"{setting}=models/toy/model_index.json: " in err and "A part of the path is a file" in err


@pytest.mark.parametrize("host", [".", "x" * 64, "caf\udce9"])
def test_an_address_that_no_host_can_have(world, run, host):
    code, _, err = run("launch", "--workers", 2, "--master_address", host, "train", "toy.yaml")
    assert code == 64 and "master_address=" in err and "no host has this name here" in err


@pytest.mark.parametrize("words", [(), ("--instance_prompt", "a cat")])
def test_rows_that_hold_nothing(world, run, words):
    Path("rows.jsonl").write_text("{}\n{}\n")
    code, _, err = run("train", "toy.yaml", "--dataset_metadata_path", "rows.jsonl", *words)
    assert code == 65 and "rows.jsonl has no column image" in err and "it has none." in err


@pytest.mark.parametrize("value, shown", [
    ("{a: 1}", "(a mapping)"), ("!!set {a, b}", "(a set)"), ("!!binary eA==", "(binary data)"),
    ("[[a]]", "(a list that holds more than texts)"),
])
def test_what_is_no_text_in_yaml_is_shown_as_what_it_is(world, run, value, shown):
    Path("c.yaml").write_text(f"run:\n  output_path: {value}\n")
    code, _, err = run("train", "c.yaml")
    assert code == 64 and f"output_path={shown} in c.yaml line 2: expected text" in err


def test_an_escape_that_is_no_letter_is_told_with_its_file(world, run):
    Path("c.yaml").write_text('run:\n  output_path: "\\U00110000"\n')
    code, _, err = run("train", "c.yaml")
    assert code == 64 and "c.yaml" in err


@pytest.mark.parametrize("words, named", [
    (["--prompt", "caf\udce9"], "prompt"), (["--prompt", "a\ab"], "U+0007"),
    (["--prompt", "x" * 10_001], "10001 characters"),
    (["--prompt", "\u200b"], "prompt"),
    (["--prompt", "x", "--negative_prompt", "\x00"], "negative_prompt"),
    (["--prompt", "x", "--height", 10**20], "height"), (["--prompt", "x", "--height", 2**32], "height"),
    (["--prompt", "x", "--num_inference_steps", 10**6], "num_inference_steps"),
    (["--prompt", "x", "--cfg_scale", "nan"], "cfg_scale"),
    (["--prompt", "x", "--cfg_scale", -1], "cfg_scale"), (["--prompt", "x", "--lora_scale", 2],
                                                          "lora_scale without --lora"),
    (["--prompt", "x", "--template_inputs", ""], "template_inputs without --template"),
    (["--prompt", "x", "--count", 3], "count"),
    (["--prompt", "x", "--trust_template_sha256", "x"], "trust_template_sha256 without --template"),
    (["--prompt", "x", "--output", X300], "--output"), (["--prompt", "x", "--lora", "absent"], "lora=absent"),
    (["--prompt", "x", "--seed", 2**64], "seed"),
])
def test_a_flag_of_sample_that_cannot_be_meant_is_named(world, run, words, named):
    code, _, err = run("sample", "toy", "models/toy", *SAMPLE, *words)
    assert code == 64 and named in err and not Path("samples").exists()


@pytest.mark.parametrize("words", [["--embedded_guidance", 3], ["--cfg_scale", 2], ["--negative_prompt", "x"]])
def test_what_a_family_has_no_use_for_is_refused(tiny_model, run, words):
    code, _, err = run("sample", "ddpm_unet", tiny_model("ddpm_unet"), "--count", 1, "--num_inference_steps", 1, *words)
    assert code == 64 and words[0].strip("-") in err and "has no use for it" in err


def test_guidance_for_a_model_that_is_told_none(tiny_model, run):
    code, _, err = run("sample", "qwen_image", tiny_model("qwen_image"), "--prompt", "x", "--embedded_guidance", 3,
                       *SAMPLE)
    assert code == 64 and "embedded_guidance=3.0: this model is told none" in err


@pytest.mark.parametrize("name", ["RANK_SIZE", "MS_WORKER_NUM"])
@pytest.mark.parametrize("value", ["x", "1.5", "-2", "9" * 30])
def test_a_number_in_the_environment_that_is_none(world, run, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    code, _, err = run("train", "toy.yaml")
    assert code == 64 and f"{name}={value}" in err and f"Unset {name}" in err


def test_want_of_memory_names_what_asks_for_it(world, run, monkeypatch):
    def refuse(*_):
        raise MemoryError

    monkeypatch.setattr("ms_diffsynth.data.images.to_pixels", refuse)
    monkeypatch.setattr("ms_diffsynth.pipeline.to_pixels", refuse)
    code, _, err = run("train", "toy.yaml", "--batch_size", 2)
    assert code == 69 and "the memory does not suffice for batch_size=2, height=32, width=32" in err


# -- adapters ------------------------------------------------------------------------------------------------------


def lora(path, alpha=None, rank=2, **metadata):
    tensors = {"transformer.layer_1.lora_A.weight": np.ones((rank, 16), np.float32),
               "transformer.layer_1.lora_B.weight": np.ones((16, rank), np.float32)}
    if alpha is not None:
        tensors["transformer.layer_1.alpha"] = np.array(alpha, np.float32)
    save_state_dict(path, tensors, {ADAPTER_METADATA: json.dumps(metadata)} if metadata else None)


@pytest.mark.parametrize("alpha, metadata, named", [
    (None, {"lora_alpha": 10**38}, "lora_alpha"), (None, {"alpha_pattern": {"layer_1": 10**30}}, "alpha_pattern"),
    (None, {"lora_alpha": 1e300}, "lora_alpha"), (1e30, {}, "alpha"), (float("nan"), {}, "alpha"),
    (None, {"use_dora": True}, "use_dora"),
])
def test_an_adapter_that_cannot_be_meant(world, run, alpha, metadata, named):
    lora("l.safetensors", alpha, **metadata)
    for words in (("train", "toy.yaml", "--lora_checkpoint"),
                  ("sample", "toy", "models/toy", "--prompt", "x", *SAMPLE, "--lora")):
        code, _, err = run(*words, "l.safetensors")
        assert code == 66 and "l.safetensors" in err and named in err


@pytest.mark.parametrize("alpha, words", [(0, "alpha 0, so they change nothing"), (-4, "a negative alpha")])
def test_an_alpha_that_is_odd_is_a_warning(tmp_path, caplog, alpha, words):
    lora("l.safetensors", alpha)
    load_lora("l.safetensors")
    assert any("l.safetensors" in record.message and words in record.message for record in caplog.records)


def test_an_adapter_of_another_rank_is_named(world, run):
    lora("l.safetensors")
    code, _, err = run("train", "toy.yaml", "--lora_checkpoint", "l.safetensors", "--lora_target_modules", "layer_1")
    assert code == 66 and "lora_checkpoint=l.safetensors" in err and "lora_rank" in err


def test_a_rank_larger_than_the_layers(world, run):
    code, _, err = run("train", "toy.yaml", "--lora_rank", 65)
    assert code == 64 and "lora_rank=65 is larger than the layer layer_1 [16, 16]" in err


# -- runs, caches, checkpoints -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"num_processes": "x"}', '{"num_processes": 0}',
                                  '{"batch_size": 10000000000}'])
@pytest.mark.few(3)
def test_replay_of_a_run_whose_settings_are_damaged(world, run, text):
    assert run("train", "toy.yaml")[0] == 0
    Path("out/training_args.json").write_text(text)
    code, _, err = run("replay", "out", 1)
    assert code == 64 and "out/training_args.json" in err


@pytest.mark.parametrize("damage", [b"0.5\xf0", b"x", b"", b"0.5,1"])
@pytest.mark.few(2)
def test_a_row_of_the_losses_that_is_damaged_is_left_out(world, run, damage):
    words = ("train", "toy.yaml", "--save_steps", 1, "--resume", "auto", "--max_train_steps")
    assert run(*words, 2)[0] == 0
    head, first, second = Path("out/loss.csv").read_bytes().splitlines()
    number, epoch, _, *others = second.split(b",")
    Path("out/loss.csv").write_bytes(b"\n".join((head, first, b",".join((number, epoch, damage, *others)), b"")))
    assert run(*words, 3)[0] == 0
    assert [line.partition(",")[0] for line in Path("out/loss.csv").read_text().splitlines()] == ["step", "1", "3"]


@pytest.mark.parametrize("name", [".lock", "checkpoints/step-00000001/state.json"])
def test_brackets_without_end_in_what_a_run_keeps(world, run, name):
    assert run("train", "toy.yaml", "--save_steps", 1)[0] == 0
    Path("out", name).write_text("[" * 4096)
    code, _, err = run("train", "toy.yaml", "--resume", "auto", "--max_train_steps", 2)
    assert code == (0 if name == ".lock" else 78), err
    assert name == ".lock" or "step-00000001" in err


def test_a_pipe_in_place_of_the_lock(world, run):
    assert run("train", "toy.yaml")[0] == 0
    Path("out/.lock").unlink()
    os.mkfifo("out/.lock")
    for words in (("replay", "out", 1), ("train", "toy.yaml", "--resume", "auto")):
        code, _, err = run(*words)
        assert code == 74 and "out/.lock is not a regular file" in err


@pytest.mark.parametrize("state", [{}, {"identity": {}}, {"epoch": "x"}, {"position": -5}, {"saved": [1]},
                                   {"step": 2**60}])
@pytest.mark.few(2)
def test_a_checkpoint_that_a_script_saved(world, run, state):
    from ms_diffsynth.storage.checkpoint import save_checkpoint

    assert run("train", "toy.yaml")[0] == 0
    sound = json.loads(next(Path("out/checkpoints").glob("*/state.json")).read_text())
    groups = {group: load_state_dict(next(Path("out/checkpoints").glob(f"*/{group}.safetensors")))
              for group in ("weights", "moments")}
    save_checkpoint("own", 1, groups, sound | state if state else {})
    code, _, err = run("train", "toy.yaml", "--output_path", "other", "--resume", "own/step-00000001",
                       "--max_train_steps", 2)
    assert code == 78 and "own/step-00000001" in err


def test_a_folder_that_is_no_checkpoint_is_named_with_its_setting(world, run):
    code, _, err = run("train", "toy.yaml", "--resume", ".")
    assert code == 78 and "resume=." in err and "is not a checkpoint" in err


def test_a_manifest_of_a_cache_that_another_program_wrote(world, run):
    from ms_diffsynth.storage.cache import FORMAT, digest_of

    Path("cache").mkdir()
    parts = {"format": FORMAT, "fingerprint": {}, "configs": {}, "complete": True}
    for manifest in (parts | {"rows": []}, parts | {"rows": {"instance": [["a"]]}},
                     {"format": FORMAT}):
        Path("cache/cache.json").write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))
        code, _, err = run("cache", "inspect", "cache")
        assert code == 78 and "cache/cache.json is not the manifest of a cache" in err


@pytest.mark.parametrize("content", ["[]", "{}", "[" * 100_000, '{"objective": "flow_match_sft"}',
                                     '{"objective": ["x"]}',
                                     '{"objective": "flow_match_sft", "family": [1], "row_stride": 0}'])
def test_a_parity_case_that_cannot_be_run(run, content):
    Path("case").mkdir()
    Path("case/case.json").write_text(content)
    code, _, err = run("parity", "case", "--mode", "pynative")
    assert code in (64, 65, 66) and "case" in err


def test_a_parity_case_below_a_file(run):
    Path("file").write_text("x")
    code, _, err = run("parity", "file/x")
    assert code == 65 and "file/x" in err


@pytest.mark.parametrize("code", ["class Stop(BaseException): pass\nraise Stop('x')", "raise GeneratorExit",
                                  "raise SystemExit(3)",
                                  "class E(Exception):\n    def __str__(self): raise ValueError\nraise E"])
def test_a_template_may_raise_what_it_likes(world, run, code):
    Path("t").mkdir()
    Path("t/model.py").write_text(code)
    ended, _, err = run("template", "pack", "t", "l.safetensors", "out", "--trust_template_code")
    assert ended == 65 and "t/model.py line" in err


# -- the terminal --------------------------------------------------------------------------------------------------


def test_what_the_terminal_has_no_letter_for_is_escaped(world, python):
    Path("t").mkdir()
    Path("t/model.py").write_text("# 猫\n")
    command = ["-m", "ms_diffsynth.cli.main", "template", "show"]
    done = python(*command, "t", env=os.environ | {"PYTHONIOENCODING": "ascii",
                                                   "PYTHONPATH": os.pathsep.join(__import__("sys").path)})
    assert done.returncode == 0 and done.stdout == "# \\u732b\n"


@pytest.mark.parametrize("redirect, code", [(">&-", 0), ("> /dev/full", 74), ("2>&-", 0), ("< /dev/null >&- 2>&-", 0)])
@pytest.mark.few(1)
def test_an_output_that_is_closed_or_full(world, python, redirect, code):
    import subprocess
    import sys

    Path("t").mkdir()
    Path("t/model.py").write_text("x = 1\n")
    done = subprocess.run(["bash", "-c", f"{sys.executable} -m ms_diffsynth.cli.main template show t {redirect}"],
                          capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, timeout=120, check=False)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert code == 0 or "OutputError: the output cannot be written: ENOSPC" in done.stderr


def test_a_long_caption_is_cut_in_no_time():
    image = Image.new("RGB", (64, 64))
    began = time.process_time()
    grid([[image], [image]], captions=["x" * 10_000, "a cat " * 1000])
    assert time.process_time() - began < 5
