"""Families by name."""
from __future__ import annotations

import pytest

from ms_diffsynth.config import SETTINGS
from ms_diffsynth.data.metadata import FURTHER_INPUTS
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.pipeline import Pipeline
from ms_diffsynth.registry import FAMILIES, family


@pytest.mark.parametrize("name", FAMILIES)
def test_each_name_leads_to_a_family_of_that_name(name):
    found = family(name)
    assert found.name == name and issubclass(found.pipeline, Pipeline)
    names = [c.name for c in found.pipeline.components]
    assert len(set(names)) == len(names) and found.pipeline().network in names
    assert set(found.pipeline().lora_table.models) <= set(names) and found.pipeline.lora_target_modules
    assert callable(found.write_tiny) and hasattr(found.pipeline, "from_pretrained")


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises(ConfigError, match=r"family='fluks' is unknown: expected one of .*\. Did you mean 'flux'"):
        family("fluks")


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_facts(name):
    found = family(name)
    assert found.takes_prompts == (name != "ddpm_unet")
    assert found.tokenizers == tuple(c.name for c in found.pipeline.components if c.name.startswith("tokenizer"))
    assert {f"{tokenizer}_path" for tokenizer in found.tokenizers} <= set(SETTINGS)
    assert found.sampling.cfg_scale >= 1 and found.sampling.embedded_guidance > 0


def test_the_table_of_further_inputs_names_those_of_the_families():
    """Wan's depend on its weights; `absent_inputs` has them all. Each other family's title stands with its own."""
    pipes = {name: family(name).pipeline() for name in FAMILIES}
    found = {name: {*pipe.optional_units, *(pipe.absent_inputs if pipe.medium == "video" else ())}
             for name, pipe in pipes.items()}
    assert set().union(*found.values(), {"template_inputs"}) == set(FURTHER_INPUTS)
    titles = {"flux": "FLUX.1", "flux2": "FLUX.2", "qwen_image": "Qwen-Image", "wan": "Wan"}
    for column, told in FURTHER_INPUTS.items():
        if column != "template_inputs":
            assert {title for title in titles.values() if title in told} == {
                titles[name] for name, names in found.items() if column in names}, column
