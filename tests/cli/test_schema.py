"""``ms-diffsynth schema``: what it allows is what `load_config` allows."""
from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from ms_diffsynth.config import SAMPLE_OVERRIDES, SETTINGS
from ms_diffsynth.config.setting import out_of_range

ROOT = Path(__file__).parents[2]
KINDS = {"boolean": bool, "integer": int, "number": (int, float), "string": str, "array": list, "null": type(None)}


@pytest.fixture
def schema(run):
    code, out, _ = run("schema")
    assert code == 0
    return json.loads(out)


def allows(own, value):
    """Whether the schema of one setting allows a value: the keywords that it uses."""
    kinds = own["type"] if isinstance(own["type"], list) else [own["type"]]
    fits = any(isinstance(value, KINDS[k]) and (k == "boolean" or not isinstance(value, bool)) for k in kinds)
    if fits and isinstance(value, (int, float)) and not isinstance(value, bool):
        fits = (own.get("minimum", value) <= value <= own.get("maximum", value)
                and not own.get("exclusiveMinimum", value - 1) >= value
                and not own.get("exclusiveMaximum", value + 1) <= value)
    return fits and value in own.get("enum", [value])


@pytest.mark.parametrize("path", sorted(ROOT.glob("examples/*/*.yaml")), ids=lambda p: p.name)
def test_it_allows_every_example(schema, path):
    text = path.read_text(encoding="utf-8")
    loader = type("Loader", (yaml.SafeLoader,), {})  # that of YAML 1.2, as editors have it: 1e-4 is a number
    loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[0-9.]+e-?[0-9]+$"), list("0123456789"))
    for section, settings in yaml.load(text, loader).items():
        own = schema["properties"][section]
        assert set(own.get("required", ())) <= set(settings)
        for name, value in settings.items():
            assert allows(own["properties"][name], value), (section, name, value)


def test_its_ranges_are_those_of_the_settings(schema):
    found = {name: own for section in schema["properties"].values() for name, own in section["properties"].items()}
    assert set(found) == {name for name, setting in SETTINGS.items() if not setting.metadata["is_flag_only"]}
    for name, own in found.items():
        setting = SETTINGS[name]
        if setting.kind in (int, float):
            for value in (-2, -1, 0, 0.5, 1, 2, 65536, 10**9, 1e-3):
                value = setting.kind(value)
                expected = not out_of_range(value, setting.metadata["range"])
                assert allows(own, value) == expected, (name, value)


def test_a_sample_prompt_is_a_text_or_a_mapping(schema):
    text, mapping = schema["properties"]["run"]["properties"]["sample_prompts"]["items"]["anyOf"]
    assert text == {"type": "string"} and mapping["required"] == ["prompt"]
    assert set(mapping["properties"]) == {"prompt", *SAMPLE_OVERRIDES}
    assert allows(mapping["properties"]["cfg_scale"], 2) and not allows(mapping["properties"]["seed"], -1)


def test_it_refuses_what_is_not_there(schema):
    own = schema["properties"]
    assert not allows(own["model"]["properties"]["family"], "flx")
    assert not allows(own["optimizer"]["properties"]["learning_rate"], "fast")
    assert own["model"]["additionalProperties"] is False and "trust_template_code" not in own["model"]["properties"]


def test_it_is_written_to_a_file(run, tmp_path):
    assert run("schema", "--output", tmp_path / "s.json")[:2] == (0, "")
    assert json.loads((tmp_path / "s.json").read_text())["title"] == "a training run of ms_diffsynth"
