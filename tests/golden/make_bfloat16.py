"""What PyTorch itself is off by in bfloat16, written into the case.json of cases whose networks are deep.

    TORCH_ENV/bin/python tests/golden/make_bfloat16.py tests/golden/sdxl tests/golden/z_image   # diffusers 0.39

The first evaluation is repeated with the network in bfloat16. ``bfloat16.value`` and ``bfloat16.gradient`` are the
differences of the prediction and of all gradients from the float32 that is recorded, in the Euclidean norm.
"""
from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel, ZImageTransformer2DModel
from safetensors.torch import load_file

Tensors = dict[str, torch.Tensor]


def sdxl(folder: Path, given: Tensors, noisy: torch.Tensor) -> tuple[torch.nn.Module, Callable, str]:
    """The network, how it is called in a dtype, and what its result is called in the case."""
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")

    def predict(dtype: torch.dtype) -> torch.Tensor:
        added = {"text_embeds": given["pooled_prompt_embeds"].to(dtype), "time_ids": given["add_time_ids"]}
        return unet(noisy.to(dtype), given["timestep_index"][0], given["prompt_embeds"].to(dtype),
                    added_cond_kwargs=added).sample

    return unet, predict, "noise_pred"


def z_image(folder: Path, given: Tensors, noisy: torch.Tensor) -> tuple[torch.nn.Module, Callable, str]:
    dit = ZImageTransformer2DModel.from_pretrained(folder / "transformer")
    lengths = given["prompt_embeds_mask"].sum(1).int().tolist()
    time = 1 - given["grid.sigmas"][given["timestep_index"][0]]

    def predict(dtype: torch.dtype) -> torch.Tensor:
        prompts = [row[:n].to(dtype) for row, n in zip(given["prompt_embeds"], lengths)]
        found = dit([row[:, None].to(dtype) for row in noisy], time, prompts, return_dict=False)[0]
        return -torch.stack(list(found))[:, :, 0]

    return dit, predict, "velocity"


def main(folder: Path) -> None:
    file = folder / "case.json"
    info = json.loads(file.read_text())
    given, expected = load_file(folder / "inputs.safetensors"), load_file(folder / "expected.safetensors")
    network, predict, name = {"sdxl": sdxl, "z_image": z_image}[info["family"]](folder, given,
                                                                               expected["noisy_latents"])
    noise = given["noise"][0]
    target, weights = noise, torch.ones(len(noise))
    if name == "velocity":
        target, weights = noise - expected["input_latents"], given["grid.weights"][given["timestep_index"][0]]
    for dtype in (torch.float32, torch.bfloat16):
        network.to(dtype).zero_grad()
        found = predict(dtype).float()
        (((found - target) ** 2).flatten(1).mean(1) * weights).mean().backward()
        gradients = {f"grad.{n}": p.grad.float() for n, p in network.named_parameters()}
        pairs = [(g if g.ndim < 2 else g[:: info.get("row_stride", 1) * info.get("row_strides", {}).get(n[5:], 1)],
                  expected[n]) for n, g in gradients.items()]
        errors = {"value": off([(found.detach(), expected[name])]), "gradient": off(pairs)}
        print(folder.name, dtype, errors)
        assert dtype == torch.bfloat16 or max(errors.values()) < 1e-4, "not the network of the case"
    info["bfloat16"] = {kind: float(f"{error:.2g}") for kind, error in errors.items()}
    file.write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")


def off(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> float:
    difference = sum((a.double() - b.double().reshape(a.shape)).square().sum() for a, b in pairs)
    return float((difference / sum(b.double().square().sum() for _, b in pairs)).sqrt())


if __name__ == "__main__":
    torch.set_num_threads(1)
    for case in sys.argv[1:]:
        main(Path(case))
