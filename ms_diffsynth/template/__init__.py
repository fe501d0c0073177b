"""Template models: small networks with code of their own, whose output (the template cache) enters the base model.

A template is a folder with a ``model.py`` (`template.code`) that defines TEMPLATE_MODEL, an nn.Cell with two methods:

    process_inputs(**template_inputs) -> dict    without gradient, on Python objects: in `prepare`, so it can be cached
    forward(**that dict) -> template cache       everything that learns: in the compiled step

In training they are three units (`template.units`). In sampling `TemplatePipeline` runs any number of templates, merges
their caches (`template.cache`) and calls the base pipeline.
"""
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.template.loading import load_template_model, no_grad
from ms_diffsynth.template.pipeline import TemplatePipeline
from ms_diffsynth.template.units import attach_template

__all__ = ["TemplatePipeline", "attach_template", "load_state_dict", "load_template_model", "no_grad"]
