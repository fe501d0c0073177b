"""The configuration: what is accepted, and a message with file, line and remedy for each thing that is not."""
from __future__ import annotations

import argparse
import dataclasses
import importlib.util
from pathlib import Path

import pytest

from ms_diffsynth.config import SECTIONS, SETTINGS, TrainConfig, load_config, prompts_of, to_yaml, validate
from ms_diffsynth.config.flags import USUAL, add_flags, overrides_of
from ms_diffsynth.config.loading import commented_yaml
from ms_diffsynth.errors import ConfigError

NEEDED = {"family": "toy", "dataset_base_path": "pictures", "num_epochs": "1"}


def write(tmp_path, text):
    path = tmp_path / "flux_lora.yaml"
    path.write_text(text)
    return path


def load(tmp_path, text, **flags):
    return load_config(write(tmp_path, text), NEEDED | flags)


def message(tmp_path, text="", **flags):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **flags)
    return str(caught.value).replace(str(tmp_path) + "/", "")


def parsed(*words):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    return overrides_of(parser.parse_args(words))


def test_defaults():
    config = load_config(None, NEEDED)
    assert (config.model.family, config.data.dataset_base_path, config.run.num_epochs) == ("toy", "pictures", 1)
    assert config.model.lora_rank == 16 and config.model.fuse == () and config.model.lora_alpha is None
    assert config.optimizer.learning_rate == 1e-4 and config.run.seed == 42 and config.objective.posterior is None
    assert config.data.max_pixels is None and config.run.mode == "graph"


def test_names_are_unique_and_every_setting_has_help():
    names = [f.name for cls in SECTIONS.values() for f in dataclasses.fields(cls)]
    assert len(names) == len(set(names)) == len(SETTINGS)
    assert all(s.metadata["help"] for s in SETTINGS.values())
    assert set(load_config(None, NEEDED).flat()) == set(names)


def test_a_range_names_its_setting_and_holds_the_default():
    for name, setting in SETTINGS.items():
        words = setting.metadata["range"].split()
        assert not words or words[2] in (name, "lr"), name
        assert not isinstance(setting.default, (int, float, str)) or not setting.expected(setting.default), name


def test_a_file_and_flags_that_win(tmp_path):
    text = """
model:
  family: flux
  fuse: [encode_image]
optimizer:
  learning_rate: 1e-4     # a text to YAML 1.1
  weight_decay: 1
run:
  enable_tensorboard_log: True
  max_train_steps: null
  sample_prompts:
    - a cat, sitting
    - "[a dog]"
    - no
data:
  instance_prompt: no
  class_prompt: ~
  height: 64
  width: 64
"""
    config = load(tmp_path, text, learning_rate="3e-5")
    assert config.model.family == "toy" and config.model.fuse == ("encode_image",)
    assert config.optimizer.learning_rate == 3e-5 and config.optimizer.weight_decay == 1.0
    assert isinstance(config.optimizer.weight_decay, float)
    assert config.run.enable_tensorboard_log is True and config.run.max_train_steps is None
    assert config.run.sample_prompts == ("a cat, sitting", "[a dog]", "no")
    assert config.data.instance_prompt == "no" and config.data.class_prompt is None
    assert load_config(write(tmp_path, text), {k: v for k, v in NEEDED.items() if k != "family"}).model.family == "flux"


def test_a_flag_replaces_what_is_wrong_in_the_file(tmp_path):
    assert load(tmp_path, "optimizer:\n  learning_rate: 1e4\n", learning_rate="1e-3").optimizer.learning_rate == 1e-3


def test_the_message_of_a_value_out_of_range(tmp_path):
    text = "\n" * 10 + "optimizer:\n  learning_rate: 1e4\n"
    assert message(tmp_path, text) == (
        "learning_rate=1e4 in flux_lora.yaml line 12: expected 0 < lr <= 10. Did you mean 1e-4?")
    assert message(tmp_path, learning_rate="0.5") == "learning_rate=0.5: expected 0 < lr <= 0.1 for optimizer=adamw."
    assert message(tmp_path, learning_rate="11", optimizer="prodigy") == (
        "learning_rate=11 from the flag --learning_rate: expected 0 < lr <= 10.")


