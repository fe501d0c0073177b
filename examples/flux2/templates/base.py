"""Model folders on the way to a trained tiny base: put statistics, or trained weights, into a copy of one.

    ms-diffsynth tiny flux2 models/flux2-tiny
    python examples/flux2/templates/base.py normalise models/flux2-tiny examples/data/photo_tiles64 models/tiles-new
    ms-diffsynth train examples/flux2/templates/base.yaml
    python examples/flux2/templates/base.py insert models/tiles-new runs/tiles-base/step-500.safetensors models/tiles
"""
from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from ms_diffsynth import Flux2ImagePipeline, load_state_dict, run_main, save_state_dict

WEIGHTS = "diffusion_pytorch_model.safetensors"


def with_weights(model: Path, component: str, weights: dict[str, np.ndarray], output: Path) -> None:
    """Copy a model folder to ``output``, which must not exist, with ``weights`` over those of one component."""
    known = load_state_dict(model / component / WEIGHTS)
    shutil.copytree(model, output)
    save_state_dict(output / component / WEIGHTS, known | weights)


def normalise(model: Path, folder: Path, output: Path) -> None:
    """Set the statistics of the VAE's batch norm, so that each channel of the images' latents has mean 0, variance 1.

    FLUX.2 ships such statistics; those of a tiny VAE with random weights are ones.
    """
    pipe = Flux2ImagePipeline.from_pretrained(str(model))
    encode = [unit for unit in pipe.units if unit.name in ("load_pixels", "encode_image")]
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    images = [Image.open(folder / row["image"]) for row in rows]
    moments = np.concatenate([pipe.run(encode, {"input_image": image})["moments"].asnumpy() for image in images])
    latents = moments[:, :moments.shape[1] // 2]  # normalised with the present statistics
    mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
    old = load_state_dict(model / "vae" / WEIGHTS)
    scale = old["bn.running_var"] + json.loads((model / "vae/config.json").read_text())["batch_norm_eps"]
    with_weights(model, "vae", {"bn.running_mean": old["bn.running_mean"] + mean * np.sqrt(scale),
                                "bn.running_var": variance * scale}, output)
    print(f"{output}: latents of {len(rows)} images had means of {mean.min():.2f} to {mean.max():.2f} and standard "
          f"deviations of {variance.min() ** 0.5:.2f} to {variance.max() ** 0.5:.2f}; now 0 and 1")


def insert(model: Path, checkpoint: Path, output: Path) -> None:
    """Put a trained transformer into a copy of the model it was trained from."""
    with_weights(model, "transformer", load_state_dict(checkpoint), output)
    print(f"{output}: the transformer of {checkpoint}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("normalise", "insert"))
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("source", type=Path, help="folder of images to normalise for, or a checkpoint to insert")
    parser.add_argument("output", type=Path, help="new folder")
    args = parser.parse_args()
    {"normalise": normalise, "insert": insert}[args.action](args.model, args.source, args.output)


if __name__ == "__main__":
    sys.exit(run_main(main))
