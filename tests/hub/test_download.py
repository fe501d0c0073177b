"""Model configurations against a hub on this machine, through the real huggingface_hub client."""
from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hub_server import HubServer, only_this_machine

from ms_diffsynth.config import load_config
from ms_diffsynth.errors import ConfigError, HubError, WeightError
from ms_diffsynth.hub import download as hub_module
from ms_diffsynth.hub.download import ModelConfig, parse_model_id_with_origin_paths, parse_path_or_model_id
from ms_diffsynth.run.pipeline import model_configs, source_of

NAME = "team/model"
SECRET = "hf_abcdefghijklmnopqrstuvwxyz0123"
FILES = {
    "model_index.json": b"{}", "vae/config.json": b'{"a": 1}', "vae/model.safetensors": bytes(range(256)) * 400,
    "tokenizer/vocab.txt": b"a b", "tokenizer/extra/merges[1].txt": b"c", "dit/m-1.safetensors": b"1",
    "dit/m-2.safetensors": b"2",
}


@pytest.fixture
def hub(monkeypatch):
    only_this_machine(monkeypatch)
    with HubServer() as server:
        server.commit = server.add(NAME, FILES)
        yield server


@pytest.fixture
def config(hub, tmp_path):
    def make(pattern=None, model_id=NAME, **kwargs):
        return ModelConfig(model_id=model_id, origin_file_pattern=pattern, endpoint=hub.endpoint,
                           cache_dir=tmp_path / "cache", **kwargs)
    return make


def below(paths, commit):
    """Paths relative to the snapshot of a commit."""
    return [Path(p).as_posix().split(f"/snapshots/{commit}")[1].lstrip("/") for p in paths]


@pytest.mark.parametrize("pattern, resolved, downloaded", [
    ("vae/model.safetensors", ["vae/model.safetensors"], ["vae/model.safetensors"]),
    ("dit/*.safetensors", [f"dit/m-{k}.safetensors" for k in (1, 2)], [f"dit/m-{k}.safetensors" for k in (1, 2)]),
    ("*.json", ["model_index.json"], ["model_index.json"]),
    ("tokenizer/", ["tokenizer"], ["tokenizer/extra/merges[1].txt", "tokenizer/vocab.txt"]),
    ("", [""], sorted(FILES)), ("./", [""], sorted(FILES)), (None, [""], sorted(FILES)),
])
def test_a_pattern_downloads_what_it_names_and_nothing_else(hub, config, pattern, resolved, downloaded):
    paths = config(pattern).resolve()
    assert below(paths, hub.commit) == resolved
    root = paths[0].as_posix().split(hub.commit)[0] + hub.commit
    assert sorted(p.relative_to(root).as_posix() for p in Path(root).rglob("*") if p.is_file()) == downloaded
    for name in downloaded:
        assert (Path(root) / name).read_bytes() == FILES[name]


@pytest.mark.fault
def test_the_revision_is_pinned_and_logged(hub, config, caplog):
    caplog.set_level(logging.INFO)
    first = config("vae/config.json")
    first.download_if_necessary()
    assert first.revision == hub.commit
    assert f"revision main is commit {hub.commit}" in caplog.text
    assert isinstance(first.path, str) and Path(first.path).read_bytes() == FILES["vae/config.json"]
    newer = hub.add(NAME, FILES | {"vae/config.json": b"newer"})
    again = config("vae/config.json", revision=hub.commit)
    assert again.resolve()[0].read_bytes() == FILES["vae/config.json"] and again.revision == hub.commit
    latest = config("vae/config.json")
    assert latest.resolve()[0].read_bytes() == b"newer" and latest.revision == newer
    several = config("dit/*")
    several.download_if_necessary()
    assert [Path(p).name for p in several.path] == ["m-1.safetensors", "m-2.safetensors"]


def test_a_tag_is_a_revision(hub, config):
    tagged = hub.add(NAME, {"a": b"tagged"}, ref="v1")
    found = config("a", revision="v1")
    assert found.resolve()[0].read_bytes() == b"tagged" and found.revision == tagged


