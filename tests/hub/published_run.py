"""What the tests of publishing share: the folder of a run with private files, and a machine without a login."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from hub_server import only_this_machine
from huggingface_hub import constants
from upload_server import MODELSCOPE_TOKEN, TOKEN

from ms_diffsynth.formats.weights import save_state_dict

NAME = "writer/model"
PUBLIC = {
    "README.md": b"---\nlicense: apache-2.0\n---\n# model\n", "samples/step-2.png": b"\x89PNG picture",
    "transformer/config.json": b'{"_class_name": "X"}', "model.py": b"TEMPLATE_MODEL = object\n",
    "tokenizer/tokenizer.json": b'{"secret": 123456}', "tokenizer/special_tokens_map.json": b"{}",
}
KEPT = {
    ".env": b"kept-1", "secrets.json": b"kept-2", "optimizer.safetensors": b"kept-3", "state.json": b"kept-4",
    ".cache/huggingface/token": b"kept-5", "transformer/optimizer_state.safetensors": b"kept-6", "loss.csv": b"kept-7",
    "transformer/.hidden.json": b"kept-8", "events.jsonl": b"kept-9", "config.yaml": b"kept-10",
    "train.log": b"kept-11",
    "token.safetensors": b"kept-12", "step-2/optimizer.safetensors": b"kept-13", "key.pem": b"kept-14",
}


def write_run(tmp_path: Path) -> Path:
    """The folder of a run: what may be seen, and what may not."""
    folder = tmp_path / "run"
    for name, data in {**PUBLIC, **KEPT}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    save_state_dict(folder / "step-2.safetensors", {"a": np.arange(50_000, dtype=np.float32)})
    save_state_dict(folder / "transformer/diffusion_pytorch_model.safetensors", {"b": np.ones(3, np.float32)})
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "config.json").write_bytes(b"kept-15")
    (folder / "config.json").symlink_to(outside / "config.json")
    (folder / "vae").symlink_to(outside)
    return folder


def without_a_login(monkeypatch, tmp_path: Path) -> None:
    """No waiting, no login, no network but this machine's."""
    only_this_machine(monkeypatch)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))
    monkeypatch.setenv("MODELSCOPE_HOME", str(tmp_path / "no-login"))
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", MODELSCOPE_TOKEN)


def expected(folder):
    weights = ["step-2.safetensors", "transformer/diffusion_pytorch_model.safetensors"]
    return PUBLIC | {name: (folder / name).read_bytes() for name in weights}


def held(server, name=NAME):
    return {n: data for n, data in server.files(name).items() if n != ".gitattributes"}


def staging(folder):
    return [path.name for path in folder.iterdir() if path.name.startswith(".upload")]
