"""Write tiny models, LoRAs for them in every layout, and images with and without, for read_by_diffusers.py.

    python tests/formats/elsewhere/write.py OUT [FAMILY ...]

Of each family in OUT/<family>: model/, lora-<layout>.safetensors, expected.safetensors (module -> change of its
weight), given.safetensors (noise, and what is prepared of the prompt), images.safetensors (uint8 [64, 64, 3]), and
run/model/, what a run of the whole network leaves.
"""
from __future__ import annotations

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
from ms_diffsynth.registry import family, interchange

FAMILIES = ("flux", "flux2", "qwen_image", "sd3")
SIDE, STEPS, SEED, PROMPT = 64, 4, 7, "a red cat by the sea"


def write(name: str, out: Path) -> None:
    if not (out / "model").exists():
        family(name).write_tiny(out / "model", 0)
    cls, table, random = family(name).pipeline, interchange(name), np.random.default_rng(1)
    pipe = cls.from_pretrained(str(out / "model"))
    modules = {m: cell.weight.shape for m, cell in linear_modules(pipe.dit).items()
               if m.endswith(cls.lora_target_modules)}
    parts = {m: {A: random.standard_normal((4, shape[1]), np.float32) / 4,
                 B: random.standard_normal((shape[0], 4), np.float32) / 4} for m, shape in modules.items()}
    file = AdapterFile(parts, dict.fromkeys(parts, 0.5), dict.fromkeys(parts, LORA))
    save_state_dict(out / "expected.safetensors", {m: 0.5 * p[B] @ p[A] for m, p in parts.items()})
    for layout in table.columns:
        save_adapters(out / f"lora-{layout}.safetensors", {table.network: file}, table, layout)
    how = {"height": SIDE, "width": SIDE, "num_inference_steps": STEPS, "cfg_scale": 1.0, "seed": SEED}
    told = {"guidance": Tensor(np.full(1, pipe.sampling.embedded_guidance, np.float32))} if pipe.takes_guidance else {}
    slots = {k: v.asnumpy() for k, v in pipe.condition(PROMPT, **told).items() if k.startswith(("prompt", "pooled"))}
    noise = Draws(SEED).normal("latents", np.array([0]), pipe.latent_shape(SIDE, SIDE))
    save_state_dict(out / "given.safetensors", {"noise": noise, **slots})
    images = {"without": np.asarray(pipe(PROMPT, **how))}
    pipe.load_lora(None, out / f"lora-{table.default}.safetensors")
    images["with"] = np.asarray(pipe(PROMPT, **how))
    save_state_dict(out / "images.safetensors", images)
    changed = np.abs(images["with"].astype(int) - images["without"]).max()
    module = DiffusionTrainingModule()
    module.pipe = cls.from_pretrained(str(out / "model"))
    module.switch_pipe_to_training_mode(module.pipe, trainable_models="dit")
    module.save_models(out / "run")
    print(f"{name}: {len(modules)} layers, the LoRA changes a pixel by up to {changed} of 255", flush=True)


if __name__ == "__main__":
    runtime.configure("pynative", "CPU")
    for name in sys.argv[2:] or FAMILIES:
        write(name, Path(sys.argv[1]) / name)
