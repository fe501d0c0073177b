"""Trains a tiny model a few steps: ``python trainings.py FOLDER FAMILY DEVICE:DTYPE:MODE[:recompute] ...``.

Every run writes FOLDER/<device>-<dtype>-<mode>/loss.csv. On the stand-in the log has the marks "training step N begins"
and "training step N ends". Started by `test_training.py`; the model must be in FOLDER/model.
"""
from __future__ import annotations

import re
import sys
from pathlib import Path

import mindspore as ms

from ms_diffsynth.cli.main import main
from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.standin import mark

ROOT = Path(__file__).parents[2]
STEPS = 3
CAT = ROOT / "examples/data/dreambooth_cat_fluent"
TILES = ROOT / "examples/data/photo_tiles64"
SMILEYS = ROOT / "examples/data/smileys64"
EDITS = ROOT / "examples/data/cat_edits.csv"
CONTROLS = {"dataset_base_path": ROOT / "examples/data", "height": 128, "width": 128, "batch_size": 1,
            "dataset_metadata_path": ROOT / "examples/data/cat_controls.csv", "learning_rate": 2e-3,
            "lora_base_model": "null", "trainable_models": "controlnet", "extra_inputs": "control_image"}
# what ms-diffsynth tiny writes for some of FAMILIES
VARIANTS = {"qwen_image_edit": "edit-2511", "qwen_image_controlnet": "controlnet", "flux_controlnet": "controlnet",
            "wan_i2v": "i2v", "wan_ti2v": "ti2v"}
FILMS = {"dataset_base_path": ROOT / "examples/data", "dataset_metadata_path": Path(__file__).parent / "films.jsonl",
         "height": 64, "width": 64, "batch_size": 1, "lora_rank": 16, "learning_rate": 2e-3}
FIRST_FRAME = {"num_frames": 5, "extra_inputs": "input_image", "dataset_metadata_path": Path(__file__).parent /
               "film.jsonl"}
ROWS = {"dataset_base_path": CAT, "dataset_metadata_path": CAT / "metadata.csv", "height": 128, "width": 128,
        "batch_size": 3, "lora_rank": 16, "learning_rate": 2e-3}
FAMILIES = {
    "qwen_image": ROWS,
    "flux2": ROWS | {"max_sequence_length": 64},
    "flux2_template": {
        "dataset_base_path": TILES, "dataset_metadata_path": TILES / "train.jsonl", "height": 64, "width": 64,
        "batch_size": 2, "max_sequence_length": 24, "learning_rate": 4e-3, "extra_inputs": "template_inputs",
        "template_model_id_or_path": ROOT / "examples/flux2/templates/brightness", "trust_template_code": True,
        "trainable_models": "template_model", "remove_prefix_in_ckpt": "pipe.template_model."},
    "flux": ROWS | {"max_sequence_length": 32},
    "flux_whole": ROWS | {"max_sequence_length": 32, "batch_size": 1, "learning_rate": 1e-7,
                          "lora_base_model": "null", "trainable_models": "dit", "remove_prefix_in_ckpt": "pipe.dit."},
    "flux_edit": ROWS | {"max_sequence_length": 32, "dataset_metadata_path": EDITS,
                         "extra_inputs": "edit_image", "edit_max_pixels": 128 * 128},
    "qwen_image_edit": ROWS | {"batch_size": 1, "dataset_metadata_path": EDITS, "extra_inputs": "edit_image",
                               "edit_max_pixels": 128 * 128},
    "flux_controlnet": CONTROLS | {"max_sequence_length": 32},
    "qwen_image_controlnet": CONTROLS,
    "sd3": ROWS | {"max_sequence_length": 32},
    "z_image": ROWS,
    "sdxl": ROWS | {"lora_base_model": "unet,text_encoder_1,text_encoder_2", "snr_gamma": 5.0, "noise_offset": 0.05},
    "wan": FILMS | {"num_frames": "1,5"},
    "wan_i2v": FILMS | FIRST_FRAME,
    "wan_ti2v": FILMS | FIRST_FRAME,
    "toy": ROWS | {"height": 64, "width": 64},
    "ddpm_unet": {"dataset_base_path": SMILEYS, "dataset_metadata_path": SMILEYS / "metadata.csv", "height": 32,
                  "width": 32, "batch_size": 4, "learning_rate": 1e-3, "trainable_models": "unet",
                  "remove_prefix_in_ckpt": "pipe.unet.", "sample_count": 1, "num_inference_steps": 1},
}


def base_of(name: str) -> str:
    """The model family of one of FAMILIES."""
    return re.sub("_(template|whole|edit|controlnet|i2v|ti2v)$", "", name)


def train(folder: Path, family: str, device: str, dtype: str, mode: str, recompute: str = "") -> int:
    """One training by the command line, from the same draws and rows whatever the device."""
    settings = FAMILIES[family] | {
        "family": base_of(family), "model_paths": folder / "model",
        "max_train_steps": STEPS, "lr_warmup_steps": 1, "device": device, "dtype": dtype, "mode": mode,
        "output_path": folder / f"{device}-{dtype}-{mode}{recompute}",
        "use_gradient_checkpointing": str(bool(recompute)).lower()}
    return main(["train", *(f"--{name}={value}" for name, value in settings.items())])


def mark_steps() -> None:
    """Let every training step be marked in the log, with the device idle at both ends."""
    call, count = CompiledStep.__call__, {}

    def marked(self: CompiledStep, *tensors: ms.Tensor) -> object:
        count[id(self)] = number = count.get(id(self), 0) + 1
        ms.runtime.synchronize()
        mark(f"{self.name} {number} begins")
        try:
            return call(self, *tensors)
        finally:
            ms.runtime.synchronize()
            mark(f"{self.name} {number} ends")

    CompiledStep.__call__ = marked


if __name__ == "__main__":
    mark_steps()
    for run in sys.argv[3:]:
        if code := train(Path(sys.argv[1]), sys.argv[2], *run.split(":")):
            sys.exit(code)
