"""FLUX.2-dev's text encoder: the lower three quarters of Mistral, on mindone's layers. klein's is `shared.qwen3`.

mindone's own ``construct`` is made for generation and does not compile. What is above takes no part and is not loaded:
a quarter of the memory.

Shape legend: B batch, T tokens, W channels.
"""
from __future__ import annotations

from typing import Any

from mindspore import Tensor, nn

from ms_diffsynth.models import arguments
from ms_diffsynth.pipelines.shared.language_model import LowerLayers, TakesTokens, attend, heads
from ms_diffsynth.pipelines.shared.quiet import quiet_imports

with quiet_imports():
    from mindone.transformers.models.mistral import modeling_mistral as mistral
    from transformers import MistralConfig


class MistralLayer(mistral.MistralDecoderLayer):
    """One layer of dev's language model."""

    def construct(self, x, table, looks, sees):
        """As `shared.qwen3.Qwen3Layer`."""
        attn, y = self.self_attn, self.input_layernorm(x)
        q, k = heads(attn.q_proj(y), attn.head_dim), heads(attn.k_proj(y), attn.head_dim)
        x = x + sees * attend(attn, q, k, heads(attn.v_proj(y), attn.head_dim), table, looks)
        return x + self.mlp(self.post_attention_layernorm(x))


class MistralLayers(LowerLayers, mistral.MistralModel):
    layer_class = MistralLayer


class MistralTextEncoder(TakesTokens, nn.Cell):
    """dev's: hidden states of a prompt after 10, 20 and 30 of 40 layers, joined; without the tower for images.

    Parameters are named as in FLUX.2-dev's files, ``language_model.model.layers``.

    Shapes: as `shared.qwen3.Qwen3TextEncoder`.
    Source: diffusers 0.36, Flux2Pipeline.
    """

    path = ("language_model", "model")

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = config
        *outer, inner = self.path
        text = MistralConfig(**arguments(MistralConfig, config["text_config"]))
        place = self
        for name in outer:
            setattr(place, name, nn.Cell())
            place = getattr(place, name)
        setattr(place, inner, MistralLayers._from_config(text))

    def construct(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.language_model.model(ids, mask)


class RenamedMistralTextEncoder(MistralTextEncoder):
    """The same for files with the names inside transformers since 4.52: ``model.language_model.layers``."""

    path = ("model", "language_model")

    def construct(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model.language_model(ids, mask)


class ComfyMistralTextEncoder(MistralTextEncoder):
    """The same for ComfyUI's file, mistral_3_small_flux2_bf16.safetensors: ``model.layers``."""

    path = ("model",)

    def construct(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.model(ids, mask)