def test_what_is_cached_is_not_downloaded_again(hub, config):
    config("vae/").resolve()
    count = len(hub.downloads())
    config("vae/").resolve()
    assert len(hub.downloads()) == count == 2


def test_no_match_lists_the_files(config):
    with pytest.raises(HubError, match=r"team/model:vae/model.safetensor: no file matches; the repository holds "
                                       r"dit/m-1.safetensors, .*Did you mean 'vae/model.safetensors'"):
        config("vae/model.safetensor").resolve()
    with pytest.raises(HubError, match="no file matches"):
        config("gone/").resolve()


@pytest.mark.parametrize("change, text", [
    ({"model_id": "team/modle"}, r"team/modle:vae/ on 127.0.0.1 does not exist or is private \(404\)\. Check the name"),
    ({"revision": "v9"}, r"team/model@v9:vae/ on 127.0.0.1 has no revision 'v9' \(404\)"),
    ({"model_id": "a/b/c"}, "model_id='a/b/c' is not a repository name: expected owner/name"),
])
def test_names_that_are_wrong(config, change, text):
    with pytest.raises(HubError, match=text):
        config("vae/", **change).resolve()


@pytest.mark.fault
@pytest.mark.parametrize("settings, text", [
    ({"is_gated": True, "token": "x"}, r"is gated \(403\)\. Accept its terms"), ({"token": "x"}, r"private \(401\)"),
])
def test_refusals_name_the_remedy_and_never_the_token(hub, config, caplog, monkeypatch, settings, text):
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.add(NAME, FILES, **settings)
    with pytest.raises(HubError, match=text) as caught:
        config("vae/").resolve()
    assert "hf auth login" in str(caught.value)
    assert SECRET not in str(caught.value) + repr(caught.value.__cause__)
    assert SECRET not in "".join(r.getMessage() for r in caplog.records if r.name.startswith("ms_diffsynth"))


