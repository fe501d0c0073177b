"""What is secret leaves no trace: by value and by form, in messages, logs, cards, files and uploads."""
from __future__ import annotations

import base64
import io
import logging
from urllib.parse import quote

import pytest
from huggingface_hub import constants
from upload_server import UploadServer

from ms_diffsynth.errors import HubError
from ms_diffsynth.hub.card import Card, model_card
from ms_diffsynth.hub.publish import BackgroundUpload, publish
from ms_diffsynth.redact import RedactFilter, redact

ENVIRONMENT = {"HF_TOKEN": "hf_EnvironmentEnvironment0001", "HUGGING_FACE_HUB_TOKEN": "old-style-token-0002",
               "MODELSCOPE_API_TOKEN": "12345678-modelscope-0003", "AWS_SECRET_ACCESS_KEY": "a/b+c/secret-key-0004"}
ELSEWHERE = ["hf_elsewhereelsewhere0005", "ms-00000000-1111-2222-3333-444455550006",
             "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIwMDA3In0.c2lnbmF0dXJlLTAwMDc", "https://me:pa55word-0008@host.example/x"]
SECRETS = [*ENVIRONMENT.values(), *ELSEWHERE[:3], "pa55word-0008"]


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-login"))


@pytest.mark.parametrize("text, expected", [
    ("GET https://me:pa55@host/x?token=short&a=b", "GET https://[redacted]@host/x?token=[redacted]&a=b"),
    ("--hub_token abc --lr 1", "--hub_token [redacted] --lr 1"),
    ("--token='a-b-c'", "--token='[redacted]'"),
    ("Authorization: Bearer abcdefgh", "Authorization: Bearer [redacted]"),
    ("db_password: hunter2", "db_password: [redacted]"),
    ('{"api_key": "abcdef"}', '{"api_key": "[redacted]"}'),
    ("PUT /x?X-Amz-Signature=0123456789&y=1", "PUT /x?X-Amz-Signature=[redacted]&y=1"),
    ("token: abcdefgh12345", "token: [redacted]"),
    ("git+https://hf_abc@huggingface.co/a/b", "git+https://[redacted]@huggingface.co/a/b"),
])
def test_what_looks_secret(text, expected):
    assert redact(text) == expected == redact(redact(text))


@pytest.mark.parametrize("text", [
    "hf_hub_download, hf_transfer and HF_HUB_DISABLE_XET=1", "ms-diffsynth push runs/x --hub_model_id me/name",
    "tokenizer_path: models/tokenizer_2", "max_token=512, class_token: sks", "token = tokenizer.encode2(x)[0]",
    "there is no token: log in with 'hf auth login'", "https://huggingface.co/me/name/resolve/main/step-72.safetensors",
    "9d0f6a1c1a1f0d5f7b7b7c7d8e9f0a1b2c3d4e5f", "secret: yes", "a@b.example",
])
def test_what_is_harmless_stays(text):
    assert redact(text) == text


def test_a_login_and_given_values(monkeypatch, tmp_path):
    for name in ENVIRONMENT:
        monkeypatch.delenv(name)
    login = tmp_path / "login"
    login.write_text("token-of-the-login\n")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(login))
    assert redact("x token-of-the-login y given-value", "given-value") == "x [redacted] y [redacted]"


def test_short_values_and_paths_are_no_secrets(monkeypatch):
    monkeypatch.setenv("MY_TOKEN", "cat")
    monkeypatch.setenv("TOKEN_FILE", "/data/token")
    assert redact("a cat in /data/token") == "a cat in /data/token"


@pytest.mark.parametrize("before", ["", "u:", "us:", "use:"])
def test_base64_wherever_the_value_begins(before):
    text = base64.b64encode(f"{before}{ENVIRONMENT['AWS_SECRET_ACCESS_KEY']}:tail".encode()).decode()
    hidden = redact(text)
    assert "[redacted]" in hidden and len(hidden.replace("[redacted]", "")) <= 16


def forms(secret):
    return [secret, quote(secret, safe=""), base64.b64encode(secret.encode()).decode().rstrip("=")[:-2]]


def cards():
    """Channel 1: a model card."""
    for secret in (*ENVIRONMENT.values(), *ELSEWHERE):
        yield model_card(Card(model_id="w/m", family="flux", trained="lora", weights="a.safetensors", dataset=secret,
                              instance_prompt=f"a {secret}", prompts=[secret, f"x {secret}"],
                              samples=["a.png", "b.png"],
                              settings={"note": secret, "deep": {"list": [secret]}}, command=["x", "--flag", secret],
                              versions={secret: secret}, base_model=secret))


def logs(template):
    """Channels 2 and 3: a log with a traceback, raw and encoded."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.addFilter(RedactFilter())
    logger = logging.getLogger("planted")
    logger.addHandler(handler)
    for secret in (*ENVIRONMENT.values(), *ELSEWHERE):
        try:
            raise ValueError(template(secret))
        except ValueError:
            logger.exception("message %s", template(secret))
    logger.removeHandler(handler)
    yield stream.getvalue()


def test_a_record_whose_arguments_do_not_fit_its_text_is_logged_all_the_same():
    record = logging.LogRecord("library", logging.WARNING, __file__, 1, "%d rows", (ENVIRONMENT["HF_TOKEN"],), None)
    assert RedactFilter().filter(record) and record.getMessage() == "%d rows ('[redacted]',)"


def encoded(secret):
    known = secret in ENVIRONMENT.values()  # others are known by their form alone
    return f"https://host/x?token={quote(secret, safe='')} Authorization: Basic " + (
        base64.b64encode(f"me:{secret}".encode()).decode() if known else "bWU6eA==abcd")


def failures(folder, hub, caplog):
    """Channel 4: text of exceptions during an upload."""
    for secret in (*ENVIRONMENT.values(), *ELSEWHERE):
        upload = BackgroundUpload("w/m", endpoint=hub.endpoint)

        def fail(*_, secret=secret, **__):
            raise RuntimeError(f"client says\n{secret}")
        upload._client.send = fail
        upload.submit(folder)
        yield from upload.close()
    yield caplog.text


def files(folder, hub):
    """Channel 5: a file that is to be published."""
    for secret in (*ENVIRONMENT.values(), *ELSEWHERE):
        (folder / "config.json").write_text(f'{{"a": "{secret}"}}')
        with pytest.raises(HubError, match=r"config\.json line 1; nothing was sent") as caught:
            publish(folder, "w/m", endpoint=hub.endpoint)
        yield str(caught.value)
    (folder / "config.json").unlink()


@pytest.mark.fault
def test_of_forty_planted_secrets_none_is_found(tmp_path, caplog, capfd):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model.py").write_text("x = 1\n")
    with UploadServer() as hub:
        channels = [list(cards()), list(logs(str)), list(logs(encoded)), list(files(folder, hub)),
                    list(failures(folder, hub, caplog))]
        sent = b"".join(hub.sent).decode(errors="replace")
    assert len(channels) * len(SECRETS) == 40
    text = "\n".join([*(t for channel in channels for t in channel), *capfd.readouterr(), sent])
    assert all(any("[redacted]" in t for t in channel) or k == 3 for k, channel in enumerate(channels))
    assert [s for s in SECRETS if any(form in text for form in forms(s))] == []
