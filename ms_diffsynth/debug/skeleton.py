"""A published model without its weights, trained for a step: its memory on a device, kernels, and waits of the host.

The weights are memory of the device that nothing is written to, so that a network of 24 GB is built in seconds and, on
the stand-in for CANN (`ms_diffsynth.standin`), takes no place on this machine. What runs is the step of the second
stage of split training: prepared slots of zeros, a LoRA, the optimizer, compiled as ever.

    python -m ms_diffsynth.debug.skeleton '{"family": "flux", "model": "FLUX.1-dev", "height": 1024, "width": 1024}'

`measure` does that in a process on the stand-in and reads its log; `train` in this one, on whatever device it has.
"""
from __future__ import annotations

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, mint, nn
from mindspore.common.initializer import Zero
from mindspore.nn.utils import no_init_parameters

from ms_diffsynth import runtime
from ms_diffsynth.diffusion.tasks import task
from ms_diffsynth.errors import ConfigError, DeviceError, nearest
from ms_diffsynth.models import Component
from ms_diffsynth.nn.adapters.layer import linear_modules
from ms_diffsynth.nn.names import torch_parameters
from ms_diffsynth.nn.quant import hold_8bit
from ms_diffsynth.pipeline import Pipeline
from ms_diffsynth.program import Cut
from ms_diffsynth.registry import family
from ms_diffsynth.standin import Log, environment, mark
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.optim import AdamW, ShardedAdamW, needs_float32
from ms_diffsynth.training.program_step import ProgramTrainStep

RESULT = "RESULT "
DEPTHS = ("num_layers", "num_single_layers")  # settings of networks that say how many blocks there are
FEW = 2
WHOLE_NUMBERS = ("edit_places", "control_modes")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is trained, and how.

    Attributes:
        model: one of the family's published models, e.g. ``FLUX.1-dev``.
        height, width: of the images, pixels. num_frames: of videos; 0 for images.
        batch_size: images a step.
        text_tokens: of a prompt; None is the family's ``max_sequence_length``.
        recompute: ``use_gradient_checkpointing``.
        is_8bit: ``fp8_models`` names the network.
        is_whole: all weights of the network are trained, no LoRA.
        edit_tokens: of reference images, beside those of the image.
        controlnet: blocks of each kind of a new ControlNet that is trained instead of a LoRA; none for none.
        template: folder of a template that is trained instead of a LoRA; its code is run.
        template_inputs: what its ``process_inputs`` takes.
        settings: of the network, other than as published: fewer blocks (``num_layers``), say.
        steps: how many; the first compiles, and the last is the one that is counted.
        device: ``Ascend``, or ``CPU`` to see what compiling costs.
    """

    family: str
    model: str
    height: int = 1024
    width: int = 1024
    num_frames: int = 0
    batch_size: int = 1
    text_tokens: int | None = None
    lora_rank: int = 16
    recompute: bool = True
    is_8bit: bool = False
    is_whole: bool = False
    dtype: str = "bfloat16"
    mode: str = "graph"
    task: str = "sft"
    edit_tokens: int = 0
    controlnet: tuple[int, ...] = ()
    template: str = ""
    template_inputs: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    steps: int = 2
    device: str = "Ascend"


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a step took. Bytes are those of MindSpore's own allocator; workspaces of kernels are not among them.

    Attributes:
        parameters: of the network, the LoRA not counted.
        held: bytes held between steps: weights, LoRA and moments, and the batch.
        peak: the most bytes that were held at one time during the last step.
        compile_seconds: processor time of the first step, its execution included.
        host_peak: the most memory that the process has held on the host, bytes.
        kernels, casts, transposes, synchronisations: of the last step; None without the stand-in's log.
    """

    parameters: int
    trained: int
    held: int
    peak: int
    compile_seconds: float
    host_peak: int
    kernels: int | None = None
    casts: int | None = None
    transposes: int | None = None
    synchronisations: int | None = None


def published(plan: Plan) -> dict[str, dict[str, Any]]:
    """The config.json of each component of the planned model, ``plan.settings`` put into the network's.

    Raises: ConfigError for a model that the family does not have.
    """
    known = family(plan.family).published
    if plan.model not in known:
        raise ConfigError(f"'{plan.model}' is not a published model of the family {plan.family}: expected one of "
                          f"{', '.join(known) or '(it has none)'}.{nearest(plan.model, known)}")
    network = family(plan.family).pipeline(dtype=ms.float32).network
    changes = {network: plan.settings}
    return {name: config | changes.get(name, {}) for name, config in known[plan.model].items()}


