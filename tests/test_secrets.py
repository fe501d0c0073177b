"""Secrets planted wherever a run reads something: none is in what it writes, says or sends, but for one header.

`PLANTS` is the table. Two runs and a few mistakes hold all of them; then everything is searched.
"""
from __future__ import annotations

import base64
import json
import logging
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from hub_server import only_this_machine
from huggingface_hub import constants
from PIL import Image
from upload_server import UploadServer

from ms_diffsynth.cli.main import main
from ms_diffsynth.errors import TrainingError
from ms_diffsynth.hub.card import Card, model_card
from ms_diffsynth.training.hooks import publish
from ms_diffsynth.training.logger import ModelLogger

NAME = "writer/planted"


def hf(number: int) -> str:
    return f"hf_PlantedPlantedPlanted{number:04d}"


def opaque(number: int) -> str:
    return f"{number:04d}-nothing-to-see"  # known to be secret by where it is, not by its form


PLANTS = {
    # what the environment holds: hidden by value, wherever it turns up
    "environment HF_TOKEN": hf(1), "environment HUGGING_FACE_HUB_TOKEN": opaque(2),
    "environment MODELSCOPE_API_TOKEN": opaque(3), "environment AWS_SECRET_ACCESS_KEY": "0004/no+thing/to/see",
    "environment WANDB_API_KEY": opaque(5), "environment GITHUB_TOKEN": opaque(6), "environment DB_PASSWORD": opaque(7),
    "environment MY_CREDENTIALS": opaque(8), "environment SSH_PRIVATE_KEY": "0009-quo\"tes'ünï\\code",
    # addresses
    "address HF_ENDPOINT": opaque(10), "address model id": opaque(11), "address data set": opaque(12),
    "address in a prompt": opaque(13), "address with a token": opaque(14), "address redirected to": opaque(15),
    # settings, by file and by flag
    "yaml prompt": hf(16), "yaml instance_prompt": "ms-00000000-1111-2222-3333-000000000017",
    "yaml hub_token": opaque(18), "yaml unknown setting": hf(19), "yaml wrong value": hf(20),
    "flag --hub_token": opaque(21),
    "flag --token=": opaque(22), "flag unknown": hf(23), "flag wrong value": hf(24), "flag of another command": hf(25),
    "flag prompt": f"Bearer {opaque(26)}", "flag no command": hf(27), "flag of my own": opaque(28),
    # data
    "caption": hf(29), "metadata column": hf(30), "file name": hf(31), "file name that is not there": hf(32),
    "folder of the output": hf(33),
    # what fails
    "exception of a step": hf(34), "exception below it": f"password={opaque(35)}", "exception of a card": hf(36),
    "exception of a client": hf(37), "exception that was not foreseen": hf(38), "child process": hf(39),
    # libraries
    "log of httpx": hf(40), "log of huggingface_hub": f"Authorization: Bearer {opaque(41)}",
    "log with a traceback": hf(42), "log of a worker": hf(43),
    # the hub
    "body of a refusal": hf(44), "body of a fault": hf(45), "body without sense": hf(46),
    "header of a redirect": hf(47),
    # the model card
    "card command": opaque(48), "card version": hf(49), "card data set": hf(50),
}


def core(plant: str) -> str:
    """The part of a plant that is the secret."""
    return PLANTS[plant].removeprefix("Bearer ").removeprefix("password=").removeprefix("Authorization: Bearer ")


def forms(secret: str) -> set[bytes]:
    """How a secret may look in a file, a log or an address."""
    texts = {secret, quote(secret, safe=""), json.dumps(secret)[1:-1], repr(secret)[1:-1], secret.replace("_", r"\_")}
    return {text.encode() for text in texts} | {base64.b64encode(secret.encode()).rstrip(b"=")[:-2]}


