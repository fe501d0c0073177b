"""What PyTorch's encoders make of a tiny Wan's weights: writes wan_encoders/expected.safetensors beside it.

    ms-diffsynth tiny wan models/wan --variant i2v
    TORCH_ENV/bin/python tests/golden/make_wan_encoders.py models/wan   # torch 2.13, transformers 4.57, diffusers 0.39

``ids.<k>``, ``embeds.<k>``: the prompts of PROMPTS, by the tokenizer and UMT5 as WanPipeline calls them, padded
to 512 tokens; the rows of the prompt alone. ``frame`` float32 [3, 20, 30] in [-1, 1]; ``squashed`` of it, as Wan's own
code does it; ``image_embeds`` of that by CLIP.
"""
from __future__ import annotations

import sys
from pathlib import Path

import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from safetensors.torch import save_file
from transformers import CLIPVisionModel, T5Tokenizer, UMT5EncoderModel

HERE = Path(__file__).parent
PROMPTS = ("", "a red cat", "A  cat &amp;amp; a dog\n run " + "through the long wet grass of a meadow " * 16)
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@torch.no_grad()
def main(model: Path) -> None:
    tokenizer = T5Tokenizer.from_pretrained(model / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(model / "text_encoder").float().eval()
    found = {}
    for k, prompt in enumerate(PROMPTS):
        text = tokenizer([prompt_clean(prompt)], padding="max_length", max_length=512, truncation=True,
                         return_attention_mask=True, return_tensors="pt")
        length = int(text.attention_mask.sum())
        hidden = encoder(text.input_ids, text.attention_mask).last_hidden_state
        found |= {f"ids.{k}": text.input_ids[:, :length].int(), f"embeds.{k}": hidden[:, :length].contiguous()}
    frame = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0)) * 2 - 1
    small = torch.nn.functional.interpolate(frame[None], size=(224, 224), mode="bicubic", align_corners=False)
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (MEAN, STD))
    clip = CLIPVisionModel.from_pretrained(model / "image_encoder").float().eval()
    hidden = clip((small * 0.5 + 0.5 - mean) / std, output_hidden_states=True).hidden_states[-2]
    found |= {"frame": frame, "squashed": small[0, :, ::32].contiguous(), "image_embeds": hidden[:, ::8].contiguous()}
    (HERE / "wan_encoders").mkdir(exist_ok=True)
    save_file(found, HERE / "wan_encoders/expected.safetensors")
    print({name: tuple(x.shape) for name, x in found.items()})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
