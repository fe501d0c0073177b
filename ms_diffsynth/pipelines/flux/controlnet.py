"""FLUX.1's ControlNet: a copy of the transformer's first blocks that reads a condition beside the noisy latents.

Each of its blocks gives one sample, which is added to the image behind blocks of the transformer. What projects the
samples, and what reads the condition, is zero in a new ControlNet: it changes nothing at first (Zhang et al. 2023,
arXiv:2302.05543). The blocks are those of `transformer`, equal ones compiled once.

Shape legend: B batch, L text tokens, N image tokens, C channels of a token, D width.
"""
from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import mint, ops

from ms_diffsynth.errors import WeightError
from ms_diffsynth.models import arguments
from ms_diffsynth.ops import network
from ms_diffsynth.pipelines.flux.transformer import FluxNetwork, use_own_blocks
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.pipelines.shared.rotary import check_axes

with quiet_imports():
    from mindone.diffusers.models.controlnets import controlnet_flux as mindone


class FluxControlNet(FluxNetwork, mindone.FluxControlNetModel):
    """Samples for the transformer's blocks, from noisy latents and a condition."""

    def construct(self, tokens, condition, mode, scale, timestep, guidance, pooled_projections, encoder_hidden_states,
                  img_ids):
        """tokens [B, N, C], condition [B, N, C'], mode int32 [B, 1] (which of a union of ControlNets; another does
        not read it), scale float32 [B, 1], timestep (sigma) and guidance float32 [B], pooled_projections [B, P],
        encoder_hidden_states [B, L, D'], img_ids float32 [N, 3] -> samples of the double blocks, those of the single
        ones: tuples of [B, N, D]."""
        image = self.x_embedder(tokens) + self.controlnet_x_embedder(condition)
        text = self.context_embedder(encoder_hidden_states)
        if self.union:
            text = mint.cat((self.controlnet_mode_embedder(mode).astype(text.dtype), text), dim=1)
        if not self.is_guided:
            guidance = None
        text_tokens = text.shape[1]
        ids = mint.cat((ops.zeros((text_tokens, 3), ms.float32), img_ids), dim=0).expand_dims(0)
        emb, cos, sin = self.conditions(timestep, guidance, pooled_projections, ids, image.dtype)
        scale = scale.reshape(-1, 1, 1).astype(image.dtype)
        lora = self.lora(image) if self.has_lora else self.no_lora
        cells, cell_of = self.double_cells, self.double_cell_of
        weights, places = self.double_weights, self.double_lora
        samples, single_samples = (), ()
        for i in range(len(cell_of)):
            text, image = cells[cell_of[i]]((text, image, emb, cos, sin), weights[i], lora[places[i]])
            samples += (self.controlnet_blocks[i](image) * scale,)
        x = network.join(text, image)
        cells, cell_of = self.single_cells, self.single_cell_of
        weights, places = self.single_weights, self.single_lora
        for i in range(len(cell_of)):
            x = cells[cell_of[i]]((x, emb, cos, sin), weights[i], lora[places[i]])
            single_samples += (self.controlnet_single_blocks[i](network.part(x, text_tokens)[1]) * scale,)
        return samples, single_samples


def build_controlnet(config: dict[str, Any]) -> FluxControlNet:
    """The network of a ``config.json``, its weights still to come. ``extra_condition_channels``, of a mask, is of the
    ControlNets that alimama-creative and DiffSynth-Studio have for inpainting; diffusers' class is without.

    Raises: WeightError for a setting that cannot be meant, or a condition in pixels, which is not computed here.
    """
    if config.get("conditioning_embedding_channels") is not None:
        raise WeightError(f"it says conditioning_embedding_channels={config['conditioning_embedding_channels']}, of a "
                          "ControlNet that reads pixels: expected null, of one that reads latents. Take another one.")
    extra = config.get("extra_condition_channels") or 0
    given = arguments(mindone.FluxControlNetModel, {k: v for k, v in config.items()
                                                    if k != "extra_condition_channels" and v is not None})
    check_axes(given)
    with quiet_imports():  # it warns of a class of its own
        net = mindone.FluxControlNetModel(**given)
    if extra:
        net.controlnet_x_embedder = mint.nn.Linear(net.config.in_channels + extra, net.inner_dim)
    net.register_to_config(extra_condition_channels=extra)
    net.is_guided = net.config.guidance_embeds
    net.update_parameters_name("controlnet.")  # in compiled code the transformer's Parameters have the same names
    return use_own_blocks(net, FluxControlNet)