@pytest.fixture
def planted(monkeypatch, tmp_path):
    """The environment, a folder of pictures, a configuration, and the hub."""
    for plant, value in PLANTS.items():
        if plant.startswith("environment"):
            monkeypatch.setenv(plant.split()[1], value)
    only_this_machine(monkeypatch)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", "no-login")
    data = tmp_path / "data"
    data.mkdir()
    picture = f"{PLANTS['file name']}.png"
    Image.fromarray(np.full((16, 16, 3), 90, np.uint8)).save(data / picture)
    rows = [{"image": picture, "prompt": f"a {PLANTS['caption']}", "note": PLANTS["metadata column"]}]
    (data / "metadata.json").write_text(json.dumps(rows))
    assert main(["tiny", "toy", "toy"]) == 0
    prompt = f"x {PLANTS['yaml prompt']} https://me:{PLANTS['address in a prompt']}@h.example/a"
    prompt += f" https://h.example/?token={PLANTS['address with a token']} {PLANTS['environment SSH_PRIVATE_KEY']}"
    settings = {"model": {"family": "toy", "model_paths": "toy", "lora_rank": 2},
                "data": {"dataset_base_path": "data", "dataset_metadata_path": "data/metadata.json", "height": 16,
                         "width": 16, "instance_prompt": f"a {PLANTS['yaml instance_prompt']}"},
                "run": {"mode": "pynative", "max_train_steps": 2, "save_steps": 1, "sample_prompts": [prompt],
                        "num_inference_steps": 1, "push_to_hub": True, "hub_model_id": NAME}}
    Path("run.yaml").write_text(json.dumps(settings, ensure_ascii=False))  # JSON is YAML
    with UploadServer() as server:
        server.token = PLANTS["environment HF_TOKEN"]
        monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
        yield server


def mistakes():
    """Commands that are refused, each with a secret in what is wrong with it."""
    Path("token.yaml").write_text(f"run:\n  hub_token: {PLANTS['yaml hub_token']}\n")
    unknown, wrong = PLANTS["yaml unknown setting"], PLANTS["yaml wrong value"]
    Path("wrong.yaml").write_text(f"run:\n  {unknown}: 1\n  batch_size: {wrong}\n")
    rows = [{"image": f"{PLANTS['file name that is not there']}.png", "prompt": "a"}]
    Path("absent.json").write_text(json.dumps(rows))
    return [
        ["train", "token.yaml"], ["train", "wrong.yaml"], ["describe", "wrong.yaml"],
        ["train", "run.yaml", "--hub_token", PLANTS["flag --hub_token"]],
        ["train", "run.yaml", f"--token={PLANTS['flag --token=']}"],
        ["train", "run.yaml", "--no_such_flag", PLANTS["flag unknown"]],
        ["train", "run.yaml", "--lora_rank", PLANTS["flag wrong value"]],
        ["sample", "toy", "toy", "--prompt", "a", "--height", PLANTS["flag of another command"]],
        [PLANTS["flag no command"]],
        ["train", "run.yaml", "--dataset_metadata_path", "absent.json"],
        ["train", "run.yaml", "--dataset_base_path", f"https://me:{PLANTS['address data set']}@h.example/data"],
        ["train", "run.yaml", "--model_paths", "null", "--model_id_with_origin_paths",
         f"https://me:{PLANTS['address model id']}@h.example/m:vae/"],
    ]


def library_logs():
    """What libraries log while a run is going on, one of them in a thread, one to a handler of its own."""
    logging.getLogger("httpx").warning("HTTP Request: GET https://h.example/x?a=%s", PLANTS["log of httpx"])
    logging.getLogger("huggingface_hub").warning("curl -H '%s'", PLANTS["log of huggingface_hub"])
    logging.getLogger("loader").error("row 3 failed: %s", PLANTS["log of a worker"])
    library = logging.getLogger("library")
    library.handlers = [logging.StreamHandler()]  # as mindone does when it is imported, in the middle of a command
    try:
        raise OSError(PLANTS["log with a traceback"])
    except OSError:
        library.exception("failed")


def run_that_ends(hub, monkeypatch):
    """A run whose card fails once and whose uploads meet every kind of answer before one arrives."""
    answers = [
        {"status": 503, "body": json.dumps({"error": PLANTS["body of a fault"]}).encode()},
        {"status": 302, "headers": {"Location": f"http://127.0.0.1:9/?token={PLANTS['address redirected to']}",
                                    "X-Error-Message": PLANTS["header of a redirect"]}},
        {"status": 200, "body": PLANTS["body without sense"].encode()},
        {"status": 403, "body": json.dumps({"error": PLANTS["body of a refusal"]}).encode()},
    ]
    for answer in answers:
        hub.fail("POST /api/repos/create", **answer)
    cards = iter([PLANTS["exception of a card"]])

    def card(*given, run_card=publish.run_card):
        for text in cards:
            raise ValueError(f"no {text}")
        return run_card(*given)

    def step(self, *given, on_step_end=ModelLogger.on_step_end):
        library_logs()
        while self.after_save and any(fault.times for fault in hub.faults):  # each upload meets an answer
            self.after_save()
            time.sleep(0.05)
        on_step_end(self, *given)
    with monkeypatch.context() as patched:
        patched.setattr(publish, "run_card", card)
        patched.setattr(ModelLogger, "on_step_end", step)
        patched.setattr(sys, "argv", ["ms-diffsynth", "--my_api_key", PLANTS["flag of my own"]])
        return main(["train", "run.yaml", "--output_path", f"out/{PLANTS['folder of the output']}"])


