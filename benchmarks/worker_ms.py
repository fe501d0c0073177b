"""One training step of mindone's FLUX or UNet: by ms_diffsynth (graph, pynative), or by mindone's own TrainStep.

    python worker_ms.py flux|ddpm WEIGHTS graph|pynative|mindone     makes steps, see common.serve
    python worker_ms.py flux|ddpm WEIGHTS write                      writes the weights that all workers load
"""
from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("GLOG_v", "3")
# the main thread makes the step itself; else it hands it to another and spins until it is done, which takes one core
os.environ.setdefault("MS_DEV_HOST_BLOCKING_RUN", "1")

import common
import mindspore as ms
import numpy as np
from mindspore import Tensor, nn
from safetensors.numpy import load_file, save_file

from ms_diffsynth import runtime
from ms_diffsynth.nn.names import assign, torch_shapes


def network(name: str, weights: Path | None) -> nn.Cell:
    if name == "ddpm":
        from ms_diffsynth.pipelines.ddpm_unet.pipeline import build_unet

        model = build_unet(common.UNET)
    else:
        from mindone.diffusers import FluxTransformer2DModel

        model = FluxTransformer2DModel(**common.FLUX)
    if weights is not None:
        assign(model, load_file(weights).items())
    return model


def squared_error(model, *batch):
    """Of a prediction and the last of ``batch``; a step's arguments have no names once it is compiled."""
    if len(batch) == 3:
        sample, timestep, target = batch
        prediction = model(sample, timestep, return_dict=False)[0]
    else:
        hidden, timestep, guidance, pooled, text, text_ids, image_ids, target = batch
        prediction = model(hidden_states=hidden, timestep=timestep, guidance=guidance, pooled_projections=pooled,
                           encoder_hidden_states=text, txt_ids=text_ids, img_ids=image_ids, return_dict=False)[0]
    return ((prediction - target) ** 2).mean()


def build_ours(name: str, weights: Path, mode: str):
    """ms_diffsynth's TrainStep and AdamW on its own blocks."""
    runtime.configure(mode, "CPU")
    from ms_diffsynth.pipelines.flux.transformer import use_own_blocks
    from ms_diffsynth.training.optim import AdamW
    from ms_diffsynth.training.step import TrainStep

    class Step(TrainStep):
        def forward(self, *batch):
            return squared_error(self.model, *batch)

    model = network(name, weights)
    if name == "flux":
        use_own_blocks(model)
    optimizer = AdamW(model.trainable_params(), common.LEARNING_RATE, common.BETAS, common.EPS, common.WEIGHT_DECAY)
    return Step(model, optimizer, max_grad_norm=common.MAX_GRAD_NORM)


def build_mindone(name: str, weights: Path):
    """mindone's TrainStep and the optimizer of its examples, in graph mode; it runs on the CPU by our kernels only."""
    runtime.configure("graph", "CPU")
    ms.set_context(mode=ms.GRAPH_MODE)
    from mindone.diffusers.training_utils import TrainStep

    class Step(TrainStep):
        def forward(self, *batch):
            loss = self.scale_loss(squared_error(self.model, *batch))
            return loss, loss

    model = network(name, weights)
    optimizer = nn.AdamWeightDecay(model.trainable_params(), common.LEARNING_RATE, *common.BETAS, common.EPS,
                                   common.WEIGHT_DECAY)
    return Step(model, optimizer, max_grad_norm=common.MAX_GRAD_NORM, gradient_accumulation_steps=1)


def build(name: str, weights: Path):
    kind = sys.argv[3]
    step = build_mindone(name, weights) if kind == "mindone" else build_ours(name, weights, kind)
    batch = tuple(Tensor(array) for array in common.inputs(name).values())
    return lambda: float(step(*batch)[0].asnumpy())


def write(name: str, weights: Path) -> None:
    runtime.configure("pynative", "CPU")
    generator = np.random.default_rng(1)
    save_file({key: common.random_weight(generator, key, shape)
               for key, shape in torch_shapes(network(name, None)).items()}, weights)


if __name__ == "__main__":
    if sys.argv[3] == "write":
        write(sys.argv[1], Path(sys.argv[2]))
    else:
        common.serve(build)
