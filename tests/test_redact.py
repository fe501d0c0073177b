"""What is secret leaves no trace: by value and by form, in messages, logs, cards, files and uploads."""
from __future__ import annotations

import base64
import io
import logging
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest
from huggingface_hub import constants

from ms_diffsynth.cli.run_main import run_main
from ms_diffsynth.redact import redact, redact_logs

ENVIRONMENT = {"HF_TOKEN": "hf_EnvironmentEnvironment0001", "HUGGING_FACE_HUB_TOKEN": "old-style-token-0002",
               "MODELSCOPE_API_TOKEN": "12345678-modelscope-0003", "AWS_SECRET_ACCESS_KEY": "a/b+c/secret-key-0004"}
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


def test_a_record_whose_arguments_do_not_fit_its_text_is_logged_all_the_same(monkeypatch):
    monkeypatch.setattr(logging, "_logRecordFactory", logging.LogRecord)
    redact_logs()
    make = logging.getLogRecordFactory()
    record = make("library", logging.WARNING, __file__, 1, "%d rows", (ENVIRONMENT["HF_TOKEN"],), None)
    redact_logs()
    assert record.getMessage() == "%d rows ('[redacted]',)" and logging.getLogRecordFactory() is make


def test_what_is_printed_and_a_traceback_while_a_command_runs_and_nothing_afterwards():
    secret = ENVIRONMENT["HF_TOKEN"]

    def main():
        sys.stdout.write(f"out {secret}\n")
        raise KeyError(secret)

    with redirect_stdout(io.StringIO()) as out, redirect_stderr(out):
        assert run_main(main) == 70
        sys.stdout.write(f"after {secret}")
    text = out.getvalue()
    assert text.startswith("out [redacted]\n") and "KeyError: '[redacted]'" in text
    assert text.endswith(f"after {secret}") and text.count(secret) == 1
