"""Reference cases of PyTorch implementations: recompute one and compare every number. `debug.compare` judges.

The format of a case is in docs/explanation/parity.md. Everything runs through the family's own units, step and
optimizer, with the draws the case recorded. A case that cannot be run is an error, never a skip.
"""
from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Parameter, ParameterTuple, Tensor, nn, ops

from ms_diffsynth import runtime
from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.debug.compare import Quantity, relative_error, together, tolerances, worst
from ms_diffsynth.debug.end_to_end import check_end_to_end
from ms_diffsynth.debug.films import check_films
from ms_diffsynth.debug.gradients import Gradients
from ms_diffsynth.debug.pictures import check_pictures
from ms_diffsynth.debug.texts import check_texts
from ms_diffsynth.diffusion.ddpm import DDPMObjective
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.diffusion.weighting import table
from ms_diffsynth.errors import DataError, UserError, is_memory_short, said
from ms_diffsynth.formats.json_text import read_json
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.models import Component, Source
from ms_diffsynth.nn.names import state_dict, to_numpy, trainable_parameters
from ms_diffsynth.pipeline import Pipeline, UnitSequence
from ms_diffsynth.program import Cut, Program, is_optional, slot
from ms_diffsynth.registry import family
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.optim import AdamW, ShardedAdamW, needs_float32
from ms_diffsynth.training.program_step import ProgramTrainStep
from ms_diffsynth.units import TensorUnit

CASES = Path(__file__).parent / "cases"  # those that travel in the package
OBJECTIVES = {"flow_match_sft": "sft", "flux_dreambooth": "dreambooth", "ddpm_epsilon": "sft",
              "ddpm_v_prediction": "sft"}
# what a case records under another name than the slot's
INPUTS = {"images": "input_latents", "prompt_embeds_mask": "prompt_mask", "add_time_ids": "time_ids"}
EXPECTED = {"noisy_latents": "latents", "noisy": "latents", "noisy_images": "latents",
            "first_frame_latents": "given_latents"}


def read_case(folder: Path) -> dict[str, Any]:
    """What case.json says. Raises: DataError for a folder without one."""
    file = folder / "case.json"
    if not os.path.lexists(file):
        raise DataError(f"{folder} is not a reference case: case.json is missing. Give a folder such as "
                        f"{CASES / 'flux'}.")
    return read_json(file, DataError, "Copy the case again.")


