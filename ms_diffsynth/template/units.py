"""A template in training: three units, and how a pipeline gets them."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mindspore import nn

from ms_diffsynth.errors import ConfigError, DataError, TemplateError
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.models import Component, Source
from ms_diffsynth.pipeline import Pipeline
from ms_diffsynth.template.cache import TemplateCache, check_cache
from ms_diffsynth.template.loading import (
    Template,
    forward_arguments,
    forward_options,
    open_template,
    processed,
    takes,
)
from ms_diffsynth.units import PipelineUnit, TensorUnit

MODEL = "template_model"  # its name in the pipeline
PREFIX = "template."  # of the slots that cross from process_inputs to forward


def attach_template(pipe: Pipeline, path: str | Path | ModelConfig, *, trust_template_code: bool = False,
                    trust_template_sha256: str | None = None, use_gradient_checkpointing: bool = False,
                    use_gradient_checkpointing_offload: bool = False) -> Template:
    """Give a pipeline the model ``template_model`` and the input ``template_inputs``, for training.

    Its weights are float32, whatever the base model's are: they are what learns. ``pipe.use_input("template_inputs")``
    switches the input on.

    Raises: ConfigError for a family that does not support templates; see also `open_template`.
    """
    if "template_cache?" not in pipe.denoise.input_params:
        raise ConfigError(f"{type(pipe).__name__} does not support templates: its network does not read a "
                          "template cache. Use the family flux2.")
    template = open_template(path, trust_template_code, trust_template_sha256)
    component = Component(name="template_model", folder="", build=lambda folder: template.build(),
                          recomputes_itself=True)
    pipe.store.add_component(component, Source(template.code.folder, template.files), template.build())
    options = {"use_gradient_checkpointing": use_gradient_checkpointing,
               "use_gradient_checkpointing_offload": use_gradient_checkpointing_offload}
    pipe.optional_units["template_inputs"] = template_units(template, pipe, options)
    return template


def trained_template_cache(pipe: Pipeline, template_inputs: dict[str, Any]) -> TemplateCache:
    """The cache of the template in training, with its present weights, for sample images.

    ``template_inputs`` are a row's: they go through TEMPLATE_DATA_PROCESSOR.
    """
    slots = pipe.run(pipe.optional_units["template_inputs"], {"template_inputs": template_inputs})
    return slots["template_cache"]


def template_units(template: Template, pipe: Pipeline, options: dict[str, bool]) -> list[PipelineUnit | TensorUnit]:
    """The data processor, ``process_inputs`` and ``forward`` of a template as units."""
    model = pipe.template_model
    used = ["template_model"]
    if takes(model.process_inputs, "pipe"):  # it may call anything but the network that is trained around it
        used += [name for name in pipe.model_names if name not in ("template_model", pipe.network)]
    return [ReadTemplateInputs(template), ProcessTemplateInputs(template, forward_arguments(model), used),
            ForwardTemplate(forward_arguments(model), takes(model.forward, "pipe"),
                            forward_options(model, **options))]


class ReadTemplateInputs(PipelineUnit):
    """``template_inputs`` of a row through TEMPLATE_DATA_PROCESSOR: dict -> dict."""

    input_params = ("template_inputs",)
    output_params = ("template_arguments",)

    def __init__(self, template: Template):
        super().__init__()
        self.template, self.processor = template, template.processor()

    def process(self, pipe, template_inputs):
        if not isinstance(template_inputs, dict):
            raise DataError(f"template_inputs={template_inputs!r}: expected an object such as {{\"scale\": 0.2}}. "
                            "Write the metadata as .json or .jsonl.")
        result = self.template.call(self.processor, "TEMPLATE_DATA_PROCESSOR", **template_inputs)
        if not isinstance(result, dict):
            raise TemplateError(f"{self.template.code.path}: TEMPLATE_DATA_PROCESSOR returned a "
                                f"{type(result).__name__}: expected a dict, the arguments of process_inputs.")
        return {"template_arguments": {k: v for k, v in result.items() if k != "model_id"}}


class ProcessTemplateInputs(PipelineUnit):
    """``process_inputs`` of a template: what it returns, as Tensors with a batch axis, under ``forward``'s names."""

    input_params = ("template_arguments",)
    no_grad = True

    def __init__(self, template: Template, arguments: Sequence[str], models: Sequence[str]):
        super().__init__(output_params=tuple(PREFIX + name for name in arguments), onload_model_names=tuple(models))
        self.template = template

    def process(self, pipe, template_arguments):
        values = processed(self.template, pipe.template_model, pipe, template_arguments)
        return {PREFIX + name: value for name, value in values.items()}


class StepView(nn.Cell):
    """The base pipeline as ``forward`` sees it: its dtype and its device. Its models are for ``process_inputs``."""

    def __init__(self, pipe: Pipeline):
        super().__init__(auto_prefix=False)
        self.dtype, self.device = pipe.dtype, pipe.device


class ForwardTemplate(TensorUnit):
    """``forward`` of a template, always in the step: a dict has no place in a cache, and it is the part that learns."""

    output_params = ("template_cache",)
    onload_model_names = ("template_model",)
    is_always_fused = True

    def __init__(self, arguments: Sequence[str], takes_pipe: bool, options: dict[str, bool]):
        super().__init__()
        self.input_params = tuple(PREFIX + name for name in arguments)
        self.arguments, self.takes_pipe, self.options = tuple(arguments), takes_pipe, dict(options)

    def attach(self, pipe):
        super().attach(pipe)
        self.view = StepView(pipe)

    def construct(self, *inputs):
        arguments = {}
        for k in range(len(self.arguments)):
            arguments[self.arguments[k]] = inputs[k]
        if self.takes_pipe:
            cache = self.template_model.forward(pipe=self.view, **arguments, **self.options)
        else:
            cache = self.template_model.forward(**arguments, **self.options)
        return (check_cache(cache),)