def run_that_fails(hub, monkeypatch):
    """A run whose second step fails, and whose client fails."""
    def step(self, *given, on_step_end=ModelLogger.on_step_end):
        if self.num_steps == 1:
            code = "import os, sys; sys.exit(' '.join([*os.environ.values(), sys.argv[1]]))"
            words = [sys.executable, "-X", "utf8", "-c", code, PLANTS["child process"]]
            child = subprocess.run(words, check=False, capture_output=True, encoding="utf-8")
            try:
                raise RuntimeError(f"{PLANTS['exception below it']} {child.stderr}")
            except RuntimeError as error:
                raise TrainingError(f"the forward said {PLANTS['exception of a step']} {child.stderr}") from error
        on_step_end(self, *given)

    def send(*_):
        raise RuntimeError(PLANTS["exception of a client"])
    with monkeypatch.context() as patched:
        patched.setattr(ModelLogger, "on_step_end", step)
        patched.setattr("ms_diffsynth.hub.huggingface.HuggingFace.send", send)
        words = ["train", "run.yaml", "--output_path", "out/failed", "--sample_prompts", f"x {PLANTS['flag prompt']}"]
        assert main(words) == 65
        assert main([*words, "--output_path", "out/traced", "--debug"]) == 65


def cards():
    given = {"model_id": NAME, "trained": "lora", "weights": "a.safetensors"}
    return model_card(Card(**given, command=["train.py", "--password", PLANTS["card command"]],
                           versions={"x": PLANTS["card version"]}, dataset=f"data/{PLANTS['card data set']}"))


@pytest.mark.fault
def test_of_all_planted_secrets_none_is_found(planted, monkeypatch, capfd, caplog):
    monkeypatch.setattr(logging.getLogger("huggingface_hub").handlers[0], "stream", sys.stderr)
    codes = [main(words) for words in mistakes()]
    assert all(64 <= code <= 66 for code in codes), codes
    with monkeypatch.context() as patched:
        patched.setattr(constants, "ENDPOINT", f"https://me:{PLANTS['address HF_ENDPOINT']}@h.example")
        assert main(["train", "run.yaml"]) == 69
    assert run_that_ends(planted, monkeypatch) == 0
    run_that_fails(planted, monkeypatch)
    try:
        raise KeyError(PLANTS["exception that was not foreseen"])
    except KeyError:
        sys.excepthook(*sys.exc_info())
    texts = {"the log": caplog.text.encode(), "a card": cards().encode(), "what was sent": b"\n".join(planted.sent),
             "addresses": repr(planted.requests).encode(), "messages": "\n".join(planted.messages).encode()}
    texts |= {f"commit {commit[:8]}, {name}": data for repository in planted.repositories.values()
              for commit, files in repository.commits.items() for name, data in files.items()}
    texts |= dict(zip(("stdout", "stderr"), (text.encode() for text in capfd.readouterr())))
    written = {str(path): path.read_bytes() for path in Path("out").rglob("*") if path.is_file()}
    found = {plant: [place for place, data in (texts | written).items() if any(f in data for f in forms(core(plant)))]
             for plant in PLANTS}
    found = {plant: places for plant, places in found.items() if places}
    assert len(PLANTS) >= 40 and not found, f"{len(found)} of {len(PLANTS)} planted secrets were found: {found}"
    # it was all there to be found
    out = Path("out", PLANTS["folder of the output"])
    names = {path.name for path in out.iterdir()}
    assert {"README.md", "config.yaml", "training_args.json", "events.jsonl", "step-2.safetensors"} <= names
    assert b"# planted" in texts["what was sent"] and b"Traceback" in texts["stderr"] and b"curl -H" in texts["stderr"]
    for words in ("HTTP Request", "row 3 failed", "OSError", "(503)", "connection to 127.0.0.1 failed", "(403)"):
        assert words in caplog.text, words
    told = (out / "events.jsonl").read_text() + Path("out/failed/events.jsonl").read_text()
    for reason in ("no [redacted]", "refused by", "RuntimeError: [redacted]", "the forward said [redacted]"):
        assert reason in told, reason
    for name in ("README.md", "config.yaml", "training_args.json"):
        assert "[redacted]" in (out / name).read_text(), name