@contextlib.contextmanager
def reading(folder: Path) -> Iterator[None]:
    """Inside the block, whatever breaks by what a case says, or does not hold, is a DataError that names the case.

    A case is numbers and settings of another program: far more of it is used than could be checked one by one.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_memory_short(error) or folder.resolve().is_relative_to(CASES):  # these are sound
            raise
        raise DataError(f"{folder} cannot be run by its case.json and tensors: {said(error)}. Copy the case again, or "
                        "make it again (docs/explanation/parity.md).") from error


class Case:
    """A reference case of one network, loaded."""

    def __init__(self, folder: Path, info: dict[str, Any], dtype: str = "float32"):
        self.folder, self.info = folder, info
        self.dtype, self.tolerances = runtime.DTYPES[dtype], tolerances(dtype, runtime.current().device)
        if dtype == "bfloat16" and "bfloat16" in info:  # what the reference is off by
            self.tolerances = self.tolerances.at_least(**info["bfloat16"])
        if self.info.get("objective") not in OBJECTIVES:
            raise DataError(f"{folder / 'case.json'}: objective {self.info.get('objective')!r} cannot be run; expected "
                            f"one of {', '.join(OBJECTIVES)}.")
        self.inputs = self._as_latents(load_state_dict(folder / "inputs.safetensors"))
        self.expected = self._as_latents(load_state_dict(folder / "expected.safetensors"))
        self.stride = self.info.get("row_stride", 1)  # of what is recorded of every matrix
        self.strides = self.info.get("row_strides", {})  # and further, by the name of a weight

    def _as_latents(self, tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Tokens [B, N, C], as DiffSynth-Studio records them, as latents [B, C, H, W]."""
        sides = (self.info.get("height", 0) // 16, self.info.get("width", 0) // 16)
        latents = [name for name in tensors if name.endswith("_tokens") and name != "control_tokens"]
        return {name: array for name, array in tensors.items() if name not in latents} | {
            name.removesuffix("_tokens"): tensors[name].swapaxes(1, 2).reshape(*tensors[name].shape[::2], *sides)
            for name in latents}

    def rows(self, name: str, array: np.ndarray) -> np.ndarray:
        """What the case records of a network's weight called ``name``, or its gradient; see tests/golden/thin.py."""
        return array[:: self.stride * self.strides.get(name, 1)] if array.ndim > 1 else array

    @property
    def objective(self) -> Objective | DDPMObjective:
        info = self.info
        if info["objective"].startswith("ddpm_"):
            own = family(info["family"]).pipeline.objective_class
            has_weights = info.get("loss_weighting") == "min_snr"
            posterior = {"posterior": info["posterior"]} if "posterior" in info else {}
            return own(prediction_type=info["objective"].removeprefix("ddpm_"), **posterior,
                       snr_gamma=info["min_snr_gamma"] if has_weights else None)
        return Objective(weighting_scheme=info["loss_weighting"], density=info.get("density"),
                         logit_mean=info.get("logit_mean", 0.0), logit_std=info.get("logit_std", 1.0),
                         posterior=info.get("posterior", "mean"), guidance_scale=info.get("guidance_scale", 1.0),
                         prior_loss_weight=info["prior_loss_weight"] if info.get("with_prior_preservation") else None)

    def pipeline(self) -> Pipeline:
        """The family's pipeline with the case's models, which takes references, or control images, if the case has
        any."""
        pipe = family(self.info["family"]).pipeline(dtype=self.dtype)
        for component in (*pipe.store.components, *pipe.store.further):
            if (self.folder / component.folder / "config.json").is_file():
                pipe.sources[component.name] = Source(self.folder / component.folder)
        pipe.store.take_parts()
        if self.references:
            pipe.use_input("edit_image")
        if self.has_first_frame:
            pipe.use_input("input_image")
        return pipe

    @property
    def has_first_frame(self) -> bool:
        """Whether the network is given the first frame of each film."""
        return {"condition", "first_frame_latents"} & set(self.expected) != set()

    @property
    def control(self) -> dict[str, np.ndarray]:
        """The slots of a control image: control_latents float32 [B, 1, N, C], control_modes int32 and control_scales
        float32 [B, 1]; none where the case has no control image."""
        if "control_tokens" not in self.inputs:
            return {}
        tokens = self.inputs["control_tokens"]
        mode = self.inputs.get("control_mode", np.zeros((len(tokens), 1)))
        return {"control_latents": tokens[:, None], "control_modes": mode.astype(np.int32),
                "control_scales": np.full((len(tokens), 1), self.info.get("conditioning_scale", 1.0), np.float32)}

    @property
    def references(self) -> list[np.ndarray]:
        """Pixels of the reference images of every row, in order: float32 [B, 3, h, w] each, in [-1, 1]."""
        count = sum(name.startswith("reference_pixels.") for name in self.inputs)
        return [self.inputs[f"reference_pixels.{k}"] for k in range(count)]

    def gradients(self, name: str, pairs: dict[str, tuple[np.ndarray, np.ndarray]]) -> Quantity:
        """Float32 judges each tensor by itself; of bfloat16 some are little but rounding, and all are one vector."""
        judge = worst if self.dtype == ms.float32 else together
        return judge(name, pairs, self.tolerances.gradient)

    def value(self, name: str, found: np.ndarray, expected: np.ndarray) -> Quantity:
        """Float32 by the largest difference; bfloat16 in the Euclidean norm."""
        if self.dtype == ms.float32:
            return Quantity(name, relative_error(found, expected), self.tolerances.value)
        return together(name, {name: (found, expected)}, self.tolerances.value)

    def given(self, k: int) -> dict[str, Any]:
        """Slots that the case fixes at evaluation ``k``; draws are recorded for each evaluation."""
        names = {"images", "pixels", "prompt_embeds", "pooled_prompt_embeds", "posterior_noise",
                 "add_time_ids", "image_embeds"} & set(self.inputs)
        slots: dict[str, Any] = {INPUTS.get(name, name): self.inputs[name] for name in sorted(names)}
        slots |= {INPUTS.get(name, name): array.astype(np.float32) for name, array in self.inputs.items()
                  if name in ("prompt_mask", "prompt_embeds_mask")}
        slots |= self.control
        if self.control:  # its latents are given
            slots["input_latents"] = self.inputs["input_latents"]
        if self.references:
            slots["edit_pixels"] = list(map(Tensor, self.references))
        if self.has_first_frame:
            slots["first_pixels"] = self.inputs["pixels"][:, :, :1]
            slots["given_pixels"] = slots["first_pixels"]
            if "condition" in self.expected:
                slots["given_pixels"] = np.zeros_like(self.inputs["pixels"])
                slots["given_pixels"][:, :, :1] = slots["first_pixels"]
        if "template_kv_cache" in self.info:  # one evaluation; its latents are given
            return slots | {name: self.inputs[name] for name in ("input_latents", "noise", "timestep_index")}
        if "density_normal" in self.inputs:  # one evaluation, from the density's raw draw
            index = self.objective.timestep_index(self.inputs["density_normal"], len(self.inputs["grid.sigmas"]))
            return slots | {"noise": self.inputs["noise"], "timestep_index": index}
        index = self.inputs["timestep_index"][k].astype(np.int32)
        return slots | {"noise": self.inputs["noise"][k], "timestep_index": index}


def check_case(folder: Path, mode: str, dtype: str = "float32") -> list[Quantity]:
    """Run one case in ``mode``, computed in ``dtype``, and return every compared quantity.

    Raises: DataError for a case from end to end in another dtype than float32.
    """
    with reading(Path(folder)):
        return _check_case(Path(folder), read_case(Path(folder)), mode, dtype)


def _check_case(folder: Path, info: dict[str, Any], mode: str, dtype: str) -> list[Quantity]:
    if info.get("kind") == "end_to_end":
        if dtype != "float32":
            raise DataError(f"{folder} is a case from end to end, whose ids and images are compared one by one: "
                            f"expected --dtype float32, got {dtype}. Give a case of one network, such as "
                            f"{CASES / 'flux'}.")
        return check_end_to_end(folder, info, mode)
    if info.get("objective") == "text_encoder":
        return check_pictures(folder, info, mode, dtype)
    if info.get("objective") == "text_encoders":
        return check_texts(folder, info, mode, dtype)
    if info.get("variant", "").startswith("vae"):
        return check_films(folder, info, mode, dtype)
    case = Case(folder, info, dtype)
    pipe, objective = case.pipeline(), case.objective
    pipe.objective = objective
    schedule = pipe.training_schedule(OBJECTIVES[case.info["objective"]])
    quantities = []
    if "grid.sigmas" in case.inputs:
        grid = case.inputs["grid.sigmas"]
        quantities.append(Quantity("sigma grid", relative_error(schedule.sigmas, grid), 1e-6))
    if "grid.alphas_cumprod" in case.inputs:
        error = relative_error(schedule.alphas_cumprod, case.inputs["grid.alphas_cumprod"])
        quantities.append(Quantity("alphas_cumprod", error, 1e-6))
    if "grid.weights" in case.inputs:
        weights = (schedule.loss_weights(objective.snr_gamma) if isinstance(objective, DDPMObjective)
                   else table(objective.weighting_scheme, schedule.sigmas))
        quantities.append(Quantity("loss weights", relative_error(weights, case.inputs["grid.weights"]), 1e-5))
    if "template_kv_cache" in case.info:
        pipe.store.add_component(Component(name="template_model", folder="", build=None),
                                 model=RecordedKeys(case.inputs))
    program = _program(case, pipe, objective, schedule.sigmas)
    quantities += _first_evaluation(case, pipe, program, mode)
    quantities += _options(case, pipe, objective)
    if case.references:
        quantities += _references(case, pipe, program)
    if case.control:
        quantities.append(_without_control(case, pipe))
    if "sample" in case.info:
        quantities += _sample(case, pipe, program)
    if "optimizer" in case.info:
        quantities += _training(case, pipe, program, mode)
    return quantities


def _program(case: Case, pipe: Pipeline, objective: Objective, sigmas: np.ndarray,
             draws: tuple[str, ...] = ("noise", "timestep_index", "posterior_noise")) -> Program:
    """The pipeline's training program without the units whose results the case records."""
    given = dict.fromkeys(draws) | case.given(0) if "noise_offset_draw" in draws else case.given(0)
    draws = [name for name in given if name in draws]
    whole = pipe.training_program(objective, sigmas)
    template = [ReadRecordedKeys()] if "template_model" in pipe.models else []
    units, known = [], set(given)
    for unit in (*template, *whole.units):
        is_runnable = all(is_optional(param) or slot(param) in known for param in unit.input_params)
        if is_runnable and not set(unit.output_params) & set(given):
            units.append(unit)
            known |= set(unit.output_params)
    return Program(units, [n for n in given if n not in draws], draws)


def _slots(case: Case, k: int) -> dict[str, Any]:
    """What the case fixes, as Tensors."""
    return {name: Tensor(value) if isinstance(value, np.ndarray) else value for name, value in case.given(k).items()}


def _tensors(case: Case, pipe: Pipeline, cut: Cut, k: int) -> list[Tensor]:
    slots = _slots(case, k)
    slots |= pipe.run(cut.prepare, {n: v for n, v in slots.items() if n in cut.inputs})
    return [slots[name] for name in (*cut.cache, *cut.draws)]


def _first_evaluation(case: Case, pipe: Pipeline, program: Program, mode: str) -> list[Quantity]:
    """Values and every gradient of what is trained, with the base weights alone."""
    trained, predicted = case.info.get("trained", pipe.network), pipe.denoise.output_params[0]
    expected = {predicted if name in ("noise_pred", "velocity") else EXPECTED.get(name, name): name
                for name in case.expected}  # slot -> its name in the case
    observed = [s for s in ("input_latents", "latents", *pipe.denoise.output_params) if s not in program.inputs]
    observed += [s for s in ("condition", "given_latents") if s in expected]
    fused = [unit.name for unit in program.units if unit.is_always_fused or unit.name in pipe.fusible]
    cut = program.cut(("loss", "sample_losses", *observed), (trained,), fused)
    parameters = {name: p for model in (trained, "template_model") if model in cut.models("step")
                  for name, p in trainable_parameters(getattr(pipe, model)).items()}
    for parameter in parameters.values():
        parameter.requires_grad = True
    step = CompiledStep(Gradients(UnitSequence(cut, pipe), list(parameters.values())).run, "the gradients", mode)
    values = step(*_tensors(case, pipe, cut, 0))
    arrays = [to_numpy(v).astype(np.float32) for v in values]
    slots, found = dict(zip(cut.outputs, arrays)), dict(zip(parameters, arrays[len(cut.outputs):]))
    quantities = [case.value(expected[slot].replace("_", " "), slots[slot], case.expected[expected[slot]])
                  for slot in observed]
    quantities.append(Quantity("loss", relative_error(slots["loss"], case.expected["loss"]), case.tolerances.loss))
    recorded = {name: case.expected[f"grad.{name}"] for name in found}
    pairs = {name: (case.rows(name, gradient).reshape(recorded[name].shape), recorded[name])
             for name, gradient in found.items()}
    return [*quantities, case.gradients("gradients", pairs)]


def _options(case: Case, pipe: Pipeline, objective: Objective) -> list[Quantity]:
    """The first evaluation with one option of the objective changed, as far as the case has it: values without
    gradients, of noise offset, min-SNR weights and a zero terminal SNR."""
    found, options = [], case.info.get("options", {})
    changes = {"noise_offset": {"noise_offset": options.get("noise_offset")},
               "min_snr": {"snr_gamma": options.get("min_snr_gamma")}, "zero_snr": {"zero_terminal_snr": True}}
    for name, change in changes.items():
        if f"{name}.loss" not in case.expected:
            continue
        changed = replace(objective, **change)
        schedule = pipe.schedule_for(changed)
        for what, values, tolerance in (("alphas_cumprod", schedule.alphas_cumprod, 1e-6),
                                        ("weights", schedule.loss_weights(changed.snr_gamma), 1e-5)):
            if (grid := f"grid.{name}_{what}") in case.inputs:
                error = relative_error(values, case.inputs[grid])
                found.append(Quantity(f"{name}: {what}", error, tolerance))
        slots = _slots(case, 0)
        slots |= {slot: Tensor(case.inputs[key].astype(dtype)) for slot, key, dtype in (
            ("noise_offset_draw", "noise_offset_draw", np.float32),
            ("timestep_index", f"{name}.timestep_index", np.int32)) if key in case.inputs}
        slots = pipe.run(_program(case, pipe, changed, schedule.sigmas, tuple(changed.draws)).units, slots)
        for what in ("latents", "target", pipe.denoise.output_params[0], "loss"):
            recorded = next((key for key in (f"{name}.{what}", f"{name}.noisy_{what}", f"{name}.velocity"
                                             if what == "prediction" else "") if key in case.expected), None)
            if recorded:
                tolerance = case.tolerances.loss if what == "loss" else case.tolerances.value
                error = relative_error(to_numpy(slots[what]).astype(np.float32), case.expected[recorded])
                found.append(Quantity(f"{name}: {what}", error, tolerance))
    return found


def _references(case: Case, pipe: Pipeline, program: Program) -> list[Quantity]:
    """Latents of the references, and the velocity of rows that have none."""
    given = _slots(case, 0)
    cut = program.cut((*pipe.denoise.output_params,))
    prepared = pipe.run(cut.prepare, given)
    encode = next(unit for unit in program.units if "edit_latents" in unit.output_params)
    recorded = [case.expected[f"reference_latents.{k}"] for k in range(len(case.references))]
    tokens = np.concatenate([encode.tokens(Tensor(latents)).asnumpy() for latents in recorded], 1)
    found = [case.value("reference latents", prepared["edit_latents"].asnumpy(), tokens)]
    if "velocity_without_reference" not in case.expected:
        return found
    prepared = pipe.run(cut.prepare, given | {"edit_pixels": []})
    latents = Tensor(case.expected["noisy_latents"])
    batch, sigma = latents.shape[0], case.inputs["grid.sigmas"][case.given(0)["timestep_index"]]
    condition = {name: prepared[name] for name in cut.cache if name in map(slot, pipe.denoise.input_params)}
    condition |= {name: ops.broadcast_to(prepared[name], (batch, *prepared[name].shape[1:]))
                  for name in ("edit_latents", "edit_places")}
    if pipe.takes_guidance:
        condition["guidance"] = Tensor(np.full(batch, case.objective.guidance_scale, np.float32))
    velocity = pipe.denoiser(condition)(latents, Tensor(sigma.astype(np.float32)))
    return [*found, case.value("velocity without reference", to_numpy(velocity).astype(np.float32),
                               case.expected["velocity_without_reference"])]


def _without_control(case: Case, pipe: Pipeline) -> Quantity:
    """The velocity without the control image."""
    given, latents = _slots(case, 0), Tensor(case.expected["noisy_latents"])
    sigma = case.inputs["grid.sigmas"][case.given(0)["timestep_index"]]
    condition = {name: given[name] for name in map(slot, pipe.denoise.input_params)
                 if name in given and name not in case.control}
    if pipe.takes_guidance:
        condition["guidance"] = Tensor(np.full(latents.shape[0], case.objective.guidance_scale, np.float32))
    velocity = pipe.denoiser(condition)(latents, Tensor(sigma.astype(np.float32)))
    return case.value("velocity without control", to_numpy(velocity).astype(np.float32),
                      case.expected["velocity_without_control"])


def _sample(case: Case, pipe: Pipeline, program: Program) -> list[Quantity]:
    """Latents that are sampled for the first row, from recorded noise."""
    how, noise = case.info["sample"], case.inputs["sample.noise"]
    sigmas = pipe.sampling_sigmas(how["steps"], noise.shape[1:])
    guidance = Tensor(np.full(1, how.get("guidance_scale", 1.0), np.float32))
    prepared = pipe.run(program.cut((*pipe.denoise.output_params,)).prepare, _slots(case, 0))
    same = {name: prepared[name][:1] for name in ("edit_latents", "edit_places") if name in prepared}
    same |= {"guidance": guidance} if pipe.takes_guidance else {}
    branches = []
    for start in ("", "negative_"):
        prompt = {name: Tensor(case.inputs[start + name][:1]) for name in ("prompt_embeds", "pooled_prompt_embeds")
                  if start + name in case.inputs}
        branches.append(prompt | same if prompt else None)
    latents = pipe.integrate(*branches, noise, sigmas, how["cfg_scale"])
    return [Quantity("sampling sigmas", relative_error(sigmas, case.expected["sample.sigmas"]), 1e-6),
            case.value("sampled latents", latents.asnumpy(), case.expected["sample.latents"])]


class RecordedKeys(nn.Cell):
    """A template whose keys and values are what it learns: those a case records, by their names there."""

    def __init__(self, inputs: dict[str, np.ndarray]):
        super().__init__()
        names = sorted(name for name in inputs if name.startswith("kv_cache."))
        self.blocks = tuple(dict.fromkeys(name.split(".")[1] for name in names))
        self.tensors = ParameterTuple([Parameter(Tensor(inputs[f"kv_cache.{block}.{side}"]),
                                                 name=f"kv_cache.{block}.{side}")
                                       for block in self.blocks for side in "kv"])

    def construct(self):
        kv_cache = {}
        for k in range(len(self.blocks)):
            kv_cache[self.blocks[k]] = (self.tensors[2 * k], self.tensors[2 * k + 1])
        return {"kv_cache": kv_cache}


class ReadRecordedKeys(TensorUnit):
    """The template cache of a case."""

    output_params = ("template_cache",)
    onload_model_names = ("template_model",)
    is_always_fused = True

    def construct(self):
        return (self.template_model(),)


def _training(case: Case, pipe: Pipeline, program: Program, mode: str) -> list[Quantity]:
    """The recorded optimizer steps, on the case's LoRA or, where it has none, on every weight of the network."""
    settings, expected, network = case.info["optimizer"], case.expected, getattr(pipe, pipe.network)
    module = DiffusionTrainingModule()
    module.pipe, module.trainable = pipe, (pipe.network,)
    module.lora_base_models = (pipe.network,) if "lora" in case.info else ()
    if "lora" in case.info:
        lora = case.info["lora"]
        module.adapter.inject(network, lora["target_modules"], lora["rank"], lora["alpha"])
        module.adapter.load(network, {name: case.inputs[f"lora.{name}"] for name in module.adapter.tensors(network)})
    fused = [unit.name for unit in program.units if unit.is_always_fused]
    cut = program.cut(("loss", "sample_losses"), (pipe.network,), fused)
    parameters = module.trainable_parameters()
    kind = ShardedAdamW if needs_float32(parameters) else AdamW
    optimizer = kind(parameters, learning_rate=settings["lr"], betas=tuple(settings["betas"]),
                      eps=settings["eps"], weight_decay=settings["weight_decay"])
    step = ProgramTrainStep(module, cut, optimizer, max_grad_norm=settings["max_grad_norm"], mode=mode)
    count = len(expected["train.losses"])
    results = [step.step(*_tensors(case, pipe, cut, k + 1)) for k in range(count)]
    losses = np.array([r.loss.asnumpy() for r in results])
    quantities = [Quantity(f"losses of {count} steps", relative_error(losses, expected["train.losses"]),
                           case.tolerances.losses)]
    if "train.grad_norms" in expected:
        norms = np.array([r.grad_norm.asnumpy() for r in results])
        quantities.append(Quantity("gradient norms", relative_error(norms, expected["train.grad_norms"]),
                                   case.tolerances.gradient))
    if "lora" in case.info:
        weights = module.adapter.tensors(network)
    else:
        weights = {name: case.rows(name, array) for name, array in state_dict(network).items()}
    pairs = {name: (array, expected[f"train.{name}"]) for name, array in weights.items()}
    trained = "LoRA" if "lora" in case.info else "weights"
    return [*quantities, together(f"{trained} after {count} steps", pairs, case.tolerances.trained)]
