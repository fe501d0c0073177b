"""``ms-diffsynth parity DIR...``: recompute reference cases of PyTorch implementations and compare every number.

The format of a case is in docs/parity.md. Everything runs through the family's own units, step and optimizer, with the
draws the case recorded. A case that cannot be run is an error, never a skip.
"""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
from mindspore import Tensor, nn

from ms_diffsynth import runtime
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.diffusion.weighting import table
from ms_diffsynth.errors import DataError, UserError
from ms_diffsynth.io.weights import load_state_dict
from ms_diffsynth.nn.lora import inject_lora, lora_pairs, set_lora
from ms_diffsynth.nn.names import torch_parameters
from ms_diffsynth.pipeline import Pipeline, Source, UnitSequence
from ms_diffsynth.program import Cut, Program
from ms_diffsynth.registry import family
from ms_diffsynth.train.compile import CompiledStep
from ms_diffsynth.train.module import DiffusionTrainingModule
from ms_diffsynth.train.optim import AdamW
from ms_diffsynth.train.program_step import ProgramTrainStep

LOSS, VALUE, GRADIENT, TRAINED = 1e-5, 1e-5, 1e-4, 1e-4  # largest relative error allowed, float32
OBJECTIVES = {"flow_match_sft": "sft", "flux_dreambooth": "dreambooth"}
OBSERVED = ("loss", "sample_losses", "input_latents", "latents", "velocity")


@dataclass(frozen=True)
class Quantity:
    """One compared quantity. ``error`` is the largest difference relative to the reference's largest element."""

    name: str
    error: float
    tolerance: float
    where: str = ""

    @property
    def passes(self) -> bool:
        return self.error <= self.tolerance  # NaN fails

    def __str__(self) -> str:
        verdict = "ok  " if self.passes else "FAIL"
        where = f"  ({self.where})" if self.where else ""
        return f"  {verdict} {self.name:<28} {self.error:9.1e}  <= {self.tolerance:.0e}{where}"


def relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    """Largest difference over the largest expected element; NaN counts as infinite."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if found.shape != expected.shape:
        raise DataError(f"shape {found.shape} was computed where the reference holds {expected.shape}: the case and "
                        "the pipeline disagree about a size.")
    scale = np.abs(expected).max(initial=0.0)
    error = np.abs(found - expected).max(initial=0.0) / (scale if scale > 0 else 1.0)
    return float(error) if np.isfinite(error) else float("inf")


def worst(name: str, pairs: dict[str, tuple[np.ndarray, np.ndarray]], tolerance: float) -> Quantity:
    """The worst of many tensors, each relative to its own largest element."""
    errors = {key: relative_error(*pair) for key, pair in pairs.items()}
    key = max(errors, key=errors.get)
    return Quantity(f"{name} ({len(errors)} tensors)", errors[key], tolerance, key)


def together(name: str, pairs: dict[str, tuple[np.ndarray, np.ndarray]], tolerance: float) -> Quantity:
    """All tensors as one vector, in the Euclidean norm; the largest single error is shown, but does not decide.

    Adam's first updates are lr g / (|g| + eps): where a gradient is near eps they magnify its last bit, so that even
    two versions of the reference differ by 2e-3 in a single weight of the case flux (docs/parity.md).
    """
    single = worst(name, pairs, tolerance)
    difference = sum(np.square(np.asarray(a, np.float64) - b).sum() for a, b in pairs.values())
    size = sum(np.square(np.asarray(b, np.float64)).sum() for _, b in pairs.values())
    return Quantity(single.name, float(np.sqrt(difference / size)), tolerance,
                    f"largest single error {single.error:.0e} in {single.where}")


class Case:
    """A reference case, loaded."""

    def __init__(self, folder: Path):
        self.folder = folder
        try:
            self.info: dict[str, Any] = json.loads((folder / "case.json").read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise DataError(f"{folder} is no reference case: it has no case.json. Give a folder such as "
                            "tests/golden/flux.") from None
        except ValueError as error:
            raise DataError(f"{folder / 'case.json'} is not JSON ({error}): copy the case again.") from None
        if self.info.get("objective") not in OBJECTIVES:
            raise DataError(f"{folder / 'case.json'}: objective {self.info.get('objective')!r} cannot be run; expected "
                            f"one of {', '.join(OBJECTIVES)}.")
        self.inputs = load_state_dict(folder / "inputs.safetensors")
        self.expected = load_state_dict(folder / "expected.safetensors")

    @property
    def objective(self) -> Objective:
        info = self.info
        return Objective(weighting_scheme=info["loss_weighting"], density=info.get("density"),
                         logit_mean=info.get("logit_mean", 0.0), logit_std=info.get("logit_std", 1.0),
                         posterior=info["posterior"], guidance_scale=info.get("guidance_scale", 1.0),
                         prior_loss_weight=info["prior_loss_weight"] if info.get("with_prior_preservation") else None)

    def pipeline(self) -> Pipeline:
        """The family's pipeline with the case's models."""
        pipe = family(self.info["family"]).pipeline(dtype=ms.float32)
        for component in pipe.components:
            if (self.folder / component.folder / "config.json").is_file():
                pipe.sources[component.name] = Source(self.folder / component.folder)
        return pipe

    def given(self, k: int) -> dict[str, np.ndarray]:
        """Slots that the case fixes at evaluation ``k``; draws are recorded for each evaluation."""
        names = {"pixels", "prompt_embeds", "pooled_prompt_embeds", "posterior_noise"} & set(self.inputs)
        slots = {name: self.inputs[name] for name in sorted(names)}
        if "density_normal" in self.inputs:  # one evaluation, from the density's raw draw
            return slots | {"noise": self.inputs["noise"], "density_draw": self.inputs["density_normal"]}
        index = self.inputs["timestep_index"][k].astype(np.int32)
        return slots | {"noise": self.inputs["noise"][k], "timestep_index": index}


def check_case(folder: Path, mode: str) -> list[Quantity]:
    """Run one case in ``mode`` and return every compared quantity."""
    case = Case(Path(folder))
    pipe, objective = case.pipeline(), case.objective
    schedule = pipe.training_schedule(OBJECTIVES[case.info["objective"]])
    grid = case.inputs["grid.sigmas"]
    quantities = [Quantity("sigma grid", relative_error(schedule.sigmas, grid), 1e-6)]
    if "grid.weights" in case.inputs:
        weights = table(objective.weighting_scheme, schedule.sigmas)
        quantities.append(Quantity("loss weights", relative_error(weights, case.inputs["grid.weights"]), LOSS))
    program = _program(case, pipe, objective, schedule.sigmas)
    quantities += _first_evaluation(case, pipe, program, mode)
    if "lora" in case.info:
        quantities += _training(case, pipe, program, mode)
    return quantities


def _program(case: Case, pipe: Pipeline, objective: Objective, sigmas: np.ndarray) -> Program:
    """The pipeline's training program without the units whose results the case records."""
    given = case.given(0)
    draws = [name for name in given if name in ("noise", "timestep_index", "density_draw", "posterior_noise")]
    whole = pipe.training_program(objective, sigmas)
    units = [u for u in whole.units if not set(u.output_params) & set(given)]
    return Program([u for u in units if "prompt" not in u.input_params], [n for n in given if n not in draws], draws)


def _tensors(case: Case, pipe: Pipeline, cut: Cut, k: int) -> list[Tensor]:
    slots = {name: Tensor(value) for name, value in case.given(k).items()}
    slots |= pipe.run(cut.prepare, {n: v for n, v in slots.items() if n in cut.inputs})
    return [slots[name] for name in (*cut.cache, *cut.draws)]


