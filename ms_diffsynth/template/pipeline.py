"""Sampling with templates: run them, merge their caches, call the base pipeline."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mindspore as ms
from mindspore import nn

from ms_diffsynth import runtime
from ms_diffsynth.errors import ConfigError, listing
from ms_diffsynth.formats.weights import asked_dtype
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.pipeline import Pipeline
from ms_diffsynth.template.cache import TemplateCache, check_cache, merge
from ms_diffsynth.template.loading import Template, forward_options, open_template, processed, takes


class TemplatePipeline:
    """One or more templates in front of a base pipeline.

    Each entry of ``template_inputs`` is the input of one template: ``model_id`` (0 when it is not there) says of
    which, the rest are the arguments of its ``process_inputs``. A template may be used several times.
    """

    def __init__(self, templates: Sequence[Template], dtype: ms.Type, lazy_loading: bool = False):
        self.templates, self.dtype = list(templates), dtype
        self._models: dict[int, nn.Cell] = {}
        self._most = 1 if lazy_loading else len(self.templates)
        for model_id in range(0 if lazy_loading else len(self.templates)):
            self.fetch_model(model_id)

    @classmethod
    def from_pretrained(cls, model_configs: Sequence[ModelConfig | str | Path], *,
                        mindspore_dtype: ms.Type | None = None, torch_dtype: Any = None, device: str | None = None,
                        lazy_loading: bool = False, trust_template_code: bool = False,
                        trust_template_sha256: str | Sequence[str] | None = None) -> TemplatePipeline:
        """Open the templates.

        Args:
            model_configs: folders, or ModelConfigs of folders or repositories, in the order ``model_id`` counts.
            mindspore_dtype, torch_dtype: of their weights, by either name; None means bfloat16 on Ascend, float32 on
                the CPU.
            lazy_loading: keep one model in memory at a time, loaded when it is asked for.
            trust_template_code: run their ``model.py``; see `template.code.check_trust`.
            trust_template_sha256: of their ``model.py``, one each.

        Raises: UntrustedCodeError, TemplateError, WeightError, HubError.
        """
        runtime.use_device(device)
        if isinstance(model_configs, (str, Path, ModelConfig)):
            model_configs = [model_configs]
        given = [trust_template_sha256] if isinstance(trust_template_sha256, str) else trust_template_sha256
        hashes = [None] * len(model_configs) if given is None else list(given)
        if len(hashes) != len(model_configs):
            raise ConfigError(f"trust_template_sha256 has {len(hashes)} entries for {len(model_configs)} templates: "
                              "expected one each.")
        templates = [open_template(config, trust_template_code, sha) for config, sha in zip(model_configs, hashes)]
        asked = asked_dtype(mindspore_dtype, torch_dtype)
        return cls(templates, runtime.compute_dtype(asked), lazy_loading)

    def fetch_model(self, model_id: int) -> nn.Cell:
        """The model of one template. Raises: ConfigError for a number without a template."""
        if not isinstance(model_id, int) or not 0 <= model_id < len(self.templates):
            raise ConfigError(f"model_id={model_id!r}: there are {len(self.templates)} templates; expected one of "
                              f"{listing(range(len(self.templates)))}.")
        if model_id not in self._models:
            while len(self._models) >= self._most:
                self._models.pop(next(iter(self._models)))
            self._models[model_id] = self.templates[model_id].build(self.dtype)
        return self._models[model_id]

    def call_single_side(self, pipe: Pipeline, inputs: Sequence[dict[str, Any]]) -> TemplateCache:
        """The merged cache of some template inputs; an empty one for none. Raises: TemplateError, ConfigError."""
        caches = []
        for entry in inputs:
            arguments = dict(entry)
            model_id = arguments.pop("model_id", 0)
            model, template = self.fetch_model(model_id), self.templates[model_id]
            caches.append(template_cache(template, model, pipe, arguments))
        return merge(caches)

    def __call__(self, pipe: Pipeline, template_inputs: Sequence[dict[str, Any]] | None = None,
                 negative_template_inputs: Sequence[dict[str, Any]] | None = None, **options: Any) -> Any:
        """Generate with the base pipeline under templates; ``options`` are those of the base pipeline's call.

        Args:
            negative_template_inputs: of the branch of the negative prompt, when ``cfg_scale`` is not 1.
        """
        sides = {"template_cache": template_inputs, "negative_template_cache": negative_template_inputs}
        for name, inputs in sides.items():
            if isinstance(inputs, dict) or not all(isinstance(entry, dict) for entry in inputs or ()):
                raise ConfigError(f"{name.removesuffix('cache')}inputs={inputs!r:.200}: expected a list of dicts, one "
                                  "for each template. Put it into brackets.")
            if inputs:
                options[name] = self.call_single_side(pipe, inputs)
        return pipe(**options)


def template_cache(template: Template, model: nn.Cell, pipe: Pipeline, inputs: dict[str, Any]) -> TemplateCache:
    """Run ``process_inputs`` and ``forward`` of one template eagerly on one input."""
    values = processed(template, model, pipe, inputs)
    extra = {"pipe": pipe} if takes(model.forward, "pipe") else {}
    extra |= forward_options(model, use_gradient_checkpointing=False, use_gradient_checkpointing_offload=False)
    return check_cache(template.call(model.forward, "forward", **values, **extra), f"{template.code.path}: forward")