def test_the_token_of_huggingface_hub_is_used(hub, config, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", SECRET)
    hub.add(NAME, FILES, is_gated=True, token=SECRET)
    assert config("vae/config.json").resolve()[0].is_file()


@pytest.mark.fault
def test_an_endpoint_with_a_password_is_refused():
    with pytest.raises(HubError, match="holds a user name or a password") as caught:
        ModelConfig(model_id=NAME, endpoint=f"https://me:{SECRET}@hub.example").resolve()
    assert SECRET not in str(caught.value)


@pytest.mark.fault
@pytest.mark.parametrize("status", [403, 418])
def test_other_refusals_give_their_status(hub, config, status):
    hub.status = status
    with pytest.raises(HubError, match=rf"was refused \({status}\)"):
        config("vae/").resolve()


@pytest.mark.fault
@pytest.mark.parametrize("times", [1, 2])
def test_a_cut_download_goes_on_where_it_stopped(hub, config, caplog, times):
    data = bytes(range(256)) * 150_000
    hub.add(NAME, {"big": data})
    hub.cuts["big"] = times
    assert config("big").resolve()[0].read_bytes() == data
    ranges = [r for method, path, r in hub.requests if method == "GET" and path.endswith("big")]
    # huggingface_hub writes blocks of 10 MiB: the one that was under way is lost
    assert ranges[:2] == [None, "bytes=10485760-"] and len(ranges) == times + 1
    # before version 1 the client gives up and we ask again, from then on it resumes by itself
    assert f"attempt {times + 1} of 3 follows" in caplog.text or "Trying to resume" in caplog.text


@pytest.mark.fault
@pytest.mark.parametrize("damage", [lambda data: bytes([data[0] ^ 1]) + data[1:], lambda data: data[:-3],
                                    lambda data: data + b"more"], ids=["a flipped bit", "too short", "too long"])
def test_a_file_that_arrives_otherwise_than_announced_is_fetched_again_or_not_kept(hub, config, tmp_path, damage):
    name = "vae/model.safetensors"
    hub.instead[name] = [damage(FILES[name])]
    assert config(name).resolve()[0].read_bytes() == FILES[name]
    hub.add(NAME, {name: b"other" * 1000})
    hub.instead[name] = [damage(b"other" * 1000)] * 99
    with pytest.raises(HubError, match=rf"{name} could not be downloaded from 127.0.0.1 in 3 attempts"):
        config(name).resolve()
    found = {path.read_bytes() for path in (tmp_path / "cache").rglob("snapshots/*/*/*")}
    assert found == {FILES[name]}, "what is damaged is not kept"
    hub.instead.clear()
    assert config(name).resolve()[0].read_bytes() == b"other" * 1000


@pytest.mark.fault
def test_a_file_that_is_listed_but_not_there(hub, config, monkeypatch):
    listed = hub.repositories[NAME].commits[hub.commit]
    monkeypatch.setattr(hub, "hidden", {"vae/config.json"})
    assert "vae/config.json" in listed
    with pytest.raises(HubError, match=r"lists a file that it does not have \(404\)"):
        config("vae/").resolve()


@pytest.mark.fault
def test_a_download_that_is_always_cut_says_what_is_absent_and_leaves_no_half_file(hub, config, tmp_path):
    hub.cuts["vae/model.safetensors"] = 100
    with pytest.raises(HubError, match=r"vae/model.safetensors could not be downloaded from 127.0.0.1 in 3 attempts"):
        config("vae/").resolve()
    assert not list((tmp_path / "cache").rglob("snapshots/*/vae/model.safetensors"))


@pytest.mark.fault
@pytest.mark.parametrize("way", ["refused", "500", "skip_download"])
def test_without_a_connection_the_cache_is_used_and_said(hub, config, caplog, way):
    config("vae/").resolve()
    newer = hub.add(NAME, FILES | {"vae/config.json": b"newer"})
    kwargs = {}
    if way == "refused":
        hub.stop()
    elif way == "500":
        hub.status = 500
    else:
        kwargs = {"skip_download": True}
    found = config("vae/config.json", **kwargs)
    assert found.resolve()[0].read_bytes() == FILES["vae/config.json"]
    assert found.revision == hub.commit != newer
    assert f"using commit {hub.commit} from the cache" in caplog.text
    assert config("vae/", revision=hub.commit, **kwargs).resolve()
    with pytest.raises(HubError, match=r"no such file in the cache .* which holds vae/config.json, vae/m"):
        config("dit/*", **kwargs).resolve()
    with pytest.raises(HubError, match="the cache does not hold revision main"):
        config("vae/", model_id="team/other", **kwargs).resolve()


@pytest.mark.fault
def test_a_refused_connection_without_a_cache_names_the_host(hub, config):
    hub.stop()
    with pytest.raises(HubError, match=r"cannot be had: the connection to 127.0.0.1 failed \(\w+\), and the cache"):
        config("vae/").resolve()


def test_offline_by_environment(hub, config, tmp_path):
    config("vae/config.json").resolve()
    before = len(hub.requests)
    code = ("import sys\nfrom ms_diffsynth.hub.download import ModelConfig\n"
            "for name in ('team/model', 'team/other'):\n"
            "    c = ModelConfig(model_id=name, origin_file_pattern='vae/config.json', cache_dir=sys.argv[1])\n"
            "    try: sys.stdout.write(c.resolve()[0].read_text() + c.revision)\n"
            "    except Exception as error: sys.stdout.write(str(error))\n")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_ENDPOINT": hub.endpoint,
                                "PYTHONPATH": str(Path(hub_module.__file__).parents[2])}
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path / "cache")], env=environment, text=True,
                            capture_output=True, check=True)
    assert result.stdout.startswith('{"a": 1}' + hub.commit)
    assert "team/other:vae/config.json cannot be had: HF_HUB_OFFLINE is set, and the cache" in result.stdout
    assert len(hub.requests) == before


@pytest.mark.fault
def test_a_repository_with_files_outside_is_not_used(hub, config):
    hub.add(NAME, {"../evil": b"x", "vae/config.json": b"x"})
    with pytest.raises(HubError, match=r"lead out of it: \.\./evil"):
        config("vae/").resolve()