def _first_evaluation(case: Case, pipe: Pipeline, program: Program, mode: str) -> list[Quantity]:
    """Values and every gradient of the network with the base weights alone."""
    cut = program.cut(OBSERVED, ("dit",), (*pipe.fusible, "sample_latents"))
    parameters = torch_parameters(pipe.dit)
    for parameter in parameters.values():
        parameter.requires_grad = True
    step = CompiledStep(_Gradients(UnitSequence(cut, pipe), list(parameters.values())).run, "the gradients", mode)
    values = step(*_tensors(case, pipe, cut, 0))
    slots = dict(zip(OBSERVED, [v.asnumpy() for v in values[: len(OBSERVED)]]))
    slots["noisy_latents"] = slots.pop("latents")
    found = dict(zip(parameters, [v.asnumpy() for v in values[len(OBSERVED) :]]))
    expected = case.expected
    quantities = [Quantity(name.replace("_", " "), relative_error(slots[name], expected[name]), VALUE)
                  for name in ("input_latents", "noisy_latents", "velocity")]
    quantities.append(Quantity("loss", relative_error(slots["loss"], expected["loss"]), LOSS))
    pairs = {n: (g.reshape(expected[f"grad.{n}"].shape), expected[f"grad.{n}"]) for n, g in found.items()}
    return [*quantities, worst("gradients", pairs, GRADIENT)]


class _Gradients(nn.Cell):
    """Outputs of a sequence followed by the gradients of the first one."""

    def __init__(self, sequence: UnitSequence, parameters: list):
        super().__init__(auto_prefix=False)
        self.value_and_grad = ms.value_and_grad(sequence, None, tuple(parameters), has_aux=True)

    def run(self, *inputs):
        values, gradients = self.value_and_grad(inputs)
        return values + gradients


def _training(case: Case, pipe: Pipeline, program: Program, mode: str) -> list[Quantity]:
    """The recorded optimizer steps on the case's LoRA."""
    lora, settings, expected = case.info["lora"], case.info["optimizer"], case.expected
    inject_lora(pipe.dit, lora["target_modules"], lora["rank"], lora["alpha"])
    set_lora(pipe.dit, {n: (case.inputs[f"lora.{n}.lora_A.weight"], case.inputs[f"lora.{n}.lora_B.weight"])
                        for n in lora["target_modules"]})
    module = DiffusionTrainingModule()
    module.pipe, module.trainable, module.lora_base_model = pipe, ("dit",), "dit"
    cut = program.cut(("loss", "sample_losses"), ("dit",), ("sample_latents",))
    optimizer = AdamW(module.trainable_parameters(), learning_rate=settings["lr"], betas=tuple(settings["betas"]),
                      eps=settings["eps"], weight_decay=settings["weight_decay"])
    step = ProgramTrainStep(module, cut, optimizer, max_grad_norm=settings["max_grad_norm"], mode=mode)
    count = len(expected["train.losses"])
    results = [step.step(*_tensors(case, pipe, cut, k + 1)) for k in range(count)]
    losses = np.array([r.loss.asnumpy() for r in results])
    norms = np.array([r.grad_norm.asnumpy() for r in results])
    pairs = {}
    for name, (a, b) in lora_pairs(pipe.dit).items():
        pairs[f"{name}.lora_A"] = (a, expected[f"train.{name}.lora_A.weight"])
        pairs[f"{name}.lora_B"] = (b, expected[f"train.{name}.lora_B.weight"])
    return [Quantity(f"losses of {count} steps", relative_error(losses, expected["train.losses"]), TRAINED),
            Quantity("gradient norms", relative_error(norms, expected["train.grad_norms"]), TRAINED),
            together(f"LoRA after {count} steps", pairs, TRAINED)]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The cases, and the modes to run them in."""
    parser.add_argument("cases", nargs="+", metavar="DIR", type=Path, help="folders that hold a case.json")
    parser.add_argument("--mode", choices=[*runtime.MODES, "both"], default="both",
                        help="graph, pynative or both (default: both)")


def execute(args: argparse.Namespace) -> int:
    """Check every case in every mode; 0 only when every quantity is within its tolerance."""
    failures = 0
    for folder in args.cases:
        for mode in runtime.MODES if args.mode == "both" else (args.mode,):
            runtime.configure(mode)
            _say(f"{folder} ({mode})")
            try:
                quantities = check_case(folder, mode)
            except UserError as error:
                raise type(error)(f"case {folder}: {error}") from error
            for quantity in quantities:
                _say(str(quantity))
            failures += sum(not q.passes for q in quantities)
    _say(f"{failures} quantities are out of tolerance" if failures else "all quantities are within tolerance")
    return 1 if failures else 0


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
