"""Memory of a run worked out from shapes: networks without weights, and what is held at the peak of each stage.

A network is built without memory for its weights, so its bytes are exact. What a step holds beside them follows from
tokens, channels and blocks, with the numbers that MindSpore's allocator gave for each family (`pipeline.Activations`).
Workspaces of kernels, and what CANN takes, are in `RESERVED`.
"""
from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore.nn.utils import no_init_parameters

from ms_diffsynth.config import TrainConfig
from ms_diffsynth.errors import is_mistake
from ms_diffsynth.models import Component
from ms_diffsynth.nn.adapters import adapter
from ms_diffsynth.nn.adapters.layer import linear_modules, match_targets
from ms_diffsynth.nn.names import torch_parameters, trainable_parameters
from ms_diffsynth.pipeline import Activations, Pipeline
from ms_diffsynth.program import Cut
from ms_diffsynth.training.module import targets_of
from ms_diffsynth.training.optim import optimizer_arguments
from ms_diffsynth.training.optim.build import optimizer_class

GIB = 2**30
RESERVED = 2 * GIB  # of a device: CANN, MindSpore's pool and workspaces of kernels, which no allocator tells
PROCESS = 0.94 * GIB  # of a process that trains on the CPU: libraries, and a compiled step
ON_CPU = 1.6  # times what an Ascend keeps: MindSpore's CPU back end frees nothing within a step
FROZEN = 0.72, 0.55  # of what is kept, and is inside of a block, where the network itself learns nothing (a template)
CONTROLNET = "controlnet"
BYTES = {ms.float32: 4, ms.float16: 2, ms.bfloat16: 2}


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is held at the peak of one stage, in bytes.

    Attributes:
        models: weights, by the name of the model. parts: what is beside them.
        unknown: what is held too, but is not counted.
    """

    name: str
    models: Mapping[str, int]
    parts: Mapping[str, int] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()

    @property
    def peak(self) -> int:
        return sum(self.models.values()) + sum(self.parts.values())


class Network:
    """A component as its config.json says, built without its weights."""

    def __init__(self, component: Component, config: Mapping[str, Any]):
        self.component = component
        with no_init_parameters():
            self.cell: nn.Cell = component.build(dict(config))
        self.sizes = {name: p.size for name, p in torch_parameters(self.cell).items()}
        self.linear = {name: tuple(layer.weight.shape) for name, layer in linear_modules(self.cell).items()}
        lists = {name: cell for name, cell in self.cell.cells_and_names() if isinstance(cell, nn.CellList)}
        if hasattr(self.cell, "kinds") and not hasattr(self.cell, "repeated"):  # its other lists hold single layers
            lists = {kind.list_name: getattr(self.cell, kind.list_name) for kind in self.cell.kinds().values()}
        self.blocks = sum(len(cell) for name, cell in lists.items()
                          if not any(name.startswith(f"{other}.") for other in lists))
        heads, channels = config.get("num_attention_heads"), config.get("attention_head_dim")
        self.channels = heads * channels if heads and channels else config.get("dim", 0)
        if "block_out_channels" in config:  # of a UNet, in whose levels a token has less space and more channels
            self.channels = config["block_out_channels"][0]
        self.inner = config.get("ffn_dim", 0) / self.channels if self.channels else 0.0  # channels of the feed-forward

    def inside(self, numbers: Activations) -> float:
        """Values for each token and channel inside of a block."""
        return numbers.inside + numbers.inner * self.inner

    @property
    def count(self) -> int:
        """Of parameters."""
        return sum(self.sizes.values())

    def bytes(self, dtype: ms.Type, is_8bit: bool = False) -> int:
        """Of the weights in the dtypes that loading gives them; ``is_8bit``: linear layers in 8 bits with scales."""
        stored = {f"{name}.weight": outs for name, (outs, _) in self.linear.items()} if is_8bit else {}
        return sum(size + 4 * stored[name] if name in stored else
                   size * BYTES[self.component.weight_dtype(name, dtype)] for name, size in self.sizes.items())

    def largest(self) -> int:
        """Elements of the largest linear layer."""
        return max((math.prod(shape) for shape in self.linear.values()), default=0)

    def adapter_size(self, name: str, targets: Iterable[str], rank: int) -> int:
        """Trained numbers of an adapter. Raises: ConfigError for targets that select nothing."""
        return sum(adapter(name).size(*self.linear[layer], rank) for layer in match_targets(self.cell, targets))

    def size_below(self, inner: str) -> int:
        """Trained numbers of a part of the network, or of all of it."""
        return sum(p.size for name, p in trainable_parameters(self.cell).items()
                   if not inner or name == inner or name.startswith(f"{inner}."))


_networks: dict[tuple[str, str, str], Network | None] = {}


def network_of(pipe: Pipeline, name: str) -> Network | None:
    """A component of the pipeline; None where its config.json is not known, or no network can be built from it."""
    component = pipe.store.component(name)
    if not component.class_name or not pipe.store.has_config(name):
        return None
    config = pipe.store.config(name)
    key = f"{type(pipe).__name__}.{name}", component.class_name, json.dumps(config, sort_keys=True, default=str)
    if key not in _networks:
        try:
            _networks[key] = Network(component, config)
        except Exception as error:  # classes of other packages; training will say what is wrong
            if not is_mistake(error):
                raise
            _networks[key] = None
    return _networks[key]


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step computes on, as far as memory depends on it.

    Attributes:
        size: height and width of the largest images, of videos with the frames in front.
        images: in a batch, class images included.
        prompt: tokens to which prompts are padded; None without prompts. text: tokens the network sees of them.
        further: tokens of reference images. reference: height and width of the largest of them.
        device: "Ascend" or "CPU". activations: of the family.
        samples: models that sample images load, which stay; see `run.plan.models_of_samples`.
        sample_size: height and width of the sample images, of videos with the frames in front.
    """

    size: tuple[int, ...]
    images: int
    prompt: int | None = None
    text: int | None = None
    further: int = 0
    reference: tuple[int, int] = (0, 0)
    device: str
    activations: Activations | None = None
    samples: tuple[str, ...] = ()
    sample_size: tuple[int, ...] = (0, 0)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What learns: how many numbers, and in which bytes they and what belongs to them are held."""

    count: int
    is_adapter: bool
    unknown: tuple[str, ...] = ()


def trained_of(config: TrainConfig, pipe: Pipeline) -> Trained:
    """Raises: ConfigError for layers or models that are not there."""
    model = config.model
    if not model.trainable_models:
        names = [n.strip() for n in model.lora_base_model.split(",") if n.strip()]
        networks = {name: network for name in names if (network := network_of(pipe, name)) is not None}
        targets = [t.strip() for t in model.lora_target_modules.split(",") if t.strip()]
        own = targets_of({name: network.cell for name, network in networks.items()}, targets, pipe)
        count = sum(network.adapter_size(model.adapter, own[name], model.lora_rank)
                    for name, network in networks.items())
        unknown = tuple(f"the {model.adapter} of {name}" for name in names if name not in networks)
        return Trained(count=count, is_adapter=True, unknown=unknown)
    count, unknown = 0, []
    for name in (n.strip() for n in model.trainable_models.split(",") if n.strip()):
        root, _, inner = name.partition(".")
        if root not in pipe.store.names:  # a template whose code may not be run
            unknown.append(root)
        elif root in pipe.models:
            count += sum(p.size for p in trainable_parameters(pipe.models[root]).values())
        elif (network := network_of(pipe, root)) is not None:
            count += network.size_below(inner)
        else:
            unknown.append(root)
    return Trained(count=count, is_adapter=False, unknown=tuple(unknown))


def in_8bit(config: TrainConfig, pipe: Pipeline) -> set[str]:
    """Names of the models that are stored in 8 bits."""
    names = [name.strip() for name in (config.model.fp8_models or "").split(",")]
    return {pipe.given_as.get(name, name) for name in names if name}


def optimizer_bytes(config: TrainConfig) -> float:
    """Of the optimizer's state, for each trained number."""
    options = config.optimizer
    probe = Parameter(Tensor(np.zeros((256, 256), np.float32)), name="probe")
    optimizer = optimizer_class(options.optimizer).from_settings([probe], options.learning_rate, options.weight_decay,
                                                                 **optimizer_arguments(options))
    return sum(p.size * p.itemsize for p in optimizer.state_tensors().values() if p.size > 1) / probe.size


