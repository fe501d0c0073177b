"""Training in reference cases from end to end: image files and captions go in, losses and weights come out."""
from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from mindspore import Parameter, Tensor
from mindspore.amp import StaticLossScaler

from ms_diffsynth.compile import CompiledStep
from ms_diffsynth.data.dataset import UnifiedDataset
from ms_diffsynth.data.loader import collate
from ms_diffsynth.debug.compare import Quantity, relative_error, together, worst
from ms_diffsynth.debug.gradients import Gradients
from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.diffusion.weighting import table
from ms_diffsynth.nn.adapters.layer import adapted_layers
from ms_diffsynth.nn.ema import EMA
from ms_diffsynth.nn.names import to_numpy, torch_parameters
from ms_diffsynth.pipeline import UnitSequence
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.training.optim import AdamW, LearningRate
from ms_diffsynth.training.prepared import PreparedRows
from ms_diffsynth.training.program_step import ProgramTrainStep

if TYPE_CHECKING:
    from ms_diffsynth.debug.end_to_end import EndToEndCase

SIGMAS, LOSS, GRADIENT, TRAINED = 1e-6, 1e-5, 1e-4, 1e-4  # largest relative error allowed, float32


def check_training(case: EndToEndCase, run: dict[str, Any], mode: str) -> list[Quantity]:
    """One recorded training run: the grid, the first loss and its gradients, and what five updates make of it."""
    return Training(case, run, mode).quantities()