def build(component: Component, config: Mapping[str, Any], dtype: ms.Type, is_allocated: bool = True,
          is_8bit: bool = False) -> nn.Cell:
    """A component's cell, frozen, in evaluation mode, with weights of the dtypes that loading it would give them.

    Args:
        is_allocated: whether the weights have memory on the device; without, they are names, shapes and dtypes only.
        is_8bit: whether its linear layers are stored in 8 bits.
    """
    with no_init_parameters():
        cell = component.build(dict(config))
    for name, parameter in torch_parameters(cell).items():
        parameter.set_dtype(component.weight_dtype(name, dtype))
        parameter.requires_grad = False
    if is_8bit:
        for layer in linear_modules(cell).values():
            hold_8bit(layer, Tensor(shape=layer.weight.shape, dtype=ms.int8, init=Zero()),
                      Tensor(shape=layer.weight.shape[:1], dtype=ms.float32, init=Zero()))
    if is_allocated:
        for parameter in cell.get_parameters():
            parameter.set_data(mint.empty(parameter.shape, dtype=parameter.dtype, device=runtime.current().device))
    return cell.set_train(False)


def pipeline(plan: Plan) -> Pipeline:
    """The family's pipeline with its network as published, the weights unwritten memory; other models are absent."""
    configs = published(plan)
    pipe = family(plan.family).pipeline(dtype=runtime.compute_dtype(plan.dtype))
    pipe.known_configs.update(configs)
    component = pipe.store.component(pipe.network)
    pipe.models[pipe.network] = build(component, configs[pipe.network], pipe.dtype, is_8bit=plan.is_8bit)
    if plan.controlnet:
        pipe.new_controlnet(plan.controlnet)
        pipe.models["controlnet"] = build(pipe.store.component("controlnet"), pipe.known_configs["controlnet"],
                                          pipe.dtype)
    return pipe


class _Module(DiffusionTrainingModule):
    def __init__(self, plan: Plan):
        super().__init__()
        self.pipe = pipeline(plan)
        further = {"edit_image": plan.edit_tokens, "control_image": plan.controlnet, "template_inputs": plan.template,
                   "input_image": getattr(self.pipe, "has_condition", False)}
        whole = ("template_model" if plan.template else "controlnet" if plan.controlnet else
                 self.pipe.network if plan.is_whole else None)
        self.load_training_template_model(self.pipe, plan.template, plan.recompute, trust_template_code=True)
        self.switch_pipe_to_training_mode(
            self.pipe, lora_base_model=None if whole else self.pipe.network, lora_rank=plan.lora_rank,
            trainable_models=whole, task=f"{plan.task}:train",
            extra_inputs=",".join(name for name, given in further.items() if given) or None,
            objective=None if self.pipe.objective_class else task(plan.task), use_gradient_checkpointing=plan.recompute,
            lora_uniform=lambda _, shape: np.zeros(shape, np.float32))


def inputs(plan: Plan, pipe: Pipeline, cut: Cut) -> list[Tensor]:
    """Zeros for the prepared slots and the draws of a batch, in the order of the step."""
    latent = pipe.latent_shape(*([plan.num_frames] if plan.num_frames else []), plan.height, plan.width)
    tokens = plan.text_tokens or getattr(pipe, "max_sequence_length", None)
    shapes = dict(family(plan.family).prepared_shapes(pipe.known_configs, latent, tokens))
    if plan.edit_tokens:
        axes = next(unit.axes for unit in pipe.optional_units["edit_image"] if "edit_places" in unit.output_params)
        shapes |= {"edit_latents": (plan.edit_tokens, latent[0] * pipe.latent_patch**2),
                   "edit_places": (plan.edit_tokens, axes)}
    if plan.controlnet:
        shapes |= {"control_latents": (1, pipe.image_tokens(latent), latent[0] * pipe.latent_patch**2),
                   "control_modes": (1,), "control_scales": (1,)}
    if plan.template:
        units = pipe.optional_units["template_inputs"][:2]  # up to what is prepared
        processed = pipe.run(units, {"template_inputs": plan.template_inputs})
        shapes |= {name: value.shape[1:] for name, value in processed.items() if isinstance(value, Tensor)}
    draws = {name: pipe.objective.draw(name, (plan.batch_size, *latent), len(pipe.sigmas),
                                       lambda _, kind, shape: np.zeros(shape, np.float32)) for name in cut.draws}
    slots = {name: np.zeros((plan.batch_size, *shapes[name]), np.int32 if name in WHOLE_NUMBERS else np.float32)
             for name in cut.cache}
    return [runtime.to_device(value) for value in (*slots.values(), *draws.values())]


