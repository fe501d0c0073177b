"""What is secret leaves no trace: by value and by form, in messages, logs, cards, files and uploads."""
from __future__ import annotations

import base64
import io
import json
import logging
import sys
from contextlib import redirect_stderr, redirect_stdout
from urllib.parse import quote

import pytest
from huggingface_hub import constants

from ms_diffsynth.cli.run_main import run_main
from ms_diffsynth.hub.card import Card, model_card
from ms_diffsynth.redact import redact, redact_logs, without_secrets

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


def card(secret):
    return model_card(Card(model_id="w/m", trained="lora", weights="a.safetensors", dataset=secret, base_model=secret,
                           instance_prompt=f"a {secret}", prompts=[secret, f"x {secret}"], samples=["a.png", "b.png"],
                           settings={"note": secret, "deep": {"list": [secret]}}, command=["x", "--flag", secret],
                           versions={secret: secret}))


def log(text):
    """A record with a traceback, to a handler that is there already."""
    logger, handler = logging.getLogger("planted"), logging.StreamHandler(stream := io.StringIO())
    logger.addHandler(handler)
    try:
        raise ValueError(text)
    except ValueError:
        logger.exception("message %s", text)
    logger.removeHandler(handler)
    return stream.getvalue()


def encoded_log(secret):
    known = secret in ENVIRONMENT.values()  # others are known by their form alone
    basic = base64.b64encode(f"me:{secret}".encode()).decode() if known else "bWU6eA==abcd"
    return log(f"https://host/x?token={quote(secret, safe='')} Authorization: Basic {basic}")


def terminal(secret):
    """What a run prints, to either stream, and a traceback."""
    def main():
        sys.stdout.write(f"out {secret}\n")
        raise KeyError(secret)

    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        assert run_main(main) == 70
        sys.stdout.write("nothing else is changed")
    return out.getvalue()


def written(secret):
    return json.dumps(without_secrets({"a": secret, secret: [f"x {secret}"], "deep": {"api_key": secret}}))


@pytest.mark.fault
@pytest.mark.parametrize("door", [card, log, encoded_log, terminal, written], ids=lambda door: door.__name__)
def test_of_forty_planted_secrets_none_is_found(door):
    before = logging.getLogRecordFactory()
    redact_logs()
    try:
        text = "\n".join(door(secret) for secret in (*ENVIRONMENT.values(), *ELSEWHERE))
    finally:
        logging.setLogRecordFactory(before)
    assert len(SECRETS) == 8 and text.count("[redacted]") >= 8
    assert [s for s in SECRETS if any(form in text for form in forms(s))] == []


def test_a_record_whose_arguments_do_not_fit_its_text_is_logged_all_the_same(monkeypatch):
    monkeypatch.setattr(logging, "_logRecordFactory", logging.LogRecord)
    redact_logs()
    make = logging.getLogRecordFactory()
    record = make("library", logging.WARNING, __file__, 1, "%d rows", (ENVIRONMENT["HF_TOKEN"],), None)
    redact_logs()
    assert record.getMessage() == "%d rows ('[redacted]',)" and logging.getLogRecordFactory() is make