def stages_of(config: TrainConfig, pipe: Pipeline, cut: Cut, work: Work) -> list[Stage]:
    """The stages of a run, in their order: ``encode`` where images and prompts are encoded before, ``train``, and
    ``samples``.
    """
    stage = config.objective.task.partition(":")[2]
    is_split = bool(stage or config.data.cache_dir)
    prepare, step = cut.models("prepare"), cut.models("step")
    fp8 = in_8bit(config, pipe)
    base = {"the process": int(PROCESS)} if work.device == "CPU" else {}

    def weights(names: Iterable[str]) -> tuple[dict[str, int], tuple[str, ...]]:
        found, lost = {}, []
        for name in dict.fromkeys(names):
            if pipe.store.component(name).is_tokenizer:
                continue
            if name in pipe.models:
                found[name] = sum(p.size * p.itemsize for p in pipe.models[name].get_parameters())
            elif (network := network_of(pipe, name)) is not None:
                found[name] = network.bytes(pipe.dtype, name in fp8)
            else:
                lost.append(name)
        return found, tuple(lost)

    largest = max(work.size, work.reference, key=math.prod)
    encoding = vae_bytes(pipe, work, largest, "encode") if "moments" in cut.cache else 0
    found: list[Stage] = []
    if is_split and stage != "train":
        models, lost = weights(prepare)
        found.append(Stage(name="encode", models=models, parts=base | _some({"inside of the VAE": encoding}),
                           unknown=lost))
    if stage == "data_process":
        return found
    held = [*step, *([] if is_split else prepare), *work.samples]
    models, lost = weights(held)
    trained = trained_of(config, pipe)
    parts, unknown = _training(config, pipe, cut, trained, work)
    steady = base | {name: size for name, size in parts.items() if name in STEADY}
    if not is_split and encoding > sum(parts.values()) - sum(size for n, size in parts.items() if n in STEADY):
        parts = {n: size for n, size in parts.items() if n in STEADY} | {"inside of the VAE": encoding}
    found.append(Stage(name="train", models=models, parts=base | parts, unknown=(*lost, *trained.unknown, *unknown)))
    if work.samples:
        inside = max(vae_bytes(pipe, work, work.sample_size, "decode"), forward_bytes(pipe, work))
        found.append(Stage(name="samples", models=models, parts=steady | _some({"inside of the networks": inside}),
                           unknown=lost))
    return found


