"""Configurations made to run code, to fill memory, or to take what is not theirs: refused with their line."""
from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.fault

CANARY = "!!python/object/apply:os.system ['touch canary']"
BOMB = "run:\n  sample_prompts: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"  {name}: &{name} [{', '.join(['*' + before] * 9)}]\n" for before, name in zip("abcdefgh", "bcdefghi"))


@pytest.fixture
def shallow():
    """As deep as calls may be when a configuration is read; MindSpore, imported later, raises that."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.usefixtures("shallow")
@pytest.mark.parametrize("text, expected", [
    (f"run:\n  output_path: {CANARY}\n", "output_path=['touch canary'] in c.yaml line 2: expected text"),
    (f"{CANARY}\n", "c.yaml line 1: expected sections, each as 'name: value'"),
    (f"run: {CANARY}\n", "run in c.yaml line 1"),
    ("run:\n  seed: !!python/name:os.system\n", "seed=(a value tagged !!python/name:os.system) in c.yaml line 2"),
    ("run:\n  seed: !!python/object/new:os.system [touch canary]\n", "in c.yaml line 2: expected a whole number"),
    (BOMB, "b in c.yaml line 3 is not a setting"),
    ("run:\n  sample_prompts:\n" + "    - a prompt of some words\n" * 400_000, " bytes, expected at most 1048576"),
    ("run: " + "[" * 5_000, "c.yaml is not YAML: maximum recursion depth exceeded"),
    ("run: " + "{a: " * 5_000, "c.yaml is not YAML: maximum recursion depth exceeded"),
    ("run:\n  seed: 1\n  seed: 2\n", "seed in c.yaml line 3: it is set already in line 2"),
    ("run:\n  push_to_hub: no\n", "push_to_hub=no in c.yaml line 2: expected true or false"),
    ("run:\n  seed: 010x\n", "seed=010x in c.yaml line 2: expected a whole number"),
    ("run:\n  output_path: \0\n", "is not YAML"), ("run:\n\toutput_path: x\n", "c.yaml line 2 is not YAML"),
    ("run: &x\n  seed: 1\ndata: *x\n", "seed in c.yaml line 2: it belongs into section 'run'"),
    ("optimizer:\n  customized_optimizer: os.system\n", "customized_optimizer in c.yaml line 2 is not a setting"),
])
def test_a_configuration_runs_nothing_and_takes_no_time(run, text, expected):
    Path("c.yaml").write_text(text)
    began, before = time.thread_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, err = run("train", "c.yaml")
    assert code == 64 and err.startswith("ConfigError: ") and expected in err
    assert not Path("canary").exists() and not Path("models").exists()
    assert time.thread_time() - began < 5 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100e3


@pytest.mark.parametrize("name", ["${oc.env:HF_TOKEN}", "${HF_TOKEN}", "$HF_TOKEN", "%(HF_TOKEN)s", "{HF_TOKEN}"])
def test_nothing_of_the_environment_enters_a_configuration(run, monkeypatch, name):
    monkeypatch.setenv("HF_TOKEN", "hf_abcdefghijklmnop0123")
    Path("c.yaml").write_text(f"model:\n  family: toy\n  lora_rank: '{name}'\n")
    code, err = run("train", "c.yaml")
    assert code == 64 and f"lora_rank={name} in c.yaml line 3" in err and "abcdefghijklmnop" not in err


@pytest.mark.parametrize("words", [
    ["--customized_optimizer", "os.system"], ["--optimizer", "os.system"], ["--lr_scheduler", "os.system"],
    ["--weighting_scheme", "os.system"], ["--task", "os.system"], ["--family", "os.system"]])
def test_no_setting_is_a_name_to_import(run, words):
    code, err = run("train", *words, "--dataset_base_path", "d", "--num_epochs", "1",
                    *([] if "--family" in words else ["--family", "toy"]))
    assert code == 64 and ("does not know" in err or "expected one of" in err)
