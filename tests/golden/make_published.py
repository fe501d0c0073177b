"""Names and shapes of published transformers and ControlNets, by diffusers on torch's meta device: published.json.

    TORCH_ENV/bin/python tests/golden/make_published.py .venv/bin/python  # torch 2.13, diffusers 0.42.1; no downloads

The settings are those of ms_diffsynth/pipelines/*/published.py. ``digest`` is the SHA-256 of the lines "name shape
dtype", sorted; the dtype is the one that a run in bfloat16 keeps, bfloat16 but for FLOAT32. ``diffsynth`` is the hash
of names and shapes by which DiffSynth-Studio tells published files apart (diffsynth/core/loader/file.py,
hash_model_file), computed here; ``is_known`` says that its model_configs.py (commit fed7b18f, 2026-08-20; for Z-Image
000ba473) lists that hash, so that the published files have these names and shapes.
"""
from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path

import diffusers
import torch

HERE = Path(__file__).parent
FAMILIES = ("flux", "flux2", "qwen_image", "sdxl", "wan", "z_image")
NETWORKS = {"sdxl": "unet"}  # the others' is called dit
FLOAT32 = {"wan": ("time_embedder.", "scale_shift_table"), "z_image": ("t_embedder.",)}  # parts of names
KNOWN = {"605c56eab23e9e2af863ad8f0813a25d", "d38e1d5c5aec3b0a11e79327ac6e3b0f", "3bde7b817fec8143028b6825a63180df",
         "39c6fc48f07bebecedbbaa971ff466c8", "0319a1cb19835fb510907dd3367c95ff", "fc3a8a1247fe185ce116ccbe0e426c28"}


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Of the state that diffusers' class of this configuration has."""
    arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if not k.startswith("_")}
    with torch.device("meta"):
        network = getattr(diffusers, config["_class_name"])(**arguments)
    return {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def entry(config: dict, float32: tuple[str, ...]) -> dict:
    found = shapes(config)
    lines = sorted(f"{name} {list(shape)} {'float32' if any(part in name for part in float32) else 'bfloat16'}"
                   for name, shape in found.items())
    keys = sorted(k for name, shape in found.items() for k in (f"{name}:{'_'.join(map(str, shape))}", name))
    known = hashlib.md5(",".join(keys).encode()).hexdigest()
    return {"tensors": len(found), "parameters": sum(math.prod(shape) for shape in found.values()),
            "digest": hashlib.sha256("\n".join(lines).encode()).hexdigest(), "diffsynth": known,
            "is_known": known in KNOWN}


def networks(family: str) -> dict[str, dict]:
    """The settings of its published transformers and ControlNets, read by the environment of this package."""
    network = NETWORKS.get(family, "dit")
    code = (f"import json; from ms_diffsynth.pipelines.{family} import published as p; "
            f"found = {{n: c['{network}'] for n, c in p.PUBLISHED.items()}} | getattr(p, 'CONTROLNETS', {{}}); "
            "print(json.dumps(found))")
    done = subprocess.run([sys.argv[1], "-c", code], check=True, capture_output=True, text=True, cwd=HERE.parents[1])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    result = {}
    for family in FAMILIES:
        for model, config in networks(family).items():
            result[f"{family}:{model}"] = entry(config, FLOAT32.get(family, ()))
    (HERE / "published.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