@pytest.mark.parametrize("name, text, expected", [
    ("learning_rate", "0", "expected 0 < lr <= 10."), ("learning_rate", "-1e-4", "expected 0 < lr"),
    ("learning_rate", "nan", "expected 0 < lr"), ("learning_rate", "inf", "expected 0 < lr"),
    ("learning_rate", "fast", "expected a number."), ("learning_rate", "", "expected a number."),
    ("learning_rate", "null", "expected a number, not null."),
    ("logit_mean", "inf", "expected -1000 <= logit_mean <= 1000."),
    ("lora_rank", "0", "expected 1 <= lora_rank <= 65536."), ("lora_rank", "16.5", "expected a whole number."),
    ("lora_rank", "1e2", "expected a whole number. Did you mean 100?"), ("lora_rank", "16.0", "Did you mean 16?"),
    ("lora_rank", "0x10", "expected a whole number."), ("adam_beta1", "1", "expected 0 <= adam_beta1 < 1."),
    ("adam_beta2", "1e0", "expected 0 <= adam_beta2 < 1."), ("seed", "-1", "expected 0 <= seed < 4294967296."),
    ("seed", "4294967296", "expected 0 <= seed < 4294967296."),
    ("max_train_steps", "0", "expected 1 <= max_train_steps <= 1000000000."),
    ("lora_alpha", "0", "expected 0 < lora_alpha <= 1000000."),
    ("weight_decay", "1.5", "expected 0 <= weight_decay <= 1."),
    ("max_grad_norm", "0", "expected 0 < max_grad_norm <= 1e+12."),
    ("guidance_scale", "-1", "expected 0 <= guidance_scale <= 1000."),
    ("with_prior_preservation", "yes", "expected true or false."),
    ("enable_tensorboard_log", "1", "expected true or false."),
    ("mode", "eager", "expected one of graph, pynative."), ("mode", "grahp", "Did you mean 'graph'?"),
    ("weighting_scheme", "logit", "expected one of none, logit_normal, mode, sigma_sqrt, cosmap, diffsynth"),
    ("dtype", "fp16", "expected one of float32, bfloat16, float16."),
    ("device", "GPU", "expected one of CPU, Ascend."), ("posterior", "mode", "expected one of mean, sample."),
    ("lr_scheduler", "cosin", "Did you mean 'cosine'?"), ("task", "dpo", "expected one of sft, dreambooth,"),
    ("sample_prompts", "[a cat]", "expected a JSON list of texts such as"),
    ("sample_prompts", '["a", 1]', "expected a JSON list of texts such as"),
    ("family", "null", "expected text, not null."),
])
def test_bad_values(tmp_path, name, text, expected):
    found = message(tmp_path, **{name: text})
    assert found.startswith(f"{name}={text} from the flag --{name}: expected") and expected in found


@pytest.mark.fault
@pytest.mark.parametrize("line, expected", [
    ("model:\n  lora_rank: '16'", "lora_rank=16 in flux_lora.yaml line 2: expected a whole number, not text in quotes"),
    ("model:\n  lora_rank: [16]", "lora_rank=['16'] in flux_lora.yaml line 2: expected a whole number."),
    ("model:\n  lora_rank:", "lora_rank=null in flux_lora.yaml line 2: expected a whole number, not null."),
    ("model:\n  lora_rank: {a: 1}", "lora_rank=(a mapping) in flux_lora.yaml line 2: expected a whole number."),
    ("run:\n  enable_tensorboard_log: no", "enable_tensorboard_log=no in flux_lora.yaml line 2: expected true or fa"),
    ("run:\n  enable_tensorboard_log: 'true'", "expected true or false, not text in quotes."),
    ("model:\n  lora_checkpoint: x\n  trainable_models: dit", "lora_checkpoint=x with trainable_models"),
    ("run:\n  tusk: sft", "tusk in flux_lora.yaml line 2 is not a setting."),
    ("run:\n  sample_prompts: {a: b}", "expected a list of texts."),
    ("run:\n  sample_prompts: [[a]]", "expected a list of texts."),
    ("model:\n  model_paths: [a, b]", "=['a', 'b'] in flux_lora.yaml line 2: expected text: put it in quotes."),
    ("optimizer:\n  learning_rat: 1", "learning_rat in flux_lora.yaml line 2 is not a setting. Did you mean"),
    ("run:\n  learning_rate: 1", "learning_rate in flux_lora.yaml line 2: it belongs into section 'optimizer'."),
    ("learning_rate: 1", "learning_rate in flux_lora.yaml line 1: it belongs into section 'optimizer'."),
    ("learning_rat: 1", "learning_rat in flux_lora.yaml line 1 is not a setting. Did you mean 'learning_rate'?"),
    ("objective: sft", "objective in flux_lora.yaml line 1: expected the settings of the section 'objective' be"),
    ("optimiser:\n  x: 1", "optimiser in flux_lora.yaml line 1: expected one of the sections model, data, objective, "
                           "optimizer, run. Did you mean 'optimizer'?"),
])
def test_bad_files(tmp_path, line, expected):
    assert expected in message(tmp_path, line + "\n")


