"""Records what peft makes of a DoRA: outputs, gradients and updates, into ``dora/case.npz``.

    python tests/golden/make_dora.py        # in an environment with torch and peft; 2026: torch 2.13.0, peft 0.21.2

Two linear layers, one with and one without a bias, alpha / r = 1.5, A, B and m away from their start, all float32.
"""
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model

RANK, ALPHA, RATE, STEPS = 4, 6, 0.05, 3


def main() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 8, bias=False))
    case = {f"base.{name}": p.detach().clone() for name, p in model.named_parameters()}
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, use_dora=True, target_modules=["0", "2"])
    model = inject_adapter_in_model(config, model)
    names = {name: short(name) for name, p in model.named_parameters() if p.requires_grad}
    case |= {f"start.{names[n]}": p.detach().clone() for n, p in model.named_parameters() if n in names}
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name in names:
                p += 0.3 * torch.randn(p.shape)
                case[f"given.{names[name]}"] = p.detach().clone()
    x, target = torch.randn(2, 5, 12), torch.randn(2, 5, 8)
    case |= {"x": x, "target": target}
    x.requires_grad_()
    out = model(x)
    loss = ((out - target) ** 2).mean()
    loss.backward()
    case |= {"out": out, "loss": loss, "grad.x": x.grad.clone()}
    case |= {f"grad.{names[n]}": p.grad.clone() for n, p in model.named_parameters() if n in names}
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n in names], lr=RATE)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = ((model(x) - target) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    case["losses"] = torch.stack(losses)
    case |= {f"trained.{names[n]}": p for n, p in model.named_parameters() if n in names}
    for place in ("0", "2"):
        model[int(place)].merge()
        case[f"merged.{place}"] = model[int(place)].base_layer.weight
    case |= {"rank": torch.tensor(RANK), "alpha": torch.tensor(ALPHA), "rate": torch.tensor(RATE)}
    path = Path(__file__).with_name("dora") / "case.npz"
    np.savez_compressed(path, **{name: tensor.detach().numpy() for name, tensor in case.items()})


def short(name: str) -> str:
    """The name in files: ``0.lora_A.weight``, ``0.lora_magnitude_vector``."""
    return name.replace(".default", "").replace("magnitude_vector.weight", "magnitude_vector")


if __name__ == "__main__":
    main()
