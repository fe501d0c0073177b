"""Qwen-Image's ControlNet: a copy of the transformer's first blocks that reads a condition beside the noisy latents.

As `pipelines.flux.controlnet`: each block gives one sample, which is added to the image behind blocks of the
transformer, and the blocks are those of `transformer`, equal ones compiled once. Padded text is not attended to;
mindone 0.5.0 has no mask here.

Shape legend: B batch, L text tokens, N image tokens, C channels of a token, D width.
"""
from __future__ import annotations

from typing import Any

import mindspore as ms

from ms_diffsynth.models import arguments
from ms_diffsynth.pipelines.qwen_image.transformer import QwenImageNetwork
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.pipelines.shared.rotary import check_axes

with quiet_imports():
    from mindone.diffusers.models.controlnets import controlnet_qwenimage as mindone


class QwenImageControlNet(QwenImageNetwork, mindone.QwenImageControlNetModel):
    """Samples for the transformer's blocks, from noisy latents and a condition."""

    def construct(self, tokens, condition, scale, sigma, prompt_embeds, cos, sin, prompt_mask=None):
        """tokens [B, N, 4C], condition [B, N, 4C'] (of a picture with a hole and its mask: 16 + 1 channels), scale
        float32 [B, 1]; the others as in `transformer.QwenImageTransformer` -> a tuple of [B, N, D]."""
        image = self.img_in(tokens) + self.controlnet_x_embedder(condition)
        text = self.txt_in(self.txt_norm(prompt_embeds))
        emb, scale = self.embed(sigma.astype(ms.float32), image.dtype), scale.reshape(-1, 1, 1).astype(image.dtype)
        cos, sin, mask = self.places_and_mask(cos, sin, prompt_mask, image.shape[0], text.shape[1], image.dtype)
        lora = self.lora(image) if self.has_lora else self.no_lora
        cells, cell_of, weights, places = self.block_cells, self.block_cell_of, self.block_weights, self.block_lora
        samples, last = (), len(cell_of) - 1
        for i in range(last):
            image, text = cells[cell_of[i]]((image, text, emb, cos, sin, mask), weights[i], lora[places[i]])
            samples += (self.controlnet_blocks[i](image) * scale,)
        image = cells[cell_of[last]]((image, text, emb, cos, sin, mask), weights[last], lora[places[last]])
        return samples + (self.controlnet_blocks[last](image) * scale,)


def build_controlnet(config: dict[str, Any]) -> QwenImageControlNet:
    """The network of a ``config.json``, its weights still to come.

    Raises: WeightError for a setting that cannot be meant.
    """
    given = arguments(mindone.QwenImageControlNetModel, config)
    check_axes(given)
    net = mindone.QwenImageControlNetModel(**given)
    net.update_parameters_name("controlnet.")  # in compiled code the transformer's Parameters have the same names
    return QwenImageControlNet.of(net)
