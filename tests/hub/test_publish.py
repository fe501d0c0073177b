"""Publishing through the real clients of both hubs, against stand-ins on this machine that fail on demand."""
from __future__ import annotations

import base64
import io
import logging
import threading
import time

import numpy as np
import pytest
from huggingface_hub import constants
from published_run import KEPT, NAME, expected, held, staging, without_a_login, write_run
from upload_server import SIGNATURE, TOKEN, UploadServer

from ms_diffsynth.cli.main import parser
from ms_diffsynth.errors import ConfigError, HubError
from ms_diffsynth.formats.weights import load_state_dict, save_state_dict
from ms_diffsynth.hub.download import ModelConfig
from ms_diffsynth.hub.publish import BackgroundUpload, choose, connect, publish

COMMIT, PUT = f"POST /api/models/{NAME}/commit", "PUT /lfs/"


@pytest.fixture
def folder(tmp_path):
    return write_run(tmp_path)


@pytest.fixture(autouse=True)
def no_login(monkeypatch, tmp_path):
    without_a_login(monkeypatch, tmp_path)


@pytest.fixture
def hub():
    with UploadServer() as server:
        yield server


# -- what is sent --------------------------------------------------------------------------------------------------


def test_what_was_published_is_downloaded_again_byte_by_byte(hub, folder, tmp_path):
    url = publish(folder, NAME, endpoint=hub.endpoint, message="two steps")
    config = ModelConfig(model_id=NAME, endpoint=hub.endpoint, cache_dir=tmp_path / "cache")
    got = config.resolve()[0]
    assert {p.relative_to(got).as_posix(): p.read_bytes() for p in got.rglob("*") if p.is_file()} == (
        expected(folder) | {".gitattributes": b""})
    assert load_state_dict(got / "step-2.safetensors")["a"][-1] == 49_999
    assert hub.private[NAME] and hub.messages == ["two steps"]
    assert url == f"{hub.endpoint}/{NAME}/commit/{config.revision}"
    assert staging(folder) == []


@pytest.mark.fault
def test_nothing_else_leaves_this_machine(hub, folder):
    publish(folder, NAME, endpoint=hub.endpoint)
    assert held(hub) == expected(folder)
    everything = b"".join(hub.sent)
    for secret in (*KEPT.values(), b"kept-15"):
        assert secret not in everything and base64.b64encode(secret) not in everything
    for name in KEPT:
        assert name.encode() not in everything


def test_named_files_only(hub, folder):
    publish(folder, NAME, endpoint=hub.endpoint, files=["*.safetensors", "config.yaml"])
    assert sorted(held(hub)) == ["config.yaml", "step-2.safetensors"]


@pytest.mark.parametrize("files, message", [
    ([".env"], r"has no file \.env to send \(hidden files, links"),
    (["config.json"], r"has no file config\.json to send \(hidden files, links"),
    (["optimizer.safetensors", "README.md"], r"has no file optimizer\.safetensors to send"),
    (["step-3.safetensors"], r"has no file step-3\.safetensors to send Did you mean 'step-2\.safetensors'\?"),
    (["../outside/config.json"], r"has no file \.\./outside/config\.json to send"),
])
def test_a_named_file_that_is_not_sent_is_an_error(folder, files, message):
    with pytest.raises(HubError, match=message):
        choose(folder, files)


