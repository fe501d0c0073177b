"""One training step of mindone's FLUX transformer: by ms_diffsynth (graph, pynative), or by mindone's own TrainStep.

    python worker_ms.py WEIGHTS graph|pynative|mindone     makes steps, see common.serve
    python worker_ms.py WEIGHTS write                      writes the weights that all workers load
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

BATCH = {name: Tensor(array) for name, array in common.inputs().items()}
ORDER = tuple(BATCH)


def network(weights: Path | None) -> nn.Cell:
    from mindone.diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(**common.CONFIG)
    if weights is not None:
        assign(model, load_file(weights).items())
    return model


def squared_error(model, hidden_states, timestep, guidance, pooled_projections, encoder_hidden_states, txt_ids, img_ids,
                  target):
    velocity = model(hidden_states=hidden_states, timestep=timestep, guidance=guidance,
                     pooled_projections=pooled_projections, encoder_hidden_states=encoder_hidden_states,
                     txt_ids=txt_ids, img_ids=img_ids, return_dict=False)[0]
    return ((velocity - target) ** 2).mean()


def build_ours(weights: Path, mode: str):
    """ms_diffsynth's TrainStep and AdamW on the fast cells."""
    runtime.configure(mode, "CPU")
    from ms_diffsynth.pipelines.flux.fast import use_fast_cells
    from ms_diffsynth.train.optim import AdamW
    from ms_diffsynth.train.step import TrainStep

    class Step(TrainStep):
        def forward(self, *batch):
            return squared_error(self.model, *batch)

    model = use_fast_cells(network(weights))
    optimizer = AdamW(model.trainable_params(), common.LEARNING_RATE, common.BETAS, common.EPS, common.WEIGHT_DECAY)
    return Step(model, optimizer, max_grad_norm=common.MAX_GRAD_NORM)


def build_mindone(weights: Path):
    """mindone's TrainStep and the optimizer of its examples, in graph mode; it runs on the CPU by our kernels only."""
    runtime.configure("graph", "CPU")
    ms.set_context(mode=ms.GRAPH_MODE)
    from mindone.diffusers.training_utils import TrainStep

    class Step(TrainStep):
        def forward(self, *batch):
            loss = self.scale_loss(squared_error(self.model, *batch))
            return loss, loss

    model = network(weights)
    optimizer = nn.AdamWeightDecay(model.trainable_params(), common.LEARNING_RATE, *common.BETAS, common.EPS,
                                   common.WEIGHT_DECAY)
    return Step(model, optimizer, max_grad_norm=common.MAX_GRAD_NORM, gradient_accumulation_steps=1)


def build(weights: Path):
    kind = sys.argv[2]
    step = build_mindone(weights) if kind == "mindone" else build_ours(weights, kind)
    batch = tuple(BATCH[name] for name in ORDER)
    return lambda: float(step(*batch)[0].asnumpy())


def write(weights: Path) -> None:
    runtime.configure("pynative", "CPU")
    generator = np.random.default_rng(1)
    save_file({name: common.random_weight(generator, name, shape)
               for name, shape in torch_shapes(network(None)).items()}, weights)


if __name__ == "__main__":
    if sys.argv[2] == "write":
        write(Path(sys.argv[1]))
    else:
        common.serve(build)
