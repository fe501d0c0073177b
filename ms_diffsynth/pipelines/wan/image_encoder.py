"""CLIP's image encoder up to before its last layer, on mindone's weights: what Wan 2.1 is shown of a first frame.

Shape legend: B images, P patches and a token for all of them, H heads, D width.
"""
from __future__ import annotations

from typing import Any

from mindspore import mint, nn, ops

from ms_diffsynth.models import arguments
from ms_diffsynth.ops import network
from ms_diffsynth.pipelines.shared.quiet import quiet_imports

with quiet_imports():
    from mindone.transformers import CLIPVisionModel
    from transformers import CLIPVisionConfig

ACTIVATIONS = {"gelu": mint.nn.functional.gelu, "quick_gelu": lambda x: x * mint.sigmoid(1.702 * x)}


class ImageEncoder(nn.Cell):
    """Tokens of images, of the last layer but one.

    Shapes: pixels float [B, 3, 224, 224] -> [B, P, D]. Raises: TypeError for an activation that is not known.
    """

    def __init__(self, config: dict[str, Any]):
        super().__init__()
        self.config = CLIPVisionConfig(**arguments(CLIPVisionConfig, config))
        if self.config.hidden_act not in ACTIVATIONS:
            raise TypeError(f"hidden_act={self.config.hidden_act}: expected one of {', '.join(ACTIVATIONS)}")
        self.vision_model = CLIPVisionModel(self.config).vision_model
        self.heads, self.activation = self.config.num_attention_heads, ACTIVATIONS[self.config.hidden_act]

    def construct(self, pixels):
        model = self.vision_model
        embed = model.embeddings
        weight = embed.patch_embedding.weight
        patches = embed.patch_embedding(pixels.astype(weight.dtype))
        batch, width = patches.shape[0], weight.shape[0]
        patches = patches.reshape(batch, width, -1).swapaxes(1, 2)
        whole = ops.broadcast_to(embed.class_embedding.reshape(1, 1, width), (batch, 1, width))
        x = ops.cat((whole.astype(patches.dtype), patches), 1)
        x = model.pre_layrnorm(x + embed.position_embedding.embedding_table.expand_dims(0))
        for k in range(len(model.encoder.layers) - 1):
            layer = model.encoder.layers[k]
            x = x + self.attention(layer.self_attn, layer.layer_norm1(x))
            hidden = layer.mlp.fc1(layer.layer_norm2(x))
            x = x + layer.mlp.fc2(self.activation(hidden))
        return x

    def attention(self, attn, x):
        shape = (x.shape[0], x.shape[1], self.heads, -1)
        q, k, v = attn.q_proj(x).reshape(shape), attn.k_proj(x).reshape(shape), attn.v_proj(x).reshape(shape)
        return attn.out_proj(network.attention(x.dtype)(q, k, v))
