"""A packed template goes to a hub, through the hub's real client, and what comes back is the same model."""
from __future__ import annotations

import numpy as np
import pytest
from published_run import without_a_login
from upload_server import ModelScopeServer, UploadServer

from ms_diffsynth import ModelConfig, TemplatePipeline, load_template_model, pack_template
from ms_diffsynth.formats.weights import save_state_dict
from ms_diffsynth.hub.publish import publish
from ms_diffsynth.nn.names import state_dict

NAME = "writer/template"


@pytest.fixture(autouse=True)
def alone(monkeypatch, tmp_path):
    without_a_login(monkeypatch, tmp_path)


@pytest.fixture
def packed(template, tmp_path):
    """A trained template, packed, and its weights."""
    folder = template()
    model = load_template_model(folder, trust_template_code=True)
    weights = {name: array + np.float32(0.5) for name, array in state_dict(model).items()}
    save_state_dict(tmp_path / "epoch-1.safetensors", weights)
    return pack_template(folder, tmp_path / "epoch-1.safetensors", tmp_path / "packed",
                         trust_template_code=True), weights


def assert_loads(config, weights):
    pipeline = TemplatePipeline.from_pretrained([config], trust_template_code=True)
    found = state_dict(pipeline.fetch_model(0))
    assert found.keys() == weights.keys()
    for name, array in weights.items():
        np.testing.assert_array_equal(found[name], array)


def test_hugging_face(packed, tmp_path):
    with UploadServer() as hub:
        publish(packed[0], NAME, endpoint=hub.endpoint)
        assert_loads(ModelConfig(model_id=NAME, endpoint=hub.endpoint, cache_dir=tmp_path / "cache"), packed[1])


def test_modelscope(packed, tmp_path):
    from modelscope_hub import HubApi, HubConfig

    with ModelScopeServer() as hub:
        publish(packed[0], NAME, hub="modelscope", endpoint=hub.endpoint)
        client = HubApi(config=HubConfig(endpoint=hub.endpoint))
        client.download_repo(NAME, "model", local_dir=tmp_path / "models" / NAME)
    assert_loads(ModelConfig(model_id=NAME, local_model_path=tmp_path / "models"), packed[1])
