"""A module's own forward: compiled where its loss is FlowMatchSFTLoss alone; otherwise the price is said."""
from __future__ import annotations

from collections import Counter

import mindspore as ms
import numpy as np
import pytest
import toy_run
from records import column
from toy_run import Module, rows

from ms_diffsynth.diffusion.units import Objective
from ms_diffsynth.errors import DataError, ProgramError, TrainingError
from ms_diffsynth.registry import family
from ms_diffsynth.training import own_forward
from ms_diffsynth.training.losses import FlowMatchSFTLoss
from ms_diffsynth.training.module import DiffusionTrainingModule
from ms_diffsynth.units import PipelineUnit, TensorUnit, run_unit


class Documented(Module):
    """The documents' script: units one by one, then the loss."""

    inputs: dict = {}

    def forward(self, data):
        self.calls = getattr(self, "calls", 0) + 1
        shared = {"input_image": data["image"], "height": 16, "width": 16, **self.inputs}
        posi, nega = {"prompt": data["prompt"]}, {}
        for unit in self.pipe.units:
            shared, posi, nega = self.pipe.unit_runner(unit, self.pipe, shared, posi, nega)
        return self.finished(FlowMatchSFTLoss(self.pipe, **shared, **posi))

    def finished(self, loss):
        return loss


def train(module, path, mode="graph", data=None, **options):
    options = {"num_epochs": 2, "batch_size": 1} | options
    toy_run.train(path, module, rows(3) if data is None else data, mode, **options)
    return column(path).tolist()


@pytest.mark.parametrize("how", [{}, {"objective": Objective(posterior="sample")}, {"trainable_models": "dit"}])
@pytest.mark.few(1)
def test_it_is_compiled_and_trains_the_same_numbers(how, folder, tmp_path, capsys):
    wanted = train(Module(folder, **how), tmp_path / "plain", batch_size=2)
    own = Documented(folder, **how)
    assert train(own, tmp_path / "own", batch_size=2) == wanted
    assert "in graph mode, by the module's own forward" in capsys.readouterr().err
    found = train(Documented(folder, **how), tmp_path / "eager", "pynative", batch_size=2)
    assert found == pytest.approx(wanted, rel=1e-5)
    assert own.calls == 1 + 2 * 4  # the first look, then each row of each batch


class Doubled(Documented):
    def finished(self, loss):
        return loss * 2


class Read(Documented):
    def finished(self, loss):
        print(float(loss))
        return loss


@pytest.mark.parametrize("kind", [Doubled, Read])
@pytest.mark.few(1)
def test_a_loss_that_is_changed_is_differentiated_as_it_stands(kind, folder, tmp_path, capsys):
    found = train(kind(folder), tmp_path / "own")
    said = capsys.readouterr().err
    assert f"{kind.__name__}.forward is not compiled: it needs the value of the loss (TypeError" in said
    assert "eagerly, by the module's own forward" in said
    factor = 2 if kind is Doubled else 1
    assert found[0] == pytest.approx(factor * train(Module(folder), tmp_path / "plain")[0], rel=1e-5)


def test_what_learns_in_the_units_is_differentiated_as_it_stands(folder, tmp_path, capsys):
    train(Documented(folder, trainable_models="text_encoder"), tmp_path / "own", num_epochs=1)
    assert "text_encoder learns in the units that it runs" in capsys.readouterr().err


def test_another_loss_for_another_row_is_refused(folder, tmp_path):
    class Moody(Documented):
        def finished(self, loss):
            return loss if self.calls < 3 else ms.Tensor(1.0)

    with pytest.raises(TrainingError, match=r"something else for another one.*mode pynative"):
        train(Moody(folder), tmp_path / "own")


def test_an_error_of_a_row_is_that_error(folder, tmp_path):
    class Picky(Documented):
        def forward(self, data):
            raise DataError("this row is not good")

    with pytest.raises(DataError, match="this row is not good"):
        train(Picky(folder), tmp_path / "own")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["pynative", pytest.param("graph", marks=pytest.mark.slow)])
def test_gradient_checkpointing_among_its_inputs_is_obeyed(mode, tiny_model, tmp_path):
    class Flux(Documented):
        def __init__(self, folder):
            DiffusionTrainingModule.__init__(self)
            self.pipe = family("flux").pipeline.from_pretrained(str(folder))
            self.switch_pipe_to_training_mode(self.pipe, lora_base_model="dit", lora_rank=2)

    wanted = train(Flux(tiny_model("flux")), tmp_path / "plain", mode, num_epochs=1)
    module = Flux(tiny_model("flux"))
    module.inputs = {"use_gradient_checkpointing": True, "use_gradient_checkpointing_offload": False}
    assert train(module, tmp_path / "own", mode, num_epochs=1) == wanted
    dit = module.pipe.dit
    blocks = [*dit.transformer_blocks, *dit.single_transformer_blocks]
    assert blocks and all(block.is_recomputed for block in blocks)


def test_model_fn_cannot_be_assigned(folder):
    pipe = Module(folder).pipe
    with pytest.raises(ProgramError, match=r"assign that to pipe\.denoise"):
        pipe.model_fn = lambda **slots: slots["latents"]


def test_units_run_once_for_equal_inputs(folder, tmp_path, monkeypatch):
    counts = Counter()

    def counted(unit, pipe, slots):
        counts[unit.name] += 1
        return run_unit(unit, pipe, slots)

    class Mine(PipelineUnit):
        """A unit of someone else's may draw: it runs every time."""

        input_params, output_params = ("prompt",), ("mine",)

        def process(self, pipe, prompt):
            return {"mine": prompt}

    monkeypatch.setattr(own_forward, "run_unit", counted)
    module = Documented(folder)
    module.pipe.units.append(Mine())
    data = [row | {"prompt": "the same"} for row in rows(3)]
    found = train(module, tmp_path / "own", data=data, num_epochs=4)
    assert counts.pop("mine") == module.calls == 13
    assert all(n == (1 if "prompt" in name or "text" in name else 3) for name, n in counts.items()), counts
    assert found == train(Module(folder), tmp_path / "plain", data=data, num_epochs=4)


def test_what_is_remembered_has_a_limit(folder):
    class Double(TensorUnit):
        input_params, output_params = ("x",), ("y",)

        def construct(self, x):
            return (x * 2,)

    Double.__module__ = "ms_diffsynth.here"
    pipe, unit, memory = Module(folder).pipe, Double(), own_forward.Remembered(limit_bytes=3 * 400)
    for k in range(10):
        made = memory(unit, pipe, {"x": ms.Tensor(np.full(100, k, np.float32))})["y"]
        assert made.asnumpy()[0] == 2 * k and memory.kept_bytes <= 3 * 400
    assert memory(unit, pipe, {"x": ms.Tensor(np.full(100, 9, np.float32))})["y"] is made
    again = memory(unit, pipe, {"x": made})["y"]
    assert again is memory(unit, pipe, {"x": made})["y"] and again.asnumpy()[0] == 36
