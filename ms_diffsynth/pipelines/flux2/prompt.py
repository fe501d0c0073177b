"""A prompt as token ids, in the chat template of the text encoder: Qwen3 (klein) or Mistral (dev)."""
from __future__ import annotations

from typing import Any

from ms_diffsynth.pipelines.shared.text import check_template

# Qwen3's chat template with enable_thinking=False, as both diffusers 0.37 and DiffSynth-Studio 2.1.12 apply it
TEMPLATE = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
BEFORE = (151644, 872, 198)
BEHIND = (151645, 198, 151644, 77091, 198, 151667, 271, 151668, 271)

# dev's, with the line break of diffusers 0.36 and of FLUX.2's own code; DiffSynth-Studio 2.1.12 has a blank there
SYSTEM_MESSAGE = """You are an AI that reasons about image descriptions. You give structured responses focusing on \
object relationships, object
attribution and actions without speculation."""
DEV_BEFORE = (1, 17)  # <s>[SYSTEM_PROMPT]
DEV_BEHIND = (4,)  # [/INST]


def klein_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt for Qwen3. Raises: WeightError for another model's tokenizer."""
    # without the last of BEFORE: line breaks that a prompt begins with become one token with the template's
    return check_template(tokenizer(TEMPLATE.format(prompt)).input_ids, BEFORE[:-1], BEHIND, "Qwen3", "FLUX.2-klein")


def dev_ids(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt for Mistral, by the tokenizer's own template. Raises: as `klein_ids`.

    A ``[IMG]`` in the prompt is left out: it would stand for an image.
    """
    turns = (("system", SYSTEM_MESSAGE), ("user", prompt.replace("[IMG]", "")))
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in turns]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    ids = tokenizer(text, add_special_tokens=False).input_ids  # the template begins with <s> by itself
    return check_template(ids, DEV_BEFORE, DEV_BEHIND, "Mistral", "FLUX.2-dev")
