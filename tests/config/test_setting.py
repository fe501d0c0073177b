"""Settings as they are written to files: no secret by value, by form or by name, and nothing else changed.

What the texts of settings mean is tested in tests/config/test_config.py.
"""
from __future__ import annotations

import json

import pytest
import yaml

from ms_diffsynth.config import load_config, to_yaml
from ms_diffsynth.redact import without_secrets

TOKEN = "hf_abcdefghijklmnop0123"


@pytest.mark.parametrize("value, expected", [
    ({"api_key": "swordfish", "lora_rank": 4}, {"api_key": "[redacted]", "lora_rank": 4}),
    ({"prompts": ("a cat", f"a {TOKEN}")}, {"prompts": ["a cat", "a [redacted]"]}),
    ({"deep": {TOKEN: [{"x": TOKEN}]}}, {"deep": {"[redacted]": [{"x": "[redacted]"}]}}),
    ({"loss": 0.5, "is_on": True, "none": None, "step": 3}, {"loss": 0.5, "is_on": True, "none": None, "step": 3}),
    ({"command": "x=1 y=2", "a=b": "c=d"}, {"command": "x=1 y=2", "a=b": "c=d"}),
    ({"my_password": ["swordfish"]}, {"my_password": ["[redacted]"]}),
])
def test_without_secrets(value, expected):
    assert without_secrets(value) == expected == without_secrets(without_secrets(value))


def test_what_is_no_json_value_becomes_text(tmp_path):
    assert without_secrets({"path": tmp_path}) == {"path": str(tmp_path)}


def test_a_secret_that_json_and_yaml_would_write_otherwise(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", secret := "quo\"te's\\ünï: code")
    assert "code" not in json.dumps(without_secrets({"x": f"a {secret}"})) + yaml.safe_dump(without_secrets([secret]))


def test_a_configuration_with_a_secret_is_still_one(tmp_path):
    given = {"family": "toy", "dataset_base_path": TOKEN, "num_epochs": "1", "sample_prompts": json.dumps([TOKEN])}
    (tmp_path / "config.yaml").write_text(to_yaml(load_config(None, given)))
    found = load_config(tmp_path / "config.yaml")
    assert found.data.dataset_base_path == "[redacted]" and found.run.sample_prompts == ("[redacted]",)
