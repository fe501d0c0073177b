"""How FLUX.2's transformer is called: latents are its tokens as they are, edit images follow them."""
from __future__ import annotations

import mindspore as ms
from mindspore import Tensor, ops

from ms_diffsynth.pipelines.flux2.rotary import edit_table, image_table
from ms_diffsynth.pipelines.flux2.template import by_block, with_text
from ms_diffsynth.units import TensorUnit


class Denoise(TensorUnit):
    """Velocity at noisy latents. ``guidance`` is used by a guidance-distilled network (dev) only.

    Shapes: latents float [B, C, H, W], sigma float32 [B], prompt_embeds [B, L, D], guidance float32 [B], edit_latents
    [B, M, C], edit_places int32 [B, M, 4], template_cache as in `template.cache` -> velocity float32
    [B, C, H, W]. The network computes in ``dtype``.
    """

    input_params = ("latents", "sigma", "prompt_embeds", "guidance?", "edit_latents?", "edit_places?",
                    "template_cache?")
    output_params = ("velocity",)
    onload_model_names = ("dit",)

    def attach(self, pipe):
        super().attach(pipe)
        config = pipe.config("dit")
        self.is_guided = bool(config.get("guidance_embeds", True))
        self.axes, self.theta = tuple(config["axes_dims_rope"]), float(config["rope_theta"])
        self.head = (int(config["num_attention_heads"]), int(config["attention_head_dim"]))
        self.blocks = tuple(f"{kind}_{i}" for kind, count in (("double", config["num_layers"]),
                                                              ("single", config["num_single_layers"]))
                            for i in range(count))

    def construct(self, latents, sigma, prompt_embeds, guidance=None, edit_latents=None, edit_places=None,
                  template_cache=None):
        height, width = latents.shape[2], latents.shape[3]
        if not self.is_guided:
            guidance = None
        template = {}
        if template_cache is not None:
            template = by_block(template_cache, self.blocks, latents.shape[0], self.head, self.dtype)
            prompt_embeds = with_text(prompt_embeds, template_cache)
        tokens = to_tokens(latents)
        cos, sin = image_table(prompt_embeds.shape[1], height, width, self.axes, self.theta)
        has_references = edit_latents is not None and edit_latents.shape[1] > 0
        if has_references:
            tokens = ops.cat((tokens, edit_latents.astype(tokens.dtype)), 1)
            edit_cos, edit_sin = edit_table(edit_places, self.axes, self.theta)
            cos, sin = joined(cos, edit_cos), joined(sin, edit_sin)
        velocity = self.dit(tokens.astype(self.dtype), sigma, guidance, prompt_embeds.astype(self.dtype), cos, sin,
                            template)
        if has_references:
            velocity = velocity[:, :height * width]
        return (from_tokens(velocity, height, width).astype(ms.float32),)


def to_tokens(latents: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, H W, C]: the 2x2 patches lie in the channels already."""
    return latents.reshape(latents.shape[0], latents.shape[1], -1).swapaxes(1, 2)


def from_tokens(tokens: Tensor, height: int, width: int) -> Tensor:
    """Inverse of `to_tokens`."""
    return tokens.swapaxes(1, 2).reshape(tokens.shape[0], tokens.shape[2], height, width)


def joined(table: Tensor, other: Tensor) -> Tensor:
    """A table of text and image [1, S, D], and of edit images [B, M, D] behind it: [B, S + M, D]."""
    return ops.cat((ops.broadcast_to(table, (other.shape[0],) + table.shape[1:]), other), 1)
