"""The memory that FLUX.2 klein's configuration promises."""
from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_memory_of_the_real_thing_adds_up():
    """The head's terms, from the sizes of FLUX.2-klein-4B and Qwen3-4B, in GiB."""
    width, text, feed = 3072, 2560, 9728
    double, single = 26 * width * width + 4 * 128, 13 * width * width + 2 * 128
    modulations = (6 + 6 + 3) * width * width
    ends = (256 + width) * width + 128 * width + 3 * text * width + 2 * width * width + width * 128
    transformer = 5 * double + 20 * single + modulations + ends
    layer = 2 * text * 32 * 128 + 2 * text * 8 * 128 + 3 * text * feed + 2 * text + 2 * 128
    encoder = 151936 * text + 27 * layer
    lora = 16 * width * (5 * (8 * 2 + 2 * 7 + 2 * 4) + 20 * (10 + 5))
    terms = [transformer * 2, encoder * 2, lora * 16, 25 * 40 * (4096 + 512) * width * 2]
    page = (ROOT / "examples/flux2/klein_lora_910b.yaml").read_text()
    shown = [float(number) for number in re.findall(r" ([\d.]+) GiB$", page, re.MULTILINE)]
    assert shown == [round(term / 2**30, 1) for term in (*terms, sum(terms))]
    assert all(part in page for part in (f"{transformer / 1e9:.2f}e9", f"{encoder / 1e9:.2f}e9", f"{lora / 1e6:.1f}e6"))
