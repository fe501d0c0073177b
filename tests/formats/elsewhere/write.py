"""Write tiny models, LoRAs for them in every layout, and images with and without, for read_by_diffusers.py and
read_by_mindone.py.

    python tests/formats/elsewhere/write.py OUT [MODEL ...]

Of each model of MODELS in OUT/<model>: model/, lora-<layout>.safetensors, expected.safetensors (module -> change of its
weight), given.safetensors (noise, and what is prepared of the prompt), images.safetensors (uint8 [64, 64, 3], of Wan
[frames, 64, 64, 3]), and run/model/, what a run of the whole network leaves. Of edit models there are no images: the
networks are those of the models without "edit" and "kontext" in their names, and read by other pipelines.
"""
from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from mindspore import Tensor

from ms_diffsynth import DiffusionTrainingModule, runtime
from ms_diffsynth.draws import Draws
from ms_diffsynth.formats.adapters import LORA, A, B
from ms_diffsynth.formats.lora import AdapterFile, save_adapters
from ms_diffsynth.formats.weights import save_state_dict
from ms_diffsynth.nn.adapters.layer import linear_modules
from ms_diffsynth.pipelines.shared.video import VideoPipeline
from ms_diffsynth.registry import family, interchange

MODELS = {  # -> family and variant of its tiny model
    "flux": ("flux", ""), "flux2": ("flux2", ""), "qwen_image": ("qwen_image", ""), "sd3": ("sd3", ""),
    "sdxl": ("sdxl", ""), "wan": ("wan", ""), "z_image": ("z_image", ""), "flux_kontext": ("flux", ""),
    "qwen_image_edit": ("qwen_image", "edit"),
    "qwen_image_edit_2511": ("qwen_image", "edit-2511")}
SIDE, FRAMES, STEPS, SEED, PROMPT = 64, 5, 4, 7, "a red cat by the sea"


def write(model: str, out: Path) -> None:
    name, variant = MODELS[model]
    if not (out / "model").exists():
        known = family(name)
        (known.tiny_variants[variant] if variant else known.write_tiny)(out / "model", 0)
    if model == "flux_kontext":  # FLUX.1's networks, in another pipeline
        index = json.loads((out / "model/model_index.json").read_text())
        (out / "model/model_index.json").write_text(json.dumps(index | {"_class_name": "FluxKontextPipeline"}))
    cls, table, random = family(name).pipeline, interchange(name), np.random.default_rng(1)
    pipe = cls.from_pretrained(str(out / "model"))
    modules = {m: cell.weight.shape for m, cell in linear_modules(getattr(pipe, pipe.network)).items()
               if m.endswith(cls.lora_target_modules)}
    parts = {m: {A: random.standard_normal((4, shape[1]), np.float32) / 4,
                 B: random.standard_normal((shape[0], 4), np.float32) / 4} for m, shape in modules.items()}
    file = AdapterFile(parts, dict.fromkeys(parts, 0.5), dict.fromkeys(parts, LORA))
    save_state_dict(out / "expected.safetensors", {m: 0.5 * p[B] @ p[A] for m, p in parts.items()})
    for layout in table.columns:
        save_adapters(out / f"lora-{layout}.safetensors", {table.network: file}, table, layout)
    told = ""
    if model == name:
        told = f", the LoRA changes a pixel by up to {write_images(pipe, table, out)} of 255"
    module = DiffusionTrainingModule()
    module.pipe = cls.from_pretrained(str(out / "model"))
    module.switch_pipe_to_training_mode(module.pipe, trainable_models=pipe.network)
    module.save_models(out / "run")
    print(f"{model}: {len(modules)} layers{told}", flush=True)


def write_images(pipe, table, out: Path) -> int:
    """An image with and one without the LoRA, and what they are made of. Returns: the largest difference."""
    how = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "cfg_scale": 1.0, "seed": SEED}
    film = (FRAMES,) if isinstance(pipe, VideoPipeline) else ()
    how |= {"num_frames": FRAMES} if film else {}
    told = {"guidance": Tensor(np.full(1, pipe.sampling.embedded_guidance, np.float32))} if pipe.takes_guidance else {}
    slots = {k: v.asnumpy() for k, v in pipe.condition(PROMPT, **told).items() if k.startswith(("prompt", "pooled"))}
    noise = Draws(SEED).normal("latents", np.array([0]), pipe.latent_shape(*film, SIDE, SIDE))
    save_state_dict(out / "given.safetensors", {"noise": noise, **slots})
    images = {"without": np.stack(pipe(PROMPT, **how)) if film else np.asarray(pipe(PROMPT, **how))}
    pipe.load_lora(None, out / f"lora-{table.default}.safetensors")
    images["with"] = np.stack(pipe(PROMPT, **how)) if film else np.asarray(pipe(PROMPT, **how))
    save_state_dict(out / "images.safetensors", images)
    return int(np.abs(images["with"].astype(int) - images["without"]).max())


if __name__ == "__main__":
    runtime.configure("pynative", "CPU")
    for name in sys.argv[2:] or MODELS:
        write(name, Path(sys.argv[1]) / name)