@pytest.mark.fault
def test_nothing_is_taken_from_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert load(tmp_path, "data:\n  instance_prompt: ${HF_TOKEN}\n").data.instance_prompt == "${HF_TOKEN}"


def test_unknown_flags_are_named():
    with pytest.raises(ConfigError, match=r"--lora_ranks is not a flag\. Did you mean"):
        load_config(None, NEEDED | {"lora_ranks": "3"})


def test_what_is_missing_and_wrong_is_reported_at_once(tmp_path):
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, "optimizer:\n  learning_rate: 1e4\n  x: 1\n"), {"lora_rank": "0"})
    lines = str(caught.value).splitlines()
    assert lines[0] == "5 settings are wrong:" and len(lines) == 6
    assert any(line.startswith("  family is not set (model family, such as flux") and line.endswith("or by --family.")
               for line in lines)
    assert any(line.startswith("  dataset_base_path is not set") for line in lines)


DREAM = {"task": "dreambooth", "instance_prompt": "a cat"}
PRIOR = DREAM | {"with_prior_preservation": "true", "class_base_path": "c", "class_prompt": "d"}


def without(flags, name):
    return {k: v for k, v in flags.items() if k != name}


@pytest.mark.parametrize("flags, expected", [
    ({"num_epochs": "null"}, "neither num_epochs nor max_train_steps is set"),
    ({"lora_base_model": ""}, "neither lora_base_model nor trainable_models is set"),
    ({"lora_base_model": "null"}, "neither lora_base_model nor trainable_models is set"),
    ({"height": "64"}, "only one of height and width is set"),
    ({"sample_width": "64"}, "only one of sample_height and sample_width is set"),
    ({"height": "64", "width": "64", "buckets": "3"}, "buckets=3 with a fixed height and width"),
    (without(PRIOR, "class_base_path"), "with_prior_preservation=true without class_base_path"),
    (PRIOR | {"task": "sft"}, "with_prior_preservation=true with task=sft"),
    ({"edit_max_pixels": "4096", "extra_inputs": "edit_images"}, "2 settings are wrong:\n  extra_inputs names "
     "'edit_images': expected some of edit_image, control_image, control_mask, input_image, end_image, "
     "template_inputs. Did you mean 'edit_image'?\n  edit_max_pixels=4096 would not be used"),
    ({"edit_folders": "a", "extra_inputs": "control_image"}, "edit_folders=a would not be used"),
    ({"control_mode": "1", "extra_inputs": "contol_image"}, "2 settings are wrong:\n  extra_inputs names 'contol_"),
    (without(PRIOR, "with_prior_preservation"), "class_base_path, class_prompt would not be used"),
    ({"lr_warmup_steps": "11", "max_train_steps": "10"}, "lr_warmup_steps=11 exceeds max_train_steps=10"),
])
def test_settings_that_do_not_go_together(tmp_path, flags, expected):
    assert message(tmp_path, **flags).startswith(expected)