class Training:
    """A recorded training run on a pipeline of its own, set up as a user's job is."""

    def __init__(self, case: EndToEndCase, run: dict[str, Any], mode: str):
        self.case, self.run, self.mode = case, run, mode
        self.name = run["name"]
        self.module = DiffusionTrainingModule()
        self.pipe = self.module.pipe = case.pipeline()
        if run["max_sequence_length"]:
            self.pipe.max_sequence_length = run["max_sequence_length"]
        network = self.pipe.network
        objective = None  # the family's own
        if "objective" in run:
            objective = self.pipe.objective_class(**run["objective"])
        if self.pipe.objective_class is None:
            objective = Objective(**{name: run[name] for name in ("weighting_scheme", "posterior", "guidance_scale",
                                                                  "prior_loss_weight")})
        kind = {"lora_base_model": network, "lora_rank": run["lora_rank"], "lora_alpha": run["lora_alpha"]}
        self.module.switch_pipe_to_training_mode(
            self.pipe, task=run["task"], objective=objective, extra_inputs=run["extra_inputs"],
            **(kind if run["lora_rank"] else {"trainable_models": network}))
        self.network = getattr(self.pipe, network)
        if run["lora_rank"]:
            start = f"{self.name}.lora"
            self.module.adapter.load(self.network, {name: case.inputs[f"{start}.{name}"]
                                                    for name in self.module.adapter.tensors(self.network)})
        self.parameters = self.module.trainable_parameters()
        self.cut = self.module.training_cut()
        metadata = case.scratch / f"{self.name}.jsonl"
        metadata.write_text("".join(json.dumps(row) + "\n" for row in run["rows"]), encoding="utf-8")
        dataset = UnifiedDataset(base_path=str(case.folder / "images"), metadata_path=str(metadata),
                                 data_file_keys=",".join(filter(None, ("image", run["extra_inputs"]))),
                                 main_data_operator=case.operator(run["height"], run["width"]))
        self.rows = PreparedRows(dataset, self.module, self.cut)

    def _inputs(self, k: int) -> list[Tensor]:
        """What the step takes at micro-step ``k``: prepared rows, and the recorded draws."""
        slots = collate([self.rows[row].slots for row in self.run["batches"][k]])
        def recorded(stream, kind, shape):
            return self.case.inputs[f"{self.name}.{stream}"][k]

        slots |= {name: self.pipe.objective.draw(name, (), len(self.pipe.sigmas), recorded)
                  for name in self.cut.draws}
        return [Tensor(slots[name]) for name in (*self.cut.cache, *self.cut.draws)]

    def _expected(self, name: str) -> np.ndarray:
        return self.case.wanted(f"{self.name}.{name}")

    def _pairs(self, kind: str, parameters: Iterable[Parameter | Tensor]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Name -> (found, expected) of one tensor for each trained weight, of the matrices of a LoRA each."""
        torch_names = {id(p): name for name, p in torch_parameters(self.network).items()}
        flats = {id(cell.flat.flat): cell.flat for cell in adapted_layers(self.network).values()
                 if cell.flat is not None}
        pairs = {}
        for own, tensor in zip(self.parameters, parameters):
            array = to_numpy(tensor)
            own_name = own.name if self.run["lora_rank"] else torch_names[id(own)]
            for name, found in (flats[id(own)].matrices(array) if id(own) in flats else {own_name: array}).items():
                wanted = self._expected(f"{kind}.{name}")
                pairs[name] = (self.case.rows(found).reshape(wanted.shape), wanted)
        return pairs

    def quantities(self) -> list[Quantity]:
        found = [Quantity(f"{self.name}: sigma grid", relative_error(self.pipe.sigmas, self._expected("grid.sigmas")),
                          SIGMAS)]
        if f"{self.name}.grid.weights" in self.case.expected:
            weights = table(self.run["weighting_scheme"], self.pipe.sigmas)
            error = relative_error(weights, self._expected("grid.weights"))
            found.append(Quantity(f"{self.name}: loss weights", error, LOSS))
        return [*found, *self._first(), *self._updates()]

    def _first(self) -> list[Quantity]:
        """Loss and gradients at the first micro-step."""
        gradients = Gradients(UnitSequence(self.cut, self.pipe), self.parameters)
        values = CompiledStep(gradients.run, "the gradients", self.mode)(*self._inputs(0))
        loss, found = values[0].asnumpy(), values[len(self.cut.outputs):]
        return [Quantity(f"{self.name}: first loss", relative_error(loss, self._expected("first_loss")), LOSS),
                worst(f"{self.name}: gradients", self._pairs("grad", found), GRADIENT)]

    def _updates(self) -> list[Quantity]:
        """Losses, norms, learning rates, weights and their average over the recorded updates."""
        run, count = self.run, len(self._expected("losses"))
        optimizer = AdamW(self.parameters, learning_rate=run["learning_rate"], weight_decay=run["weight_decay"])
        ema = EMA(optimizer.parameters, run["ema_decay"]) if run["ema_decay"] else None
        scaler = StaticLossScaler(run["loss_scale"]) if run["loss_scale"] != 1 else None
        step = ProgramTrainStep(self.module, self.cut, optimizer, loss_scaler=scaler, ema=ema, mode=self.mode,
                                max_grad_norm=run["max_grad_norm"],
                                gradient_accumulation_steps=run["gradient_accumulation_steps"],
                                gradient_accumulation_kwargs={"length_of_dataloader": run["batches_per_epoch"]})
        rate = LearningRate(schedule=run["lr_scheduler"], base=run["learning_rate"],
                            warmup_steps=run["lr_warmup_steps"], total_steps=count)
        found: dict[str, list[float]] = {"losses": [], "grad_norms": [], "learning_rates": []}
        losses, quantities = [], []
        for k in range(len(run["batches"])):
            optimizer.set_learning_rate(rate(len(found["losses"])))
            result = step.step(*self._inputs(k))
            losses.append(float(result.loss.asnumpy()))
            if not result.is_update:
                continue
            for name, value in zip(found, (np.mean(losses), result.grad_norm.asnumpy(), rate(len(found["losses"])))):
                found[name].append(float(value))
            losses = []
            if ema is not None and len(found["losses"]) == 1:
                pairs = self._pairs("ema_first", ema.average)
                quantities.append(together(f"{self.name}: EMA after 1 update", pairs, TRAINED))
        for name, tolerance in (("losses", LOSS), ("grad_norms", TRAINED), ("learning_rates", SIGMAS)):
            error = relative_error(np.array(found[name], np.float32), self._expected(name))
            quantities.append(Quantity(f"{self.name}: {name.replace('_', ' ')} of {count} updates", error, tolerance))
        kind = "LoRA" if run["lora_rank"] else "weights"
        trained = together(f"{self.name}: {kind} after {count}", self._pairs("trained", self.parameters), TRAINED)
        averaged = [] if ema is None else [together(f"{self.name}: EMA after {count}",
                                                    self._pairs("ema", ema.average), TRAINED)]
        return [*quantities, trained, *averaged]