@pytest.mark.fault
def test_a_full_disk_is_told_from_a_lost_connection(config, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(hub_module, "snapshot_download", full)
    with pytest.raises(HubError, match=r"cache cannot be written \(No space left on device\)"):
        config("vae/").resolve()


# -- local


def test_a_local_copy_comes_first(hub, config, tmp_path):
    copy = tmp_path / "models" / NAME / "vae" / "config.json"
    copy.parent.mkdir(parents=True)
    copy.write_bytes(b"mine")
    for found in (config("vae/config.json", local_model_path=tmp_path / "models").resolve(),
                  config("vae/config.json").resolve(base_path=tmp_path / "models")):
        assert found == [copy]
    assert config("vae/").resolve(tmp_path / "models") == [copy.parent]
    assert hub.requests == []
    assert config("dit/m-1.safetensors").resolve(tmp_path / "models")[0].read_bytes() == b"1"


def test_paths_and_globs(tmp_path):
    for name in ("a.safetensors", "b.safetensors", "[odd].txt"):
        (tmp_path / name).write_bytes(b"")
    assert ModelConfig(str(tmp_path)).resolve() == [tmp_path]
    assert ModelConfig(tmp_path / "[odd].txt").resolve() == [tmp_path / "[odd].txt"]
    both = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    assert ModelConfig(str(tmp_path / "*.safetensors")).resolve() == both
    assert ModelConfig([str(p) for p in both]).resolve() == both
    with pytest.raises(WeightError, match=r"c.safetensor does not exist; .* holds \[odd\].txt, a.safetensors, b.safet"):
        ModelConfig([str(tmp_path / "c.safetensor"), str(both[0])]).resolve()
    with pytest.raises(ConfigError, match="names nothing"):
        ModelConfig().resolve()


def test_parsing(tmp_path):
    assert parse_model_id_with_origin_paths("a/b:x/*.safetensors, c/d:,e/f@v1:vae/") == [
        ModelConfig(model_id="a/b", origin_file_pattern="x/*.safetensors"),
        ModelConfig(model_id="c/d", origin_file_pattern=""),
        ModelConfig(model_id="e/f", origin_file_pattern="vae/", revision="v1")]
    assert parse_path_or_model_id(str(tmp_path)) == ModelConfig(path=str(tmp_path))
    default = ModelConfig(path="x")
    assert parse_path_or_model_id("", default) is default
    assert str(parse_path_or_model_id("a/b@v1:c/")) == "a/b@v1:c/"
    assert parse_model_id_with_origin_paths("ms:a/b:x,hf:a/b@v1:") == [
        ModelConfig(model_id="a/b", origin_file_pattern="x", download_source="modelscope"),
        ModelConfig(model_id="a/b", origin_file_pattern="", revision="v1", download_source="huggingface")]
    assert [config.download_source for config in parse_model_id_with_origin_paths("a/b:x,hf:a/b:x", "modelscope")] == [
        "modelscope", "huggingface"]


@pytest.mark.parametrize("hub, sources", [("modelscope", ["modelscope", "huggingface"]), (None, [None, "huggingface"])])
def test_the_setting_hub_is_also_where_models_come_from(hub, sources, tmp_path):
    """--hub modelscope; the default leaves it to the environment."""
    (tmp_path / "c.yaml").write_text("model: {family: toy, model_id_with_origin_paths: 'a/b:x,hf:c/d:y'}\n"
                                     "data: {dataset_base_path: data}\nrun: {num_epochs: 1}\n")
    config = load_config(tmp_path / "c.yaml", {"hub": hub} if hub else None)
    found = model_configs(None, config.model.model_id_with_origin_paths, source_of(config))
    assert [one.download_source for one in found] == sources


@pytest.mark.parametrize("text", ["a/b", "gone/path/x", "a:b", "./a:b", "/a/b:c", "a/:x"])
def test_text_that_is_no_model(text):
    with pytest.raises(ConfigError, match="neither a path that exists nor a model"):
        parse_path_or_model_id(text)
    with pytest.raises(ConfigError, match=f"'{text}' is not of the form"):
        parse_model_id_with_origin_paths(f"a/b:c,{text}")


def test_an_empty_entry_is_refused():
    with pytest.raises(ConfigError, match="an empty entry"):
        parse_model_id_with_origin_paths("a/b:c,")
