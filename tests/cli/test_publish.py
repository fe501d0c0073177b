"""``ms-diffsynth train --push_to_hub`` against a hub on this machine: what arrives, and that no hub holds up a run."""
from __future__ import annotations

import ast
import json
import re
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
from hub_server import only_this_machine
from huggingface_hub import constants
from upload_server import TOKEN, UploadServer

from ms_diffsynth.errors import TrainingError
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.training.hooks import publish
from ms_diffsynth.training.logger import ModelLogger

NAME, ENDPOINT = "writer/toy", constants.ENDPOINT
PUSH = ("--mode", "pynative", "--push_to_hub", "--hub_model_id", NAME)
QUICK = (*PUSH, "--sample_prompts", "[]", "--checkpoint_steps", "0")


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The hub every client asks; none waits before asking again."""
    only_this_machine(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    with UploadServer() as server:
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        yield server


def files(folder):
    found = sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*") if p.is_file())
    return [name for name in found if not name.startswith("checkpoints/") and name != ".lock"]


def events(folder="out"):
    return [json.loads(line) for line in Path(folder, "events.jsonl").read_text().splitlines()]


def names_of(found):
    return [event["event"] for event in found]


def test_what_was_trained_can_be_downloaded(run, config, hub, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["/opt/venv/bin/ms-diffsynth", "train", str(config), "--seed", "3"])
    code, out, err = run("train", config, *PUSH, "--seed", 3)
    assert code == 0 and out == ""
    last = err.splitlines()[-1]
    assert re.fullmatch(rf"published step 4: {hub.endpoint}/{NAME}/commit/[0-9a-f]{{40}}", last)
    monkeypatch.setattr(constants, "ENDPOINT", ENDPOINT)  # addresses of downloads are made from its value at import
    got = ModelConfig(model_id=NAME, endpoint=hub.endpoint, cache_dir=tmp_path / "cache").resolve()[0]
    assert last.endswith(got.name) and hub.private[NAME] and hub.messages[-1] == "step 4"
    sent = ["README.md", "samples/before_after.png", "samples/step-0.png", "samples/step-4.png", "step-2.safetensors",
            "step-4.safetensors"]
    assert files(got) == [".gitattributes", *sent]
    assert all((got / name).read_bytes() == Path("out", name).read_bytes() for name in sent)
    assert files("out") == sorted([*sent, "config.yaml", "events.jsonl", "loss.csv", "loss.png", "report.html",
                                    "training_args.json"])
    told = [event for event in events() if event["event"].startswith("upload_")]
    assert told[0]["event"] == "upload_begun" and told[0]["upload"] == "step 2"
    assert told[-1]["event"] == "upload_finished" and told[-1]["url"] == last.split()[-1]
    card = (got / "README.md").read_text()
    for text in ("| steps | 4 |", "| seed | 3 |", r"\(3 rows\) |", "1. a red square", "2. a blue square",
                 "lora_rank: 2", "![sample images](samples/step-4.png)", "ms-diffsynth train toy.yaml --seed 3",
                 "mindspore version", 'load_state_dict("step-4.safetensors")', "LoRA for a model that is not on a hub"):
        assert text in card, text
    assert str(tmp_path) not in card and "/opt" not in card and TOKEN not in card


@pytest.mark.fault
@pytest.mark.parametrize("fault", [{"status": 503}, {"status": 401}, {"is_cut": True}], ids=str)
@pytest.mark.few(1)
def test_a_hub_that_fails_costs_nothing(run, config, hub, fault):
    hub.fail("POST", times=999, **fault)
    code, _, err = run("train", config, *QUICK)
    assert code == 0 and names_of(events())[-1] == "upload_failed" and "end" in names_of(events())
    assert files("out") == ["README.md", "config.yaml", "events.jsonl", "loss.csv", "loss.png", "report.html",
                            "step-2.safetensors", "step-4.safetensors", "training_args.json"]
    assert "published" not in err and hub.repositories == {}
    assert events()[-1]["reason"].startswith(f"HubError: {NAME}: making the repository")


@pytest.mark.fault
def test_what_failed_is_told_at_the_end(config, hub, python, monkeypatch):
    """In a process of its own: pytest takes the log."""
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    hub.fail("POST", times=999, status=403)
    done = python("-m", "ms_diffsynth.cli.main", "train", str(config), *QUICK)
    assert done.returncode == 0
    last = done.stderr.splitlines()[-1]
    assert re.match(rf"WARNING: \d uploads to {NAME} failed; the files are complete on this disk, ms-diffsynth push "
                    rf"sends them\. The last failure: HubError: {NAME}: making the repository was refused", last), last


@pytest.mark.fault
def test_a_slow_hub_does_not_slow_training(run, config, hub, monkeypatch):
    def event(self, event, write=ModelLogger.event, **values):
        write(self, event, **values)
        if event == "end":
            answer.set()
    monkeypatch.setattr(ModelLogger, "event", event)
    hub.fail("POST /api/repos/create", until=(answer := threading.Event()))
    code, _, err = run("train", config, *QUICK, "--save_steps", 1)
    assert code == 0 and "published step 4: " in err
    order = names_of(events())
    assert order.index("upload_begun") < order.index("end") < order.index("upload_finished")  # the first of each
    assert order.count("saved") == 4 and len(hub.messages) <= 2  # what waited was replaced by what came later


@pytest.mark.fault
@pytest.mark.parametrize("error, code", [(TrainingError("no more"), 65), (KeyboardInterrupt(), 130)], ids=repr)
def test_training_that_stops_waits_for_the_hub_a_little(run, config, hub, monkeypatch, error, code):
    def stop(self, record, log_step=ModelLogger.log_step):
        log_step(self, record)
        if record["step"] == 3:
            raise error
    monkeypatch.setattr(ModelLogger, "log_step", stop)
    monkeypatch.setattr(publish, "SECONDS_AFTER_AN_ERROR", 0.1)
    hub.fail("POST /api/repos/create", until=(answer := threading.Event()))
    assert run("train", config, *QUICK)[0] == code
    answer.set()
    assert events()[-1]["reason"] == "TimeoutError: not done after 0 seconds" and "step-2.safetensors" in files("out")
    next(thread for thread in threading.enumerate() if thread.name == "upload").join()  # the hub is there as long


@pytest.mark.fault
def test_a_card_that_fails_does_not_keep_the_weights_here(run, config, hub, monkeypatch):
    def fail(*_):
        raise RuntimeError("no card")
    monkeypatch.setattr(publish, "run_card", fail)
    assert run("train", config, *QUICK)[0] == 0
    assert "RuntimeError: no card" in [event.get("reason") for event in events()]
    assert {"step-2.safetensors", "step-4.safetensors"} < set(hub.files(NAME)) and "README.md" not in hub.files(NAME)


@pytest.mark.parametrize("words", [[], ["--hub", "modelscope"]], ids=["huggingface", "modelscope"])
def test_without_a_token_nothing_is_loaded(run, config, hub, monkeypatch, tmp_path, words):
    if words:
        pytest.importorskip("modelscope_hub", reason="pip install 'ms_diffsynth[modelscope]'")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "no-login"))
    code, _, err = run("train", config, *QUICK, *words, "--model_paths", "absent", "--dataset_base_path", "absent")
    assert code == 69 and err.startswith("HubError: there is no token for ") and "og in" in err
    assert not Path("out").exists()


def test_other_ranks_publish_nothing():
    settings = SimpleNamespace(push_to_hub=True)  # there is no token here, and no hub
    rank = SimpleNamespace(is_main_process=False)
    publish.check_token(rank, settings)
    logger = ModelLogger("out")
    with publish.publishing(rank, None, logger, None, settings):
        assert logger.after_save is None


# -- the settings --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words, expected", [
    (["--push_to_hub"], "push_to_hub=true without hub_model_id: say where, for example --hub_model_id me/my-lora."),
    (["--hub_model_id", "me/x"], "hub_model_id would not be used: set push_to_hub=true."),
    (["--hub", "modelscope", "--hub_private_repo", "false"], "hub_private_repo, hub would not be used: set push"),
    ([*PUSH, "--task", "sft:data_process"], "push_to_hub=true with task=sft:data_process, which trains nothing"),
    ([*PUSH, "--hub", "hugingface"], "hub=hugingface from the flag --hub: expected one of huggingface, modelscope."),
])
def test_settings_that_cannot_be_meant(run, config, words, expected):
    code, _, err = run("train", config, *words)
    assert code == 64 and expected in err and not Path("out").exists()


@pytest.mark.fault
@pytest.mark.parametrize("words", [["--hub_token", "swordfish1"], ["--hub_token=swordfish1"], ["--token", "swordfish1"],
                                   ["--token"]])
@pytest.mark.parametrize("command", ["train", "describe"])
def test_a_token_is_no_flag(run, config, command, words):
    code, _, err = run(command, config, *words)
    assert code == 64 and "swordfish" not in err
    assert err.startswith(f"ConfigError: {words[0].partition('=')[0]}: a token is never a flag and never a setting")
    assert "hf auth login" in err and "HF_TOKEN" in err and "MODELSCOPE_API_TOKEN" in err


@pytest.mark.fault
@pytest.mark.parametrize("line", ["run:\n  hub_token: swordfish1", "hub_token: swordfish1",
                                  "run:\n  token: [swordfish1]"])
def test_a_token_is_no_setting(run, tmp_path, line):
    (tmp_path / "bad.yaml").write_text(line + "\n")
    code, _, err = run("train", tmp_path / "bad.yaml")
    assert code == 64 and "swordfish" not in err and "a token is never a flag and never a setting" in err


def test_no_error_suggests_a_token(run, config):
    code, _, err = run("train", config, "--hub_tokens", "x")
    assert code == 64 and "does not know --hub_tokens" in err and "'--hub_token'" not in err


# -- the model card ------------------------------------------------------------------------------------------------


KLEIN = "black-forest-labs/FLUX.2-klein-4B:text_encoder/*.safetensors"
BASE = "black-forest-labs/FLUX.2-klein-base-4B:transformer/*.safetensors"


def card(trainable=("dit",), lora=None, prefix="pipe.dit.", **changes):
    pipe = type("Flux2ImagePipeline", (), {"network": "dit", "medium": "image", "inputs": ("prompt", "input_image"),
                                          "given_as": {BASE: "dit", KLEIN: "text_encoder"}})()
    model = SimpleNamespace(pipe=pipe, trainable=trainable, lora_base_models=(lora,) if lora else (),
                            is_whole_pipeline=False)
    logger = SimpleNamespace(saved=[Path("out/epoch-0.safetensors"), Path("out/epoch-1.safetensors")], num_steps=7,
                             samples={}, settings={"learning_rate": 1e-4}, remove_prefix_in_ckpt=prefix)
    args = {"hub_model_id": "me/x", "hub": "huggingface", "family": "flux2", "sample_prompts": (), "seed": 1,
            "instance_prompt": None, "dataset_base_path": "data/cats", "model_paths": None,
            "model_id_with_origin_paths": f"{KLEIN},{BASE}", "sample_template_inputs": None,
            "template_model_id_or_path": None} | changes
    return publish.run_card(model, logger, SimpleNamespace(rows=[{}] * 9), SimpleNamespace(**args))


@pytest.mark.parametrize("options, expected", [
    ({"lora": "dit"}, ["A LoRA for [black-forest", "load_lora_weights", "base_model_relation: adapter"]),
    ({}, ["A trained transformer for", "Flux2Transformer2DModel"]),
    ({"prefix": None}, ["Trained weights of dit for", 'load_state_dict("epoch-1.safetensors")']),
    ({"trainable": ("dit.double", "text_encoder")}, [r"Trained weights of dit\.double, text\_encoder for"]),
    ({"trainable": ("text_encoder",), "lora": "text_encoder"}, [r"A LoRA of text\_encoder for"]),
], ids=str)
def test_what_was_trained_is_named(options, expected):
    text = card(**({"trainable": (options["lora"],)} if options.get("lora") else {}) | options)
    assert all(word in text for word in expected), text
    assert "base_model: black-forest-labs/FLUX.2-klein-base-4B" in text and r"| data | cats \(9 rows\) |" in text


@pytest.mark.parametrize("changes, words", [
    ({}, ['template_inputs=[inputs]', 'pack_template("path/to', '"black-forest-labs/FLUX.2-klein-base-4B"']),
    ({"model_paths": "/data/me/flux2", "model_id_with_origin_paths": None}, ['from_pretrained("path/to/the/base/mod']),
    ({"hub": "modelscope", "template_model_id_or_path": "me/template:", "sample_prompts": ("a ``` cat",),
      "sample_template_inputs": '[{"scale": 0.5}]'}, ["model_file_download", '"me/template:"', "{'scale': 0.5}"]),
], ids=["hub", "folder", "modelscope"])
def test_a_templates_card_says_how_to_load_and_trust_it(changes, words, tmp_path):
    text = card(("template_model",), **({"template_model_id_or_path": str(tmp_path)} | changes))
    code = re.search(r"^```python\n(.*?)\n```$", text, re.DOTALL | re.MULTILINE)[1]
    tree = ast.parse(code)
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert {"pack_template", "templates"} < called and "trust_template_code=True" in code
    assert all(word in code for word in words), code
    assert "`model.py`, is not in this repository" in text and "A template for" in text
    assert str(tmp_path) not in text and text.count("## How to load it") == text.count("## How it was trained") == 1
