"""Write the trained model as it ships: a folder that diffusers loads, in float16.

    python examples/emoji_flux/export.py models/emoji-flux runs/emoji-flux/step-25000-ema.safetensors emoji-flux

The first folder is that of make_model.py: configurations, tokenizers, the trained VAE; the file holds what base.yaml
trained, by the names ``pipe.<model>.<weight>``.
"""
from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np

from ms_diffsynth.formats.weights import open_checkpoint, save_sharded
from ms_diffsynth.models import read_config
from ms_diffsynth.pipelines.flux.pipeline import COMPONENTS

CARD = Path(__file__).with_name("model_card.md")
LARGEST = 24 * 10**6  # bytes of all weights


def main(base: Path, trained: Path, folder: Path) -> None:
    shutil.copytree(base, folder, dirs_exist_ok=True)
    new, size = open_checkpoint(trained), 0
    for component in (c for c in COMPONENTS if not c.is_tokenizer):
        old = open_checkpoint(base / component.folder)
        names = {name: f"pipe.{component.name}.{name}" for name in old.shapes}
        given = {name: new[key] if key in new.shapes else old[name] for name, key in names.items()}
        weights = {name: np.asarray(array, np.float32).astype(np.float16) for name, array in given.items()}
        if not all(np.isfinite(array).all() for array in weights.values()):
            raise SystemExit(f"{component.name}: a weight is too large for float16")
        stem = "model" if "encoder" in component.folder else "diffusion_pytorch_model"
        save_sharded(folder / component.folder, weights, stem=stem, config=read_config(base / component.folder),
                     replace=True)
        bytes_ = sum(array.nbytes for array in weights.values())
        size += bytes_
        source = trained if any(key in new.shapes for key in names.values()) else base
        print(f"{component.folder}: {bytes_ / 1e6:.1f} MB, from {source}")
    shutil.copy(CARD, folder / "README.md")
    print(f"{size / 1e6:.1f} MB of weights")
    if size > LARGEST:
        raise SystemExit(f"more than {LARGEST / 1e6:.0f} MB: make the networks smaller")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", type=Path)
    parser.add_argument("trained", type=Path)
    parser.add_argument("folder", type=Path)
    main(**vars(parser.parse_args()))
