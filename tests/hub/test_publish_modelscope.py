"""Publishing on ModelScope, through its real client, against a stand-in on this machine that fails on demand."""
from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from processes import environment, run_python
from published_run import NAME, expected, held, without_a_login, write_run
from upload_server import MODELSCOPE_TOKEN, TOKEN, ModelScopeServer

from ms_diffsynth.errors import ConfigError, HubError
from ms_diffsynth.formats.weights import load_state_dict
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.hub.publish import connect, publish


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path)


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    without_a_login(monkeypatch, tmp_path)


@pytest.fixture
def modelscope():
    with ModelScopeServer() as server:
        yield server


def test_without_modelscopes_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(HubError, match=r"needs its client: pip install 'ms_diffsynth\[modelscope\]'"):
        connect("modelscope")


def test_modelscope_round_trip(modelscope, folder, tmp_path):
    from modelscope_hub import HubApi, HubConfig

    url = publish(folder, NAME, hub="modelscope", endpoint=modelscope.endpoint, message="two steps")
    assert url == f"{modelscope.endpoint}/models/{NAME}"
    assert modelscope.visibility[NAME] == 1 and modelscope.licences[NAME] == "apache-2.0"
    assert modelscope.messages == ["two steps"] and held(modelscope) == expected(folder)
    got = HubApi(config=HubConfig(endpoint=modelscope.endpoint)).download_repo(
        NAME, "model", local_dir=tmp_path / "models" / NAME)
    config = ModelConfig(model_id=NAME, origin_file_pattern="*.safetensors", local_model_path=tmp_path / "models")
    assert load_state_dict(config.resolve()[0])["a"][-1] == 49_999
    assert {n: (Path(got) / n).read_bytes() for n in expected(folder)} == expected(folder)


def test_modelscope_says_other_than_apache_of_an_unknown_licence(modelscope, folder):
    (folder / "README.md").write_text("# no licence named")
    publish(folder, NAME, hub="modelscope", endpoint=modelscope.endpoint)
    assert modelscope.licences[NAME] == "Other"


@pytest.mark.fault
@pytest.mark.parametrize("where, fault, message", [
    ("POST /api/v1/models", {"status": 401}, r"was refused by 127\.0\.0\.1 \(401\)\. Set MODELSCOPE_API_TOKEN"),
    ("POST /api/v1/models", {"status": 403}, r"\(403\)\. Give the token"),
    ("POST /api/v1/repos/models/writer/model/commit", {"status": 503}, r"\(503\)\. What is on this disk is complete"),
    ("PUT /lfs/", {"is_cut": True}, r"the upload failed: the connection to 127\.0\.0\.1 failed"),
])
def test_modelscope_faults(modelscope, folder, where, fault, message):
    modelscope.fail(where, times=99, body=b'{"Message": "no %s"}' % TOKEN.encode(), **fault)
    with pytest.raises(HubError, match=message) as caught:
        publish(folder, NAME, hub="modelscope", endpoint=modelscope.endpoint)
    assert TOKEN not in str(caught.value) and MODELSCOPE_TOKEN not in str(caught.value)
    assert modelscope.messages == []


@pytest.mark.fault
@pytest.mark.parametrize("visibility", [3, 5])
def test_modelscope_a_public_repository_is_not_used(modelscope, folder, visibility):
    modelscope.make(NAME, visibility)
    with pytest.raises(HubError, match="is public, and a private repository was asked for; nothing was sent"):
        publish(folder, NAME, hub="modelscope", endpoint=modelscope.endpoint)
    assert held(modelscope) == {} and modelscope.calls("PUT") == 0


def test_modelscope_needs_an_owner_and_a_token(modelscope, folder, monkeypatch):
    with pytest.raises(HubError, match="hub_model_id='model' is not a repository name"):
        publish(folder, "model", hub="modelscope", endpoint=modelscope.endpoint)
    monkeypatch.delenv("MODELSCOPE_API_TOKEN")
    with pytest.raises(HubError, match=r"no token for 127\.0\.0\.1\. Set MODELSCOPE_API_TOKEN"):
        connect("modelscope", modelscope.endpoint)


def test_modelscopes_client_does_not_import_torch(modelscope, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported')")
    code = ("from ms_diffsynth.hub.publish import connect\nimport sys\n"
            "connect('modelscope')\nsys.exit(int('torch' in sys.modules))")
    result = run_python("-c", code, env=environment(tmp_path))
    assert result.returncode == 0, result.stderr


# -- and back ------------------------------------------------------------------------------------------------------


@pytest.fixture
def published(modelscope, folder, tmp_path):
    """The repository of `write_run`, and a ModelConfig of it whose cache is a folder of the test's own."""
    publish(folder, NAME, hub="modelscope", endpoint=modelscope.endpoint)
    place = {"endpoint": modelscope.endpoint, "cache_dir": tmp_path / "cache", "download_source": "modelscope"}
    return lambda pattern=None, **how: ModelConfig(model_id=NAME, origin_file_pattern=pattern, **place, **how)


def test_what_was_published_is_loaded_by_its_name(modelscope, published, folder, monkeypatch):
    config = published("*.safetensors")
    assert load_state_dict(config.resolve()[0])["a"][-1] == 49_999 and config.revision == "master"
    whole = published().resolve()[0]
    assert {n: (whole / n).read_bytes() for n in expected(folder)} == expected(folder)
    config.download_source = None  # by the environment, as on a command line
    monkeypatch.setenv("MS_DIFFSYNTH_DOWNLOAD_SOURCE", "modelscope")
    assert config.source == "modelscope" and config.resolve()[0].is_file()


def test_without_a_connection_the_cache_is_used(published, modelscope, caplog):
    published("*.safetensors").resolve()
    config = published("*.safetensors", skip_download=True)
    assert config.resolve()[0].is_file() and "using what ModelScope's cache holds" in caplog.text
    with pytest.raises(HubError, match="skip_download is set, and ModelScope's cache does not hold revision v2"):
        published(revision="v2", skip_download=True).resolve()


@pytest.mark.fault
def test_what_modelscope_cannot_give_is_said(published, modelscope, monkeypatch):
    with pytest.raises(HubError, match=r"no file matches; the repository on 127.* holds .*README\.md"):
        published("unet/*").resolve()
    with pytest.raises(HubError, match=r"no/body:.* does not exist or is private \(404\).*modelscope login"):
        replace(published(""), model_id="no/body").resolve()
    with pytest.raises(HubError, match="'body' is not a repository name"):
        replace(published(), model_id="body").resolve()
    with pytest.raises(ConfigError, match=r"download_source='modelscop': expected huggingface or modelscope\. Did"):
        replace(published(), download_source="modelscop").resolve()
    monkeypatch.setitem(sys.modules, "modelscope_hub", None)
    with pytest.raises(HubError, match=r"needs its client: pip install 'ms_diffsynth\[modelscope\]'"):
        published().resolve()


@pytest.mark.fault
def test_a_file_that_arrives_with_other_content_is_not_used(published, modelscope):
    modelscope.damaged.add("step-2.safetensors")
    with pytest.raises(HubError, match=r"step-2\.safetensors could not be downloaded.*run again"):
        published("*.safetensors").resolve()
    modelscope.damaged.clear()
    assert load_state_dict(published("*.safetensors").resolve()[0])["a"][-1] == 49_999
