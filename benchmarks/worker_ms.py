"""What is measured, on mindone's networks: by ms_diffsynth (graph, pynative), or by mindone's own TrainStep.

    python worker_ms.py WORKLOAD WEIGHTS graph|pynative|mindone     makes steps, see common.serve
    python worker_ms.py WORKLOAD WEIGHTS write                      writes the weights that all workers load
"""
from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

os.environ.setdefault("GLOG_v", "3")
# the main thread makes the step itself; else it hands it to another and spins until it is done, which takes one core
os.environ.setdefault("MS_DEV_HOST_BLOCKING_RUN", "1")

import common
import mindspore as ms
import numpy as np
from common import SIDE, TEXT, WORKLOADS
from mindspore import Tensor, nn
from safetensors.numpy import load_file, save_file

from ms_diffsynth import runtime
from ms_diffsynth.nn.names import assign, torch_shapes


def build_network(name: str, config: dict) -> nn.Cell:
    """As ms_diffsynth builds it from a ``config.json``."""
    if name == "ddpm":
        from ms_diffsynth.pipelines.ddpm_unet.pipeline import build_unet as build
    elif name == "vae":
        from ms_diffsynth.pipelines.shared.autoencoder_kl import build_autoencoder_kl as build
    elif name == "flux2":
        from ms_diffsynth.pipelines.flux2.transformer import build_transformer as build
    elif name == "qwen_image":
        from ms_diffsynth.pipelines.qwen_image.transformer import build_transformer as build
    elif name == "sdxl":
        from ms_diffsynth.models import arguments
        from ms_diffsynth.pipelines.sdxl.unet import FIXED, SDXLUNet
        return SDXLUNet(**arguments(SDXLUNet, config, FIXED))
    elif name in ("z_image", "wan"):
        from ms_diffsynth.pipelines.wan.transformer import WanTransformer
        from ms_diffsynth.pipelines.z_image.transformer import ZImageTransformer
        return {"z_image": ZImageTransformer, "wan": WanTransformer}[name](**config)
    elif name == "sd3":
        from ms_diffsynth.pipelines.sd3.transformer import SD3Transformer
        return SD3Transformer(**config)
    else:
        from ms_diffsynth.pipelines.flux.transformer import build_transformer as build
    return build(config)


def denoise(name: str, model: nn.Cell, config: dict) -> nn.Cell:
    """The family's unit around a network."""
    from ms_diffsynth.pipelines.wan.denoise import Denoise as OfWan
    from ms_diffsynth.pipelines.z_image.denoise import Denoise as OfZImage

    unit = {"z_image": OfZImage, "wan": OfWan}[name](ms.float32)
    unit.attach(SimpleNamespace(dit=model, config=lambda _: config))
    return unit


class Predict(nn.Cell):
    """What a network gives for the inputs of `common.inputs`, without their names, which compiled code loses."""

    def __init__(self, name: str, model: nn.Cell, config: dict):
        super().__init__(auto_prefix=False)
        self.name, self.model, self.positions = name, model, ()
        if name == "qwen_image":
            from ms_diffsynth.pipelines.qwen_image.rotary import image_table
            self.positions = image_table(TEXT, SIDE, SIDE, tuple(config["axes_dims_rope"]))
        if name in ("z_image", "wan"):
            self.model = denoise(name, model, config)
        if name == "flux2":
            from ms_diffsynth.pipelines.flux2.rotary import image_table
            self.positions = image_table(TEXT, SIDE, SIDE, tuple(config["axes_dims_rope"]), config["rope_theta"])

    def construct(self, *inputs):
        if self.name == "ddpm":
            return self.model(*inputs, return_dict=False)[0]
        if self.name == "vae":
            return self.model.encode(*inputs, return_dict=False)[0]
        if self.name in ("sd3", "sdxl"):
            return self.model(*inputs)
        if self.name in ("z_image", "wan"):
            return self.model(*inputs)[0]
        if self.name == "qwen_image":
            x, sigma, text = inputs
            return self.model(x, sigma, text, *self.positions)
        if self.name == "flux2":
            x, sigma, text = inputs
            return self.model(x, sigma, None, text, *self.positions, {})
        x, sigma, guidance, pooled, text, text_ids, image_ids = inputs
        return self.model(x, text, pooled, sigma, image_ids, text_ids, guidance, return_dict=False)[0]