def test_a_folder_with_nothing_to_send(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(HubError, match="has nothing to send: none of its 1 files"):
        choose(tmp_path)
    with pytest.raises(HubError, match="is not a folder"):
        choose(tmp_path / "none")


@pytest.mark.fault
@pytest.mark.parametrize("name, data, where", [
    ("README.md", b"# x\n\nlog in with hf_abcdefghijklmnop0123456789\n", r"README\.md line 3"),
    ("transformer/config.json", b'{"u": "https://me:pa55word@host/x"}', r"transformer/config\.json line 1"),
    ("model.py", TOKEN.encode(), r"model\.py line 1"),
    ("step-3.safetensors", (46).to_bytes(8, "little") + b'{"__metadata__":{"command":"x --token abcdef"}}',
     r"step-3\.safetensors"),
])
def test_a_secret_in_a_file_stops_everything(hub, folder, name, data, where):
    (folder / name).write_bytes(data)
    with pytest.raises(HubError, match=f"a token or a password is in {where}; nothing was sent") as caught:
        publish(folder, NAME, endpoint=hub.endpoint)
    assert hub.requests == [] and staging(folder) == []
    assert "abcdef" not in str(caught.value) and "pa55" not in str(caught.value) and TOKEN not in str(caught.value)


# -- the Hugging Face Hub and its faults ---------------------------------------------------------------------------


@pytest.mark.fault
@pytest.mark.parametrize("where, fault, message", [
    ("POST /api/repos/create", {"status": 401}, r"making the repository was refused by 127\.0\.0\.1 \(401\)\. Log in"),
    ("POST /api/repos/create", {"status": 403}, r"\(403\)\. Give the token write access"),
    (COMMIT, {"status": 403}, r"the upload was refused by 127\.0\.0\.1 \(403\)"),
    (COMMIT, {"status": 413}, r"\(413\)\. Check the repository"),
    (COMMIT, {"status": 503}, r"\(503\)\. What is on this disk is complete: send it again later with ms-di"),
    (COMMIT, {"status": 429, "headers": {"Retry-After": "86400"}}, r"\(429\)\. What is on this disk is complete"),
    (COMMIT, {"is_cut": True}, r"the upload failed: the connection to 127\.0\.0\.1 failed .*\. What is on this disk"),
])
def test_a_refusal_is_told_at_once(hub, folder, where, fault, message):
    """The client asks again where it knows that it helps; nothing else does."""
    hub.fail(where, times=99, body=f'{{"error": "not with {TOKEN}"}}'.encode(), **fault)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(HubError, match=message) as caught:
        publish(folder, NAME, endpoint=hub.endpoint)
    assert hub.calls(where) == 1 and hub.messages == []
    assert TOKEN not in str(caught.value) and hub.endpoint not in str(caught.value)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.fault
@pytest.mark.parametrize("fault", [
    {"where": PUT, "is_cut": True}, {"where": PUT, "status": 503, "times": 2},
    {"where": "POST /api/models", "seconds": 0.2, "times": 9},
], ids=["cut", "503", "slow"])
def test_what_the_client_asks_again_for_passes(hub, folder, fault):
    hub.fail(**fault)
    publish(folder, NAME, endpoint=hub.endpoint)
    assert held(hub) == expected(folder) and len(hub.messages) == 1


@pytest.mark.fault
def test_an_interrupted_file_is_whole_afterwards(hub, folder):
    hub.fail(PUT, is_cut=True, times=4)
    publish(folder, NAME, endpoint=hub.endpoint, files=["step-2.safetensors"])
    assert hub.calls(PUT) == 5 and held(hub)["step-2.safetensors"] == expected(folder)["step-2.safetensors"]


@pytest.mark.fault
def test_the_clients_warnings_show_no_signed_address(hub, folder):
    stream = logging.StreamHandler(text := io.StringIO())
    logging.getLogger("huggingface_hub").addHandler(stream)
    try:
        hub.fail(PUT, status=503, times=2)
        publish(folder, NAME, endpoint=hub.endpoint)
    finally:
        logging.getLogger("huggingface_hub").removeHandler(stream)
    assert "503" in text.getvalue() and SIGNATURE not in text.getvalue()


def test_a_repository_that_exists_is_used(hub, folder):
    hub.make(NAME, private=True)
    publish(folder, NAME, endpoint=hub.endpoint)
    publish(folder, NAME, endpoint=hub.endpoint)  # nothing has changed
    assert held(hub) == expected(folder) and len(hub.messages) == 1


@pytest.mark.fault
def test_a_public_repository_is_not_used_for_what_is_private(hub, folder):
    hub.make(NAME, private=False)
    with pytest.raises(HubError, match=r"is public, and a private repository was asked for; nothing was sent\."):
        publish(folder, NAME, endpoint=hub.endpoint)
    assert held(hub) == {} and hub.calls("PUT") == 0
    publish(folder, NAME, endpoint=hub.endpoint, private=False)
    assert held(hub) == expected(folder)


def test_a_name_without_owner_is_the_users_own(hub, folder):
    assert f"/{NAME}/commit/" in publish(folder, "model", endpoint=hub.endpoint)


@pytest.mark.parametrize("name", ["a/b/c", "-a/b", "writer/mo del"])
def test_a_name_that_is_none(hub, folder, name):
    with pytest.raises(HubError, match=r"not a repository name\. Expected owner/name"):
        publish(folder, name, endpoint=hub.endpoint)


@pytest.mark.fault
def test_a_file_lost_by_the_hub_is_found(hub, folder):
    hub.unwritable = {"step-2.safetensors"}
    with pytest.raises(HubError, match=r"does not hold step-2\.safetensors as sent"):
        publish(folder, NAME, endpoint=hub.endpoint)


@pytest.mark.fault
def test_a_refused_connection_names_the_host(hub, folder):
    hub.stop()
    with pytest.raises(HubError, match=r"making the repository failed: the connection to 127\.0\.0\.1"):
        publish(folder, NAME, endpoint=hub.endpoint)


# -- before anything is sent ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("hub_name, endpoint, message", [
    ("hugingface", None, r"hub='hugingface' is unknown.* Did you mean 'huggingface'\?"),
    ("huggingface", "http://hub.example", r"endpoint=http://hub\.example is not an address to which a token"),
    ("huggingface", "https://me:pa55word@hub.example", r"the endpoint of hub\.example holds a user name or a password"),
])
def test_a_wrong_address(hub_name, endpoint, message):
    with pytest.raises(HubError, match=message) as caught:
        connect(hub_name, endpoint)
    assert "pa55" not in str(caught.value)