def train(plan: Plan) -> Report:
    """Train for ``plan.steps`` steps in this process, on the device it has. Needs the memory that it reports."""
    module = _Module(plan)
    network = getattr(module.pipe, module.pipe.network)
    cut, trained = module.training_cut(), module.trainable_parameters()
    optimizer = (ShardedAdamW if needs_float32(trained) else AdamW)(trained)
    step = ProgramTrainStep(module, cut, optimizer, max_grad_norm=1.0)
    batch = inputs(plan, module.pipe, cut)
    began = time.process_time()
    for number in range(1, plan.steps + 1):
        ms.runtime.reset_peak_memory_stats()
        mark(f"step {number} begins")
        step.step(*batch)
        ms.runtime.synchronize()
        mark(f"step {number} ends")
        if number == 1:
            seconds = time.process_time() - began
    count = sum(p.size for p in trained)
    return Report(parameters=sum(p.size for p in network.get_parameters()) - count, trained=count,
                  held=ms.runtime.memory_allocated(), peak=ms.runtime.max_memory_allocated(), compile_seconds=seconds,
                  host_peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


def measure(plan: Plan, memory: float = 128.0, folder: str | Path | None = None) -> Report:
    """Train in a process on the stand-in for CANN, shapes only, and count what the last step launched.

    Args:
        memory: of the device, GiB; a plan that needs more is an error there, as on a device.
        folder: where the log and what the process says are left; None leaves neither.

    Raises: DeviceError when the step cannot be built or does not fit, with the process's last words.
    """
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(folder or temporary)
        log = place / "log.jsonl"
        log.unlink(missing_ok=True)
        done = subprocess.run([sys.executable, "-m", "ms_diffsynth.debug.skeleton", json.dumps(asdict(plan))],
                              cwd=temporary, env=environment(log, memory=memory, shapes_only=True), text=True,
                              capture_output=True, check=False)
        (place / "messages").write_text(done.stdout + done.stderr, encoding="utf-8")
        found = [line for line in done.stdout.splitlines() if line.startswith(RESULT)]
        if done.returncode or not found:
            raise DeviceError(f"{plan.model} at {plan.height} x {plan.width} pixels: the process ended with "
                              f"{done.returncode}. Expected a report. Its last words:\n{done.stderr[-3000:]}")
        step = Log.read(log).between(f"step {plan.steps} begins", f"step {plan.steps} ends")
        counted = {"kernels": len(step.kernels()), "casts": step.casts(), "transposes": step.transposes(),
                   "synchronisations": step.synchronisations()}
        return Report(**{**json.loads(found[-1].removeprefix(RESULT)), **counted})


def measure_by_depth(plan: Plan, memory: float = 512.0, few: int = FEW) -> Report:
    """The same, sooner: at ``few`` blocks of each kind, and at one more of each. Blocks of a kind are alike, so that
    each further one adds the same to all of a report but ``compile_seconds`` and ``host_peak``: those are of the first.
    With recompute a network of two has its peak at another place than a deep one, one of eight has not.

    Where they are not alike, as in SD3.5, the whole network is built. Raises: as `measure`.
    """
    network = family(plan.family).pipeline(dtype=ms.float32).network
    config = published(plan)[network] | plan.settings
    depth = {name: n for name, n in config.items() if name in DEPTHS}
    if config.get("dual_attention_layers"):
        return measure(plan, memory)
    shallow = {name: min(few, n) for name, n in depth.items()}
    first = asdict(measure(replace(plan, settings=plan.settings | shallow), memory))
    whole = dict(first)
    for name, n in depth.items():
        if n > few:
            more = asdict(measure(replace(plan, settings=plan.settings | shallow | {name: few + 1}), memory))
            for key in whole:
                whole[key] += (n - few) * (more[key] - first[key])
    return Report(**whole | {key: first[key] for key in ("compile_seconds", "host_peak")})


if __name__ == "__main__":
    given = Plan(**json.loads(sys.argv[1]))
    runtime.configure(given.mode, given.device)
    sys.stdout.write(RESULT + json.dumps(asdict(train(given))) + "\n")