@pytest.mark.parametrize("flags", [
    DREAM, PRIOR, without(PRIOR, "class_prompt"), without(DREAM, "instance_prompt"), {"max_train_steps": "5"},
    {"num_epochs": "null", "max_train_steps": "5"}, {"max_grad_norm": "null"}, {"weighting_scheme": "null"},
    {"height": "64", "width": "32"}, {"buckets": "4"}, {"lora_base_model": "null", "trainable_models": "dit"},
    {"device": "cpu", "seed": "4294967295", "sample_steps": "10", "sample_prompts": "a cat"},
    {"adam_beta1": "0", "weight_decay": "0"},
    {"optimizer": "Prodigy", "learning_rate": "1", "optimizer_args": "d_coef=2,safeguard_warmup=true"},
])
def test_settings_that_do(tmp_path, flags):
    config = load(tmp_path, "", **flags)
    assert config == load_config(write(tmp_path, to_yaml(config)))
    assert config.run.device in (None, "CPU")


def test_a_configuration_made_in_python_is_checked_too():
    config = load_config(None, NEEDED)
    wrong = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=1e4))
    with pytest.raises(ConfigError, match=r"learning_rate=10000.0: expected 0 < lr <= 10\."):
        validate(wrong)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.run.seed = 1
    with pytest.raises(TypeError):
        TrainConfig(config.model, config.data)


NASTY = ["null", "~", "", "no", "1e-4", "010", "a: b", "# x", "[x", '["a"]', "ü 猫", "two\nlines\n", " edge ", "'\"",
         "*a", "!!str", "x" * 300, "a b " * 60, "\t", "2026-01-01"]


@pytest.mark.parametrize("text", NASTY)
def test_the_resolved_file_reads_back_the_same(tmp_path, text):
    config = load_config(None, NEEDED | {"learning_rate": "1.2345678901234567e-5"})
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, data_file_keys=text),
                                 model=dataclasses.replace(config.model, trainable_models=text),
                                 run=dataclasses.replace(config.run, accept_changes=(text, "b"), resume="auto"))
    assert load_config(write(tmp_path, to_yaml(config))) == config


@pytest.mark.parametrize("text", [*NASTY, "a\u2028b", "\U0001f600", "a,b" * 90])
def test_a_file_with_comments_reads_back_as_the_flags_it_is_made_of(tmp_path, text):
    """With lists as they are; a text "null" is null, as a flag's is."""
    given = NEEDED | {"trainable_models": text, "learning_rate": "1e-4", "use_ema": "true"}
    given |= {} if text in ("null", "~") else {"data_file_keys": text}  # which cannot be null
    made = commented_yaml([f"head {text}", text], {name: (value, "a comment") for name, value in given.items()}
                          | {"sample_prompts": ([text, "a # b"], ""), "batch_size": (3, "")})
    # a long list of names is folded, with blanks between them
    folded = {name: value.replace(",", ", ") for name, value in given.items()
              if len(value) > 80 and "," in value}
    expected = load_config(None, given | folded | {"batch_size": "3"}, sample_prompts=[text, "a # b"])
    assert load_config(write(tmp_path, made)) == expected


def test_flags():
    assert parsed() == {}
    assert parsed("--enable_tensorboard_log") == {"enable_tensorboard_log": "true"}
    assert parsed("--enable_tensorboard_log", "false", "--learning_rate", "1e-4") == {
        "enable_tensorboard_log": "false", "learning_rate": "1e-4"}
    assert parsed("--logit_mean", "-0.5") == {"logit_mean": "-0.5"}
    flags = parsed("--fuse", "encode_image, encode_prompt", "--sample_prompts", "a cat, sitting")
    config = load_config(None, NEEDED | flags)
    assert config.model.fuse == ("encode_image", "encode_prompt") and config.run.sample_prompts == ("a cat, sitting",)
    for nothing in ("null", "[]"):
        config = load_config(None, NEEDED | parsed("--sample_prompts", nothing, "--fuse", nothing))
        assert config.run.sample_prompts == config.model.fuse == ()
    config = load_config(None, NEEDED | parsed("--sample_prompts", '["a, b", "c"]', "--lora_target_modules", ""))
    assert config.run.sample_prompts == ("a, b", "c") and config.model.lora_target_modules == ""