def test_without_a_token(monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match=r"no token for huggingface\.co\. Log in with 'hf auth login', or set HF_TOKEN"):
        connect("huggingface", "https://huggingface.co")


# -- during training -----------------------------------------------------------------------------------------------


def upload_thread():
    return next(thread for thread in threading.enumerate() if thread.name == "upload")


@pytest.mark.fault
def test_an_upload_in_the_background_is_what_was_there_then(hub, folder):
    want = expected(folder)
    hub.fail("POST /api/repos/create", until=(answer := threading.Event()))
    upload = BackgroundUpload(NAME, endpoint=hub.endpoint)
    upload.submit(folder, "step 2")
    assert upload_thread().is_alive()  # training does not wait for the hub
    save_state_dict(folder / "step-2.safetensors", {"a": np.zeros(3, np.float32)})  # replaced as a whole
    with open(folder / "README.md", "r+b") as file:  # written in place
        file.write(b"TORN")
    (folder / "model.py").unlink()
    answer.set()
    assert upload.close() == []
    assert held(hub) == want and hub.messages == ["step 2"] and hub.private[NAME]
    assert staging(folder) == []


def test_the_newest_replaces_what_waits(hub, folder):
    hub.fail("POST /api/repos/create", until=(answer := threading.Event()))
    upload = BackgroundUpload(NAME, endpoint=hub.endpoint)
    for step in range(4):
        (folder / "README.md").write_text(f"step {step}")
        upload.submit(folder, f"step {step}")
        while not hub.calls("POST /api/repos/create"):  # the first is under way
            time.sleep(0.01)
    answer.set()
    assert upload.close() == []
    assert hub.messages == ["step 0", "step 3"] and held(hub)["README.md"] == b"step 3"
    assert staging(folder) == []


@pytest.mark.fault
@pytest.mark.parametrize("fault", [{"status": 401}, {"status": 503}, {"status": 429}, {"is_cut": True},
                                   {"status": 200, "body": b"no JSON"}])
def test_a_failing_upload_is_one_line_and_nothing_more(hub, folder, caplog, fault):
    hub.fail("POST /api/repos/create", times=99, **fault)
    upload = BackgroundUpload(NAME, endpoint=hub.endpoint)
    with caplog.at_level(logging.WARNING, "ms_diffsynth"):
        upload.submit(folder)
        failures = upload.close()
    assert len(failures) == 1 and failures[0].startswith("HubError: writer/model: making the repository")
    assert "\n" not in failures[0] and TOKEN not in caplog.text
    assert "training continues" in caplog.text and "1 uploads to writer/model failed" in caplog.text
    assert (folder / "step-2.safetensors").is_file() and staging(folder) == []


@pytest.mark.fault
def test_a_folder_that_is_gone_is_a_failure_too(hub, folder):
    upload = BackgroundUpload(NAME, endpoint=hub.endpoint)
    upload.submit(folder / "none")
    upload.submit(folder)
    assert [line[:20] for line in upload.close()] == [f"HubError: {folder}"[:20]]
    assert held(hub) == expected(folder)


@pytest.mark.fault
def test_training_ends_although_the_hub_does_not_answer(hub, folder):
    hub.fail("POST /api/repos/create", until=(answer := threading.Event()))
    upload = BackgroundUpload(NAME, endpoint=hub.endpoint)
    upload.submit(folder)
    assert upload.close(timeout=0.1) == ["TimeoutError: not done after 0 seconds"]
    thread = upload_thread()
    assert thread.is_alive() and thread.daemon
    answer.set()
    thread.join()


def test_what_is_wrong_at_the_start_is_told_at_the_start(monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="there is no token"):
        BackgroundUpload(NAME)


# -- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch):
    monkeypatch.setattr("ms_diffsynth.cli.main.COMMANDS", {"push": "publish a folder on a hub"})

    def run(*arguments):
        args = parser("push").parse_args(["push", *map(str, arguments)])
        return args.execute(args)
    return run


def test_push(hub, folder, command, monkeypatch, capsys):
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    assert command(folder, "--hub_model_id", NAME, "--hub_public", "--files", "*.safetensors") == 0
    out, err = capsys.readouterr()
    assert out.startswith(f"{hub.endpoint}/{NAME}/commit/") and "published without a model card" in err
    assert not hub.private[NAME] and sorted(held(hub)) == ["step-2.safetensors"]


def test_push_dry_run(hub, folder, command, capsys):
    assert command(folder, "--hub_model_id", NAME, "--dry_run") == 0
    assert [line.split()[-1] for line in capsys.readouterr().out.splitlines()] == sorted(expected(folder))
    assert hub.requests == []


@pytest.mark.fault
@pytest.mark.parametrize("flag", [["--token", TOKEN], [f"--hub_token={TOKEN}"], ["--token"]])
def test_push_takes_no_token(folder, command, flag):
    with pytest.raises(ConfigError, match="a token is never a flag") as caught:
        command(folder, "--hub_model_id", NAME, *flag)
    assert TOKEN not in str(caught.value)
