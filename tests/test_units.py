"""Units: derived names, the view of the pipeline, missing and wrong slots."""
from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor, nn

from ms_diffsynth.errors import ProgramError
from ms_diffsynth.program import Program
from ms_diffsynth.units import PipelineUnit, TensorUnit, run_unit, run_units


class FakePipe:
    model_names = ("vae", "dit")
    vae = "the vae"
    dit = "the dit"
    dtype = "float32"

    def function_of(self, unit):
        return unit


class ReadCaption(PipelineUnit):
    input_params = ("text", "extra?")
    output_params = ("length",)
    onload_model_names = ("vae",)

    def process(self, pipe, text, extra):
        return {"length": (len(text), extra, pipe.vae, pipe.dtype)}


class AddOne(TensorUnit):
    input_params = ("x",)
    output_params = ("y",)

    def construct(self, x):
        return (x + 1,)


def test_names_are_snake_case_and_documented_constructor_works():
    assert ReadCaption().name == "read_caption" and AddOne().name == "add_one"
    unit = PipelineUnit(input_params=("a",), output_params=("b",), onload_model_names=("vae",))
    assert (unit.input_params, unit.output_params, unit.onload_model_names) == (("a",), ("b",), ("vae",))


def test_a_unit_sees_declared_models_and_optional_slots_as_none():
    assert run_unit(ReadCaption(), FakePipe(), {"text": "cat"}) == {"length": (3, None, "the vae", "float32")}


def test_an_undeclared_model_raises():
    class Reaches(ReadCaption):
        def process(self, pipe, text, extra):
            return {"length": pipe.dit}

    with pytest.raises(ProgramError, match=r"unit 'reaches' touches the model 'dit' without declaring it.*onload"):
        run_unit(Reaches(), FakePipe(), {"text": ""})


def test_missing_inputs_and_wrong_outputs_raise():
    with pytest.raises(ProgramError, match="needs 'text', which was not given"):
        run_unit(ReadCaption(), FakePipe(), {"txt": ""})

    class Wrong(ReadCaption):
        def process(self, pipe, text, extra):
            return {"len": 0}

    with pytest.raises(ProgramError, match=r"returned \['len'\], but declares output_params=\('length',\)"):
        run_unit(Wrong(), FakePipe(), {"text": ""})


def test_units_run_in_order_without_changing_the_slots_given():
    given = {"x": Tensor(np.float32([1, 2]))}
    slots = run_units((AddOne(),), FakePipe(), given)
    assert set(given) == {"x"} and slots["y"].asnumpy().tolist() == [2, 3]


def test_attached_models_keep_their_parameter_names():
    class Uses(TensorUnit):
        onload_model_names = ("vae",)

    pipe = FakePipe()
    pipe.vae = nn.Dense(2, 2)
    before = [p.name for p in pipe.vae.get_parameters()]
    Uses().attach(pipe)
    assert [p.name for p in pipe.vae.get_parameters()] == before


def test_a_unit_with_other_slots_serves_a_second_image():
    class Load(PipelineUnit):
        input_params, output_params = ("image", "size?"), ("pixels",)

        def process(self, pipe, image, size):
            return {"pixels": Tensor(np.float32([image, size or 0]))}

    class Double(TensorUnit):
        input_params, output_params = ("pixels",), ("moments",)

        def construct(self, pixels):
            return (pixels * 2,)

    second = [Load().with_slots({"image": "rejected_image"}, {"pixels": "rejected_pixels"}, "load_rejected"),
              Double().with_slots({"pixels": "rejected_pixels"}, {"moments": "rejected_moments"}, "double_rejected")]
    program = Program([Load(), Double(), *second], ("image", "rejected_image"))
    cut = program.cut(("moments", "rejected_moments"), fuse=("double_rejected",))
    assert [unit.name for unit in cut.prepare] == ["load", "double", "load_rejected"]
    slots = run_units(program.units, FakePipe(), {"image": 1, "rejected_image": 5})
    assert slots["moments"].asnumpy().tolist() == [2, 0] and slots["rejected_moments"].asnumpy().tolist() == [10, 0]
    with pytest.raises(ProgramError, match=r"unit 'double': 'pixel' is not a slot that it reads: .*'pixels'"):
        Double().with_slots({"pixel": "x"})