def with_weights(model: nn.Cell, weights: Path) -> nn.Cell:
    assign(model, load_file(weights).items())
    return model


def add_lora(model: nn.Cell, targets: tuple[str, ...]) -> list:
    from ms_diffsynth.nn.adapters.layer import adapted_layers
    from ms_diffsynth.nn.adapters.lora import LoRA

    LoRA().inject(model, targets, common.RANK)
    tensors = {}
    for name, cell in adapted_layers(model).items():
        (_, ins), (outs, _) = cell.shapes
        pair = common.lora(name, outs, ins)
        tensors |= {f"{name}.lora_{part}.weight": array for part, array in zip("AB", pair)}
    LoRA().load(model, tensors)
    return LoRA().parameters(model)


def build_ours(workload: common.Workload, weights: Path, mode: str) -> Callable[[], float]:
    """ms_diffsynth's step and AdamW; or its sampling step, compiled like any."""
    runtime.configure(mode, "CPU")
    from ms_diffsynth.compile import CompiledStep
    from ms_diffsynth.training.optim import AdamW
    from ms_diffsynth.training.step import TrainStep

    model = with_weights(build_network(workload.network, workload.config), weights)
    predict = Predict(workload.network, model, workload.config)
    batch = tuple(Tensor(array) for array in common.inputs(workload.network).values())
    if not workload.trains:
        predict.set_train(False)
        step = CompiledStep(predict.construct, "the forward pass", mode)
        return lambda: common.forward(step, batch, Tensor, workload.repeats)

    class Step(TrainStep):
        def forward(self, *batch):
            return ((predict(*batch[:-1]) - batch[-1]) ** 2).mean()

    trained = add_lora(model, workload.targets) if workload.trains == "lora" else model.trainable_params()
    optimizer = AdamW(trained, common.LEARNING_RATE, common.BETAS, common.EPS, common.WEIGHT_DECAY)
    step = Step(model, optimizer, max_grad_norm=common.MAX_GRAD_NORM)
    return lambda: float(step(*batch)[0].asnumpy())


def build_mindone(workload: common.Workload, weights: Path) -> Callable[[], float]:
    """mindone's network, TrainStep and the optimizer of its examples, in graph mode; on the CPU by our kernels only."""
    runtime.configure("graph", "CPU")
    ms.set_context(mode=ms.GRAPH_MODE)
    from mindone.diffusers import FluxTransformer2DModel
    from mindone.diffusers.training_utils import TrainStep

    if workload.trains != "all" or workload.network not in ("flux", "ddpm"):
        raise SystemExit("mindone's step is measured for flux and ddpm")

    class Step(TrainStep):
        def forward(self, *batch):
            loss = self.scale_loss(((predict(*batch[:-1]) - batch[-1]) ** 2).mean())
            return loss, loss

    model = (FluxTransformer2DModel(**workload.config) if workload.network == "flux"
             else build_network(workload.network, workload.config))
    predict = Predict(workload.network, with_weights(model, weights), workload.config)
    optimizer = nn.AdamWeightDecay(model.trainable_params(), common.LEARNING_RATE, *common.BETAS, common.EPS,
                                   common.WEIGHT_DECAY)
    step = Step(model, optimizer, max_grad_norm=common.MAX_GRAD_NORM, gradient_accumulation_steps=1)
    batch = tuple(Tensor(array) for array in common.inputs(workload.network).values())
    return lambda: float(step(*batch)[0].asnumpy())


def build(workload: common.Workload, weights: Path) -> Callable[[], float]:
    kind = sys.argv[3]
    return build_mindone(workload, weights) if kind == "mindone" else build_ours(workload, weights, kind)


def write(workload: common.Workload, weights: Path) -> None:
    runtime.configure("pynative", "CPU")
    generator = np.random.default_rng(1)
    shapes = torch_shapes(build_network(workload.network, workload.config))
    save_file({key: common.random_weight(generator, key, shape) for key, shape in shapes.items()}, weights)


if __name__ == "__main__":
    if sys.argv[3] == "write":
        write(WORKLOADS[sys.argv[1]], Path(sys.argv[2]))
    else:
        common.serve(build)
