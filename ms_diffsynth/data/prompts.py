"""What a prompt may be, wherever it comes from: a caption, a setting, a flag."""
from __future__ import annotations

import re
import unicodedata

from ms_diffsynth.errors import listing

LONGEST_PROMPT = 10_000  # characters; the longest that an encoder reads is 1024 tokens (Qwen-Image)

_NO_TEXT = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def has_word(prompt: str, word: str) -> bool:
    """Whether a word, or several, stands in a prompt, in any case of letters and not as a part of another."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", prompt, re.IGNORECASE) is not None


def prompt_problem(prompt: str) -> str:
    """What is wrong with a prompt that no text encoder can be given, as it follows its value; or an empty string."""
    if len(prompt) > LONGEST_PROMPT:
        return (f"has {len(prompt)} characters; expected at most {LONGEST_PROMPT}, which is more than a text encoder "
                "reads. Shorten it")
    if odd := sorted(set(_NO_TEXT.findall(prompt))):
        return (f"holds {listing(f'U+{ord(letter):04X}' for letter in odd)}, control characters or half a pair; "
                "expected text. Remove them")
    if prompt.strip() and all(unicodedata.category(letter)[0] in "CZ" for letter in prompt):
        return "holds nothing that can be seen; expected text, or nothing at all for the empty prompt. Write one"
    return ""