STEADY = ("what learns", "the optimizer", "moving average", "accumulated gradients")


def _training(config: TrainConfig, pipe: Pipeline, cut: Cut, trained: Trained,
              work: Work) -> tuple[dict[str, int], tuple[str, ...]]:
    """What a step holds beside the weights of models, and what of it is not known."""
    wide, n = BYTES[pipe.dtype], trained.count
    parts = {"what learns": 4 * n if trained.is_adapter or wide < 4 else 0,  # else it is the model itself
             "the optimizer": round(optimizer_bytes(config) * n),
             "moving average": 4 * n if config.optimizer.use_ema else 0,
             "accumulated gradients": 4 * n if config.optimizer.gradient_accumulation_steps > 1 else 0,
             "gradients": 0 if trained.is_adapter and wide < 4 else wide * n,
             "copy to compute with": wide * n if trained.is_adapter and wide < 4 else 0}
    network, numbers = network_of(pipe, pipe.network), work.activations
    if network is None or numbers is None or not network.channels or pipe.network not in cut.models("step"):
        return _some(parts), ("activations of the step",)
    learns = pipe.network in _roots(config)
    kept, inside = (1.0, 1.0) if learns else FROZEN
    control = network_of(pipe, CONTROLNET) if CONTROLNET in _roots(config) else None  # frozen, it keeps nothing
    blocks = network.blocks + (control.blocks if control else 0)
    unit = tokens_of(pipe, work) * work.images * network.channels * wide
    if config.model.use_gradient_checkpointing and work.device != "CPU":  # the CPU frees nothing within a step
        stored = pipe.network in in_8bit(config, pipe)
        inputs = 0 if config.model.use_gradient_checkpointing_offload else unit * blocks
        parts |= {"inputs of the blocks": inputs,
                  "inside of a block": round(unit * network.inside(numbers) * inside)}
        if stored:
            parts["unpacked weights"] = 2 * wide * network.largest()
    else:
        parts["kept for backward"] = round(unit * numbers.kept * (network.blocks * kept + blocks - network.blocks)
                                           * (ON_CPU if work.device == "CPU" else 1))
    others = [name for name in cut.models("step") if name not in (pipe.network, CONTROLNET, "template_model")]
    return _some(parts), tuple(f"activations of {name}" for name in others)


def _roots(config: TrainConfig) -> set[str]:
    """Names of the models that learn, or have an adapter that does."""
    names = (config.model.trainable_models or config.model.lora_base_model or "").split(",")
    return {name.strip().split(".")[0] for name in names}


def tokens_of(pipe: Pipeline, work: Work, size: tuple[int, ...] | None = None) -> int:
    """Tokens of an image with its prompt and what it is made from."""
    return pipe.image_tokens(pipe.latent_shape(*(size or work.size))) + (work.text or 0) + work.further


def forward_bytes(pipe: Pipeline, work: Work) -> int:
    """At the peak of a block, without gradients: about half of what a block holds with them."""
    network, numbers = network_of(pipe, pipe.network), work.activations
    if network is None or numbers is None:
        return 0
    each = network.channels * BYTES[pipe.dtype] * network.inside(numbers)
    return round(tokens_of(pipe, work, work.sample_size) * each / 2)


def vae_bytes(pipe: Pipeline, work: Work, size: tuple[int, ...], what: str) -> int:
    """At the peak of the VAE beside its weights, ``what`` is "encode" or "decode"; 0 where it is not known."""
    numbers = work.activations
    if numbers is None or "vae" not in pipe.store.names or not pipe.store.has_config("vae"):
        return 0
    config = pipe.store.config("vae")
    widths = config.get("block_out_channels") or [config.get("base_dim", 0)]
    dtype = pipe.store.component("vae").weight_dtype("", pipe.dtype)
    return round(pipe.coded(size, what) * widths[0] * BYTES[dtype] * getattr(numbers, what))


def _some(parts: Mapping[str, int]) -> dict[str, int]:
    return {name: size for name, size in parts.items() if size}

