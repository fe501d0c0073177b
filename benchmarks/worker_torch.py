"""What is measured, on diffusers' networks in PyTorch, eager or by torch.compile. Needs its own environment.

    python worker_torch.py WORKLOAD WEIGHTS eager|compile
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import common
import diffusers
import torch
from common import BATCH, SIDE
from safetensors.torch import load_file

CLASSES = {"flux": "FluxTransformer2DModel", "flux2": "Flux2Transformer2DModel", "sd3": "SD3Transformer2DModel",
           "qwen_image": "QwenImageTransformer2DModel", "ddpm": "UNet2DModel", "sdxl": "UNet2DConditionModel",
           "z_image": "ZImageTransformer2DModel", "wan": "WanTransformer3DModel", "vae": "AutoencoderKL"}


def network(workload: common.Workload, weights: Path) -> torch.nn.Module:
    model = getattr(diffusers, CLASSES[workload.network])(**workload.config)
    loaded = model.load_state_dict(load_file(weights), strict=False)
    if loaded.unexpected_keys or [name for name in loaded.missing_keys if "pos_embed" not in name]:
        raise SystemExit(f"the weights do not fit: {loaded}")
    return model


def predict(name: str, model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    if name == "vae":
        return model.encode(**batch, return_dict=False)[0].parameters
    if name == "z_image":
        answers = model(list(batch["x"].unsqueeze(2)), 1 - batch["t"], list(batch["cap_feats"]), return_dict=False)[0]
        return -torch.stack(answers).squeeze(2)
    if name == "wan":
        batch = batch | {"timestep": 1000 * batch["timestep"]}
    if name == "sdxl":
        added = {key: batch[key] for key in ("text_embeds", "time_ids")}
        batch = {key: batch[key] for key in batch if key not in added} | {"added_cond_kwargs": added}
    if name == "qwen_image":
        batch = batch | {"encoder_hidden_states_mask": None, "img_shapes": [[(1, SIDE, SIDE)]] * BATCH}
    if name == "flux2":
        text = batch["encoder_hidden_states"].shape[1]
        batch = batch | {"txt_ids": torch.cartesian_prod(*map(torch.arange, (1, 1, 1, text))),
                         "img_ids": torch.cartesian_prod(*map(torch.arange, (1, SIDE, SIDE, 1)))}
    return model(**batch, return_dict=False)[0]


def add_lora(model: torch.nn.Module, targets: tuple[str, ...]) -> None:
    from peft import LoraConfig

    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=common.RANK, lora_alpha=common.RANK, target_modules=list(targets)))
    with torch.no_grad():
        for name, layer in model.named_modules():
            if hasattr(layer, "lora_A"):
                a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                for weight, array in zip((a, b), common.lora(name, b.shape[0], a.shape[1])):
                    weight.copy_(torch.from_numpy(array))


def build(workload: common.Workload, weights: Path) -> Callable[[], float]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = network(workload, weights)
    batch = {key: torch.from_numpy(array) for key, array in common.inputs(workload.network).items()}
    if workload.trains == "lora":
        add_lora(model, workload.targets)

    def called(inputs):
        return predict(workload.network, model, inputs)

    if sys.argv[3] == "compile":
        called = torch.compile(called)
    if not workload.trains:
        model.eval()

        def of(*inputs):
            with torch.no_grad():
                return called(dict(zip(batch, inputs)))

        return lambda: common.forward(of, tuple(batch.values()), torch.from_numpy, workload.repeats)
    model.train()
    target = batch.pop("target")
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=common.LEARNING_RATE, betas=common.BETAS, eps=common.EPS,
                                  weight_decay=common.WEIGHT_DECAY)

    def step() -> float:
        optimizer.zero_grad(set_to_none=True)
        loss = ((called(batch) - target) ** 2).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, common.MAX_GRAD_NORM)
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    common.serve(build)
