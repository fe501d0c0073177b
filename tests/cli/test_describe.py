"""`describe` on any machine: the two halves of a run, of models that are not here too."""
from __future__ import annotations

import socket
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name, words, expected", [
    ("flux/lora_dev_910b.yaml", (), ("velocity = denoise(latents, sigma, prompt_embeds, pooled_prompt_embeds, guidance)"
                                     "  # dit\n", "step loads: dit\n")),
    ("qwen_image/edit_2511_910b.yaml", (), ("prepare loads: text_encoder, tokenizer, vae, vision_tower\n",)),
    ("sd3/medium_lora_910b.yaml", ("--fuse", "encode_image"), ("step loads: dit, vae\n",)),
    ("flux2/klein_template_910b.yaml", (), ("the template is left out: its code is run only with --trust_template_",)),
    ("flux2/klein_lora_910b.yaml", ("--trainable_models", "dit,text_encoder", "--lora_base_model", "null"),
     ("step loads: dit, text_encoder\n",)),
])
def test_a_run_for_an_ascend_is_described_without_it_and_without_its_models(run, monkeypatch, name, words, expected):
    def refuse(*_):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(ROOT)
    code, out, err = run("describe", f"examples/{name}", *words)
    assert code == 0, err
    assert out.startswith("def prepare(prompt, input_image") and all(text in out for text in expected), out


def test_what_cannot_be_trained_is_told(run, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, _, err = run("describe", "examples/flux/lora_dev_910b.yaml", "--lora_base_model", "dot")
    assert code == 64 and "lora_base_model: 'dot' cannot be trained" in err and "Did you mean 'dit'?" in err
