"""What the documents let ``forward`` of a template take, and what of a pipeline it may call."""
from __future__ import annotations

import importlib
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from device import DEVICE
from records import column

from ms_diffsynth import DiffusionTrainingModule, TemplatePipeline, load_template_model, runtime
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.registry import family
from ms_diffsynth.run.task import launch_training_task
from ms_diffsynth.template.loading import returned_keys
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.logger import ModelLogger

TRUST = {"trust_template_code": True}
SOURCE = '''
class Plain(nn.Cell):
    def __init__(self):
        super().__init__()
        self.mlp = mint.nn.Linear(1, 32)

    @no_grad()
    def process_inputs(self, scale, **kwargs):
        BEFORE

    def forward(self, ARGUMENTS):
        vectors = self.mlp(VALUE).reshape(1, 2, 2, 8)
        return {"kv_cache": {"double_0": (vectors, ops.sin(vectors))}}


TEMPLATE_MODEL = Plain
'''
ONE = 'return {"value": Tensor([[float(scale)]])}'
TWO = 'return {"value": Tensor([[float(scale)]]), "more": Tensor([[float(scale)]])}'
NAMED = 'found = {"value": Tensor([[float(scale)]])}\n        found["more"] = found["value"]\n        return found'
KINDS = {
    "reserved without defaults": (ONE, "value, use_gradient_checkpointing, use_gradient_checkpointing_offload",
                                  "value"),
    "only kwargs": (ONE, "**kwargs", 'kwargs["value"]'),
    "one named, one of kwargs": (TWO, "value, **kwargs", 'value + kwargs["more"]'),
    "one named, one not used": (TWO, "value, **kwargs", "value"),
    "one with a default": (TWO, "value, more=None, **kwargs", "value + more"),
    "a default that is not given": (ONE, "value, more=2.0, **kwargs", "value * more"),
    "returned under a name": (NAMED, "value, **kwargs", 'value + kwargs["more"]'),
}


@pytest.mark.few(3)  # every kind in one mode
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["pynative", "graph"])
def test_it_is_trained_and_sampled(kind, mode, template, head, toy, row, tmp_path):
    runtime.configure(mode, DEVICE)
    before, arguments, value = KINDS[kind]
    source = SOURCE.replace("BEFORE", before).replace("ARGUMENTS", arguments).replace("VALUE", value)
    folder, module = template(head + source), DiffusionTrainingModule()
    module.pipe = toy()
    module.load_training_template_model(module.pipe, str(folder), **TRUST)
    module.switch_pipe_to_training_mode(module.pipe, trainable_models="template_model", extra_inputs="template_inputs")
    launch_training_task(Accelerator(1, mode, DEVICE), [row(0, (16, 16)), row(1, (16, 16))], module,
                         ModelLogger(tmp_path / "out"), learning_rate=1e-2, max_train_steps=2, num_epochs=None)
    assert len(column(tmp_path / "out")) == 2 and (column(tmp_path / "out", "grad_norm") > 0).all()
    with_template = TemplatePipeline.from_pretrained([folder], torch_dtype=ms.float32, **TRUST)
    image = with_template(toy(), prompt="a", template_inputs=[{"scale": 1}], height=16, width=16, seed=0,
                          num_inference_steps=1)
    assert image.size == (16, 16)


def test_keys_that_code_computes_are_not_guessed():
    def process_inputs(scale):
        found = {key + "s": scale for key in "ab"}
        other = {"c": 1}
        other["d"] = 2
        return found | other

    assert returned_keys(process_inputs) == []


def test_a_template_that_has_no_weights_cannot_learn(template, head, toy):
    source = SOURCE.replace("BEFORE", ONE).replace("ARGUMENTS", "value").replace("self.mlp = mint.nn.Linear(1, 32)", "")
    module = DiffusionTrainingModule()
    module.pipe = toy()
    module.load_training_template_model(module.pipe, str(template(head + source)), **TRUST)
    with pytest.raises(ConfigError, match="'template_model' has no weights at all, so nothing of it can learn"):
        module.switch_pipe_to_training_mode(module.pipe, trainable_models="template_model",
                                            extra_inputs="template_inputs")


@pytest.mark.parametrize("name", ["flux2", "qwen_image"])
def test_a_text_encoder_reads_what_the_tokenizer_returns(name, tiny_model):
    pipe = family(name).pipeline.from_pretrained(str(tiny_model(name)))
    one, two = (pipe.text_encoder(pipe.tokenizer(text)) for text in ("a cat", "a dog that runs"))
    assert one.shape[0] == two.shape[0] == 1 and one.shape[1] < two.shape[1]
    both = pipe.text_encoder(pipe.tokenizer(["a cat", "a dog that runs"], padding=True))
    assert np.allclose(both[1].asnumpy(), two[0].asnumpy(), atol=1e-5)


@pytest.mark.parametrize("dtype", [ms.float16, "float16", np.float16, np.dtype("float16")])
def test_a_dtype_goes_by_both_names(dtype, template, plain_source, tiny_model, tmp_path):
    folder = template(plain_source)
    for names in (["torch_dtype"], ["mindspore_dtype"], ["torch_dtype", "mindspore_dtype"]):
        how = dict.fromkeys(names, dtype)
        assert load_template_model(folder, **how, **TRUST).mlp.weight.dtype == ms.float16
        assert family("toy").pipeline.from_pretrained(str(tiny_model("toy")), **how).dtype == ms.float32  # of a CPU
        file = Path(tiny_model("toy"), "transformer/diffusion_pytorch_model.safetensors")
        found = importlib.import_module("ms_diffsynth").load_state_dict(file, **how)
        assert {array.dtype.name for array in found.values()} == {"float16"}
    with pytest.raises(ConfigError, match="mindspore_dtype=float32 and torch_dtype=float16: the two mean the same"):
        family("toy").pipeline.from_pretrained(str(tiny_model("toy")), mindspore_dtype="float32", torch_dtype=dtype)
    with pytest.raises(ConfigError, match="dtype='int8': expected one of float32"):
        load_template_model(folder, torch_dtype="int8", **TRUST)
