"""A ControlNet that is trained here, read by diffusers: what both compute of the same inputs.

    python tests/formats/elsewhere/controlnet.py OUT      here: trains two steps of a tiny one for each family
    python tests/formats/elsewhere/controlnet.py OUT      with diffusers: loads it from the run's model/ folder

The second prints the largest difference of any sample for the transformer's blocks, and how large these are.
"""
from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

FAMILIES = {"flux": ("--controlnet_single_layers", "1"), "qwen_image": ()}
SIDE, TEXT, BATCH = 4, 5, 2  # tokens of a side of the image, and of the text
TRAIN = ("--extra_inputs", "control_image", "--max_sequence_length", "8", "--mode", "pynative", "--device", "CPU",
         "--batch_size", "2", "--num_epochs", "2", "--height", "32", "--width", "32", "--controlnet", "new",
         "--controlnet_layers", "1", "--trainable_models", "controlnet", "--learning_rate", "1e-2")


def write(family: str, out: Path) -> None:
    """A run in ``out/run``, and in ``out/case.npz`` what its ControlNet makes of random inputs."""
    from mindspore import Tensor
    from PIL import Image

    from ms_diffsynth import runtime
    from ms_diffsynth.registry import family as family_of

    random = np.random.default_rng(0)
    (out / "rows").mkdir(parents=True)
    for k in range(2):
        for name in ("image", "control"):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(out / f"rows/{name}{k}.png")
    rows = [{"image": f"image{k}.png", "prompt": "a cat", "control_image": f"control{k}.png"} for k in range(2)]
    (out / "rows/rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    family_of(family).write_tiny(out / "tiny", 0)
    subprocess.run([sys.executable, "-m", "ms_diffsynth", "train", "--family", family, "--model_paths", out / "tiny",
                    "--dataset_base_path", out / "rows", "--dataset_metadata_path", out / "rows/rows.jsonl",
                    "--output_path", out / "run", *TRAIN, *FAMILIES[family]], check=True, stdout=subprocess.DEVNULL)

    runtime.configure("pynative", "CPU")
    net = family_of(family).pipeline.from_pretrained(str(out / "run/model")).controlnet
    config = json.loads((out / "run/model/controlnet/config.json").read_text())
    sizes = {"tokens": (SIDE**2, config["in_channels"]), "condition": (SIDE**2, config["in_channels"]),
             "text": (TEXT, config["joint_attention_dim"])}
    inputs = {name: random.standard_normal((BATCH, *size)).astype(np.float32) for name, size in sizes.items()}
    inputs["sigma"] = np.array([0.3, 0.8], np.float32)
    given, scale = {name: Tensor(array) for name, array in inputs.items()}, Tensor(np.full((BATCH, 1), 0.7, np.float32))
    if family == "flux":
        inputs["pooled"] = random.standard_normal((BATCH, config["pooled_projection_dim"])).astype(np.float32)
        inputs["ids"] = np.array([(0, y, x) for y in range(SIDE) for x in range(SIDE)], np.float32)
        samples = sum(net(given["tokens"], given["condition"], Tensor(np.zeros((BATCH, 1), np.int32)), scale,
                          given["sigma"], Tensor(np.full(BATCH, 3.5, np.float32)), Tensor(inputs["pooled"]),
                          given["text"], Tensor(inputs["ids"])), ())
    else:
        from ms_diffsynth.pipelines.qwen_image.rotary import image_table

        cos, sin = image_table(TEXT, SIDE, SIDE, tuple(config["axes_dims_rope"]))
        samples = net(given["tokens"], given["condition"], scale, given["sigma"], given["text"], cos, sin,
                      Tensor(np.ones((BATCH, TEXT), np.float32)))
    np.savez(out / "case.npz", **inputs, **{f"sample{k}": array.asnumpy() for k, array in enumerate(samples)})


def read(family: str, out: Path) -> None:
    import diffusers
    import torch

    case = {name: torch.from_numpy(array) for name, array in np.load(out / "case.npz").items()}
    cls = {"flux": diffusers.FluxControlNetModel, "qwen_image": diffusers.QwenImageControlNetModel}[family]
    net = cls.from_pretrained(out / "run/model/controlnet").eval()
    how = {"hidden_states": case["tokens"], "controlnet_cond": case["condition"], "conditioning_scale": 0.7,
           "timestep": case["sigma"], "encoder_hidden_states": case["text"], "return_dict": False}
    if family == "flux":
        how |= {"pooled_projections": case["pooled"], "img_ids": case["ids"], "txt_ids": torch.zeros(TEXT, 3),
                "guidance": torch.full((BATCH,), 3.5)}
    else:
        how |= {"encoder_hidden_states_mask": torch.ones(BATCH, TEXT, dtype=torch.long),
                "img_shapes": [[(1, SIDE, SIDE)]] * BATCH}
    with torch.no_grad():
        made = net(**how)
    samples = sum((tuple(kind or ()) for kind in made), ()) if family == "flux" else tuple(made)
    samples = samples[0] if isinstance(samples[0], (list, tuple)) else samples
    ours = [case[f"sample{k}"] for k in range(len(samples))]
    worst = max(float((a - b).abs().max()) for a, b in zip(samples, ours, strict=True))
    most = max(float(a.abs().max()) for a in ours)
    print(f"diffusers {diffusers.__version__} {family:12} {len(ours)} samples, largest difference {worst:.1e} of up to "
          f"{most:.1e}", flush=True)


if __name__ == "__main__":
    is_here = importlib.util.find_spec("mindspore") is not None
    for family in FAMILIES:
        folder = Path(sys.argv[1]) / family
        if not is_here:
            read(family, folder)
        elif not folder.exists():
            write(family, folder)
