"""Things DiffSynth-Studio documents of templates, and its code (2.1.12) does not do."""
from __future__ import annotations

import importlib

import numpy as np
from device import DEVICE

from ms_diffsynth import DiffusionTrainingModule, TemplatePipeline, load_template_model, save_state_dict
from ms_diffsynth.nn.names import state_dict
from ms_diffsynth.run.task import launch_training_task
from ms_diffsynth.template.package import pack_template
from ms_diffsynth.template.units import trained_template_cache
from ms_diffsynth.training.distributed import Accelerator
from ms_diffsynth.training.logger import ModelLogger

TRUST = {"trust_template_code": True}
EAGER = Accelerator(1, "pynative", DEVICE)


def module_of(pipe, folder, what="template_model", task="sft"):
    module = DiffusionTrainingModule()
    module.pipe = pipe
    module.load_training_template_model(pipe, str(folder), **TRUST)
    module.switch_pipe_to_training_mode(pipe, trainable_models=what, extra_inputs="template_inputs", task=task)
    return module


def trained(path, module, data):
    """The file of the weights after five steps."""
    logger = launch_training_task(EAGER, data, module, ModelLogger(path, "pipe.template_model."), learning_rate=1e-2,
                                  max_train_steps=5, num_epochs=None)
    return logger.saved[-1]


def test_load_state_dict_is_imported_from_where_load_template_model_is(tmp_path):
    for name in ("ms_diffsynth.template", "ms_diffsynth"):
        package = importlib.import_module(name)
        assert {"load_state_dict", "load_template_model", "TemplatePipeline"} <= set(package.__all__)
        save_state_dict(tmp_path / "a.safetensors", {"a": np.float32([1])})
        found = package.load_state_dict(tmp_path / "a.safetensors", torch_dtype="bfloat16", device="cpu")
        assert found["a"].dtype.name == "bfloat16" and found["a"] == 1


def test_a_template_without_a_data_processor_is_trained_and_sampled(toy, template, row, tmp_path):
    folder = template()
    assert "TEMPLATE_DATA_PROCESSOR" not in (folder / "model.py").read_text()
    assert trained(tmp_path / "out", module_of(toy(), folder), [row(0, (16, 16))])
    TemplatePipeline.from_pretrained([folder], **TRUST)(toy(), prompt="a", template_inputs=[{"scale": 1}], height=16,
                                                        width=16, num_inference_steps=1)


def test_packing_keeps_the_trained_weights(toy, template, row, tmp_path):
    folder = template()
    start, module = state_dict(load_template_model(folder, **TRUST)), module_of(toy(), folder)
    packed = pack_template(folder, trained(tmp_path / "out", module, [row(0, (16, 16))]), tmp_path / "packed", **TRUST)
    loaded, in_memory = state_dict(load_template_model(packed, **TRUST)), state_dict(module.pipe.template_model)
    assert all(np.array_equal(loaded[n], in_memory[n]) for n in start)
    assert not any(np.array_equal(loaded[n], start[n]) for n in ("mlp.weight", "mlp.bias"))
    cache = TemplatePipeline.from_pretrained(packed, **TRUST).call_single_side(module.pipe, [{"scale": 0.3}])
    in_training = trained_template_cache(module.pipe, {"scale": 0.3})
    assert all(np.array_equal(a.asnumpy(), b.asnumpy()) for a, b in zip(cache["kv_cache"]["double_0"],
                                                                        in_training["kv_cache"]["double_0"]))