def test_a_sample_prompt_may_have_settings_of_its_own(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("run:\n  max_train_steps: 1\n  sample_prompts:\n    - a cat\n    - prompt: a dog\n"
                    "      cfg_scale: 2\n      seed: 7\n    - {prompt: '1', width: 64, height: 32}\n")
    config = load_config(file, NEEDED)
    assert config.run.sample_prompts == ("a cat", {"prompt": "a dog", "cfg_scale": 2.0, "seed": 7},
                                         {"prompt": "1", "height": 32, "width": 64})
    assert prompts_of(config.run.sample_prompts) == ["a cat", "a dog", "1"]
    (tmp_path / "again.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "again.yaml") == config
    flag = '["a cat", {"prompt": "a dog", "cfg_scale": 2, "seed": 7}, {"prompt": "1", "width": 64, "height": 32}]'
    assert load_config(None, NEEDED | {"max_train_steps": "1", "sample_prompts": flag}) == config
    again = load_config(None, NEEDED | {"max_train_steps": "1"}, sample_prompts=list(config.run.sample_prompts))
    assert again == config


@pytest.mark.parametrize("lines, expected", [
    ("{prompt: a dog, cfg: 2}", "entry 2 has 'cfg': expected prompt and some of negative_prompt, cfg_scale, guidance"),
    ("{cfg_scale: 2}", "entry 2: expected a text, or a mapping of prompt and of some of negative_prompt"),
    ("{prompt: a dog, cfg_scale: -1}", "entry 2, cfg_scale=-1 in {} line 4: expected 0 <= sample_cfg_scale <= 1000"),
    ("{prompt: a dog, seed: many}", "entry 2, seed=many in {} line 4: expected a whole number"),
    ("{prompt: a dog, height: 32}", "entry 2 has only one of height and width: set both, or neither"),
    ("{prompt: a dog, prompt: a cat}", "(a list that holds more than texts) in {} line 2: expected a list of texts"),
    ("[a, b]", "expected a list of texts"),
])
def test_a_sample_prompt_with_settings_that_cannot_be(tmp_path, lines, expected):
    file = tmp_path / "run.yaml"
    file.write_text(f"run:\n  sample_prompts:\n    - a cat\n    - {lines}\n")
    with pytest.raises(ConfigError) as error:
        load_config(file, NEEDED)
    assert expected.format(file) in str(error.value)


def test_trackers_that_are_not_there():
    assert load_config(None, NEEDED, trackers="wandb, tensorboard", num_epochs=1).run.trackers == ("wandb",
                                                                                                 "tensorboard")
    with pytest.raises(ConfigError, match=r"names wand: expected some of swanlab, tensorboard, wandb\. Did you mean"):
        load_config(None, NEEDED, trackers="wand", num_epochs=1)


def test_settings_of_the_caller_are_not_flags_of_the_run():
    args = argparse.Namespace(debug=False, config=None, family="toy", command="train")
    assert overrides_of(args) == {"family": "toy"}


def test_help_is_short_and_all_of_it_shows_every_setting_with_choices_and_default(capsys):
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = parser.format_help()
    assert all((f"--{name} " in text) == (name in USUAL) for name in SETTINGS) and USUAL < SETTINGS.keys()
    assert len(text.splitlines()) < 120 and f"the other {len(SETTINGS) - len(USUAL)} settings" in " ".join(text.split())
    with pytest.raises(SystemExit):
        parser.parse_args(["--help-all"])
    text = " ".join(capsys.readouterr().out.split())
    assert all(f"--{name} " in text for name in SETTINGS)
    assert "where it is a factor and 1 is advised (default: 0.0001)" in text
    assert "(one of graph, pynative; default: \"graph\")" in text
    assert "(required)" in text and "(default: null)" in text


def test_the_table_of_settings_in_the_documentation_is_the_present_one():
    docs = Path(__file__).parents[2] / "docs/reference"
    spec = importlib.util.spec_from_file_location("settings_table", docs / "settings_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    text = (docs / "settings.md").read_text()
    assert text == module.page(text), "run: python docs/reference/settings_table.py"
    assert all(f"| `{name}` |" in text for name in SETTINGS)
