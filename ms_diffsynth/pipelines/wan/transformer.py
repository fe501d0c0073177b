"""Wan's transformer: frames attend to each other and to the text, modulated by the time of their frame.

Parameters have diffusers' names; equal blocks are one cell that takes the weights as arguments (`nn.blocks`). Frames
may have times of their own (a first frame that is given is at time 0). Tokens lie frame by frame, so modulation is
that of a batch of frames, and no tensor has a modulation for each token: diffusers' has six numbers for every number of
the tokens. A time for all frames is the same with one frame.

Shape legend: B batch, F times of a sample (its frames, or 1), S tokens, L text tokens, I image tokens, D width,
H heads.
"""
from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import mindspore as ms
from mindspore import Parameter, mint, nn, ops
from mindspore.common.initializer import initializer

from ms_diffsynth.nn.blocks import Arranged, Kind, by_head, held
from ms_diffsynth.ops import network
from ms_diffsynth.ops.sinusoid import get_timestep_embedding
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.pipelines.wan.rotary import table

with quiet_imports():
    from mindone.diffusers.models.normalization import RMSNorm

PATCH = (1, 2, 2)  # latent frames, rows and columns of a token
EMBEDDER_EPS = 1e-5  # of the norms of image tokens
SELF, CROSS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn1.norm_q", "attn1.norm_k"), (
    "attn2.to_q", "attn2.to_k", "attn2.to_v", "attn2.to_out.0", "attn2.norm_q", "attn2.norm_k")
LAYERS = (*SELF, *CROSS, "ffn.net.0.proj", "ffn.net.2", "norm2", "scale_shift_table")
IMAGE_LAYERS = (*LAYERS, "attn2.add_k_proj", "attn2.add_v_proj", "attn2.norm_added_k")


class Block(nn.Cell):
    """Attention among frames, attention to the text, and feed-forward; the weights are those of LAYERS, in that order.
    """

    def __init__(self, heads: int, dtype: ms.Type, block: nn.Cell, layers: list[nn.Cell]):
        super().__init__(auto_prefix=False)
        (self.to_q, self.to_k, self.to_v, self.to_out, norm, _, self.cross_q, self.cross_k, self.cross_v,
         self.cross_out, _, _, self.up, self.down, self.norm, _, *image, self.matrices) = layers
        self.heads, self.eps, self.attend = heads, norm.eps, network.attention(dtype)
        if image:
            self.image_k, self.image_v, _ = image

    def construct(self, x, text, emb, cos, sin, weights, lora):
        """x [B, S, D], text [B, L, D], emb [B F, 6 D], cos and sin of `network.positions` -> [B, S, D]."""
        lora, w_norm = self.matrices(lora), weights[14]
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(x, emb, weights)
        x = self.attend_to_frames(x, shift, scale, gate, cos, sin, weights, lora)
        x, y = network.shared(x, 2)
        x = x + self.cross_out(self.attend_to_text(self.norm(y, w_norm, lora), text, weights, lora), weights[9], lora)
        return self.feed_forward(x, shift_2, scale_2, gate_2, weights, lora)

    def modulation(self, x, emb, weights):
        """Shift, scale and gate of attention and of feed-forward, [B F, D] each; added up in float32."""
        added = emb.astype(ms.float32) + weights[15][0].astype(ms.float32).reshape(1, -1)
        return network.chunks(added.astype(x.dtype), 6)

    def attend_to_frames(self, x, shift, scale, gate, cos, sin, weights, lora):
        w_q, w_k, w_v, w_out, w_norm_q, w_norm_k = weights[:6]
        shape, by_frame = x.shape, (shift.shape[0], -1, x.shape[2])
        x, y = network.shared(x.reshape(by_frame), 2)
        y_q, y_k, y_v = network.shared(network.layer_norm_modulate(y, scale, shift, self.eps).reshape(shape), 3)
        q, k = (network.rms_norm(self.to_q(y_q, w_q, lora), w_norm_q[0], self.eps),
                network.rms_norm(self.to_k(y_k, w_k, lora), w_norm_k[0], self.eps))
        q, k = (network.rotate(by_head(q, self.heads), cos, sin), network.rotate(by_head(k, self.heads), cos, sin))
        y = self.to_out(self.attend(q, k, by_head(self.to_v(y_v, w_v, lora), self.heads)), w_out, lora)
        return network.gate_add(x, gate, y.reshape(by_frame)).reshape(shape)

    def attend_to_text(self, x, text, weights, lora):
        w_q, w_k, w_v, _, w_norm_q, w_norm_k = weights[6:12]
        return self.attend(self.query(x, w_q, w_norm_q, lora), *self.keys(
            self.cross_k(text, w_k, lora), self.cross_v(text, w_v, lora), w_norm_k))

    def query(self, x, weight, w_norm, lora):
        return by_head(network.rms_norm(self.cross_q(x, weight, lora), w_norm[0], self.eps), self.heads)

    def keys(self, k, v, w_norm):
        return by_head(network.rms_norm(k, w_norm[0], self.eps), self.heads), by_head(v, self.heads)

    def feed_forward(self, x, shift, scale, gate, weights, lora):
        shape, by_frame = x.shape, (shift.shape[0], -1, x.shape[2])
        x, y = network.shared(x.reshape(by_frame), 2)
        y = network.layer_norm_modulate(y, scale, shift, self.eps).reshape(shape)
        y = self.down(network.gelu_tanh(self.up(y, weights[12], lora)), weights[13], lora)
        return network.gate_add(x, gate, y.reshape(by_frame)).reshape(shape)


class ImageBlock(Block):
    """The same with attention to tokens of an image besides, added to that to the text; the weights are IMAGE_LAYERS'.
    """

    def construct(self, x, text, image, emb, cos, sin, weights, lora):
        """image [B, I, D]; the others as in `Block`."""
        lora, w_norm = self.matrices(lora), weights[14]
        shift, scale, gate, shift_2, scale_2, gate_2 = self.modulation(x, emb, weights)
        x = self.attend_to_frames(x, shift, scale, gate, cos, sin, weights, lora)
        x, y = network.shared(x, 2)
        w_q, w_k, w_v, w_out, w_norm_q, w_norm_k = weights[6:12]
        w_image_k, w_image_v, w_image_norm = weights[16:]
        q, q_image = network.shared(self.query(self.norm(y, w_norm, lora), w_q, w_norm_q, lora), 2)
        y = self.attend(q, *self.keys(self.cross_k(text, w_k, lora), self.cross_v(text, w_v, lora), w_norm_k))
        y = y + self.attend(q_image, *self.keys(self.image_k(image, w_image_k, lora),
                                                self.image_v(image, w_image_v, lora), w_image_norm))
        x = x + self.cross_out(y, w_out, lora)
        return self.feed_forward(x, shift_2, scale_2, gate_2, weights, lora)


def _attention(width: int, eps: float, image_width: int | None = None) -> nn.Cell:
    cells = {name: mint.nn.Linear(width, width) for name in ("to_q", "to_k", "to_v")}
    cells |= {"to_out": held(**{"0": mint.nn.Linear(width, width)}), "norm_q": RMSNorm(width, eps),
              "norm_k": RMSNorm(width, eps)}
    if image_width is not None:
        cells |= {"add_k_proj": mint.nn.Linear(image_width, width), "add_v_proj": mint.nn.Linear(image_width, width),
                  "norm_added_k": RMSNorm(width, eps)}
    return held(**cells)


class WanBlock(nn.Cell):
    """The weights of a block, by diffusers' names."""

    is_arranged = True

    def __init__(self, width: int, hidden: int, eps: float, image_width: int | None):
        super().__init__()
        self.attn1, self.attn2 = _attention(width, eps), _attention(width, eps, image_width)
        self.norm2 = mint.nn.LayerNorm((width,), eps)
        self.ffn = held(net=held(**{"0": held(proj=mint.nn.Linear(width, hidden)), "2": mint.nn.Linear(hidden, width)}))
        self.scale_shift_table = Parameter(initializer("zeros", (1, 6, width), ms.float32), "scale_shift_table")


class PatchEmbedding(nn.Cell):
    """A convolution whose windows do not overlap, as a product: patches [B, S, C 4] -> [B, S, D]."""

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.weight = Parameter(initializer("zeros", (width, channels, *PATCH), ms.float32), "weight")
        self.bias = Parameter(initializer("zeros", (width,), ms.float32), "bias")

    def construct(self, x):
        return network.linear(x, self.weight.reshape(self.weight.shape[0], -1), self.bias)


class ImageEmbedder(nn.Cell):
    """Tokens of an image, or of several one after the other, at the network's width: [B, I, D'] -> [B, I, D]."""

    def __init__(self, image_width: int, width: int, tokens: int | None):
        super().__init__()
        self.norm1, self.norm2 = (mint.nn.LayerNorm((size,), EMBEDDER_EPS) for size in (image_width, width))
        self.ff = held(net=held(**{"0": held(proj=mint.nn.Linear(image_width, image_width)),
                                   "2": mint.nn.Linear(image_width, width)}))
        self.pos_embed = None
        if tokens is not None:
            self.pos_embed = Parameter(initializer("zeros", (1, tokens, image_width), ms.float32), "pos_embed")

    def construct(self, x):
        if self.pos_embed is not None:
            x = x + self.pos_embed.astype(x.dtype)
        net = self.ff.net
        x = network.layer_norm(x, self.norm1.weight, self.norm1.bias, EMBEDDER_EPS)
        x = getattr(net, "2")(mint.nn.functional.gelu(getattr(net, "0").proj(x)))
        return network.layer_norm(x, self.norm2.weight, self.norm2.bias, EMBEDDER_EPS)


class WanTransformer(Arranged, nn.Cell):
    """Velocity of latents by patches. The arguments are the settings of diffusers' WanTransformer3DModel.

    Raises: TypeError for a network that is of another make.
    """

    def __init__(self, *, num_attention_heads: int, attention_head_dim: int, in_channels: int, out_channels: int,
                 text_dim: int, freq_dim: int, ffn_dim: int, num_layers: int, patch_size: tuple[int, ...] = PATCH,
                 cross_attn_norm: bool = True, qk_norm: str = "rms_norm_across_heads", eps: float = 1e-6,
                 image_dim: int | None = None, added_kv_proj_dim: int | None = None, rope_max_seq_len: int = 1024,
                 pos_embed_seq_len: int | None = None):
        super().__init__()
        width = num_attention_heads * attention_head_dim
        fixed = {"patch_size": (PATCH, tuple(patch_size)), "cross_attn_norm": (True, cross_attn_norm),
                 "qk_norm": ("rms_norm_across_heads", qk_norm),
                 "added_kv_proj_dim": (None if image_dim is None else width, added_kv_proj_dim)}
        wrong = [f"{name}={given}: expected {wanted}" for name, (wanted, given) in fixed.items() if given != wanted]
        if attention_head_dim % 2:
            wrong.append(f"attention_head_dim={attention_head_dim}: expected an even number")
        if wrong:
            raise TypeError("; ".join(wrong))
        self.config: dict[str, Any] = {
            "_class_name": "WanTransformer3DModel", "patch_size": list(PATCH),
            "num_attention_heads": num_attention_heads, "attention_head_dim": attention_head_dim,
            "in_channels": in_channels, "out_channels": out_channels, "text_dim": text_dim, "freq_dim": freq_dim,
            "ffn_dim": ffn_dim, "num_layers": num_layers, "cross_attn_norm": True, "qk_norm": qk_norm, "eps": eps,
            "image_dim": image_dim, "added_kv_proj_dim": added_kv_proj_dim, "rope_max_seq_len": rope_max_seq_len,
            "pos_embed_seq_len": pos_embed_seq_len}
        self.heads, self.head_dim, self.sinusoids, self.eps = num_attention_heads, attention_head_dim, freq_dim, eps
        self.has_image = image_dim is not None
        self.patch_embedding = PatchEmbedding(in_channels, width)
        embedders = {
            "time_embedder": held(linear_1=mint.nn.Linear(freq_dim, width), linear_2=mint.nn.Linear(width, width)),
            "time_proj": mint.nn.Linear(width, 6 * width),
            "text_embedder": held(linear_1=mint.nn.Linear(text_dim, width), linear_2=mint.nn.Linear(width, width))}
        if self.has_image:
            embedders["image_embedder"] = ImageEmbedder(image_dim, width, pos_embed_seq_len)
        self.condition_embedder = held(**embedders)
        self.blocks = nn.CellList([WanBlock(width, ffn_dim, eps, added_kv_proj_dim) for _ in range(num_layers)])
        self.proj_out = mint.nn.Linear(width, out_channels * prod(PATCH))
        self.scale_shift_table = Parameter(initializer("zeros", (1, 2, width), ms.float32), "scale_shift_table")

    def construct(self, patches, time, prompt_embeds, sides, image_embeds=None):
        """The velocity by patches.

        Shapes: patches [B, S, 4 C]; time float32 [B, F], 1000 sigma of each frame, or of all (F = 1); prompt_embeds
        [B, L, D'], all of which is attended to; sides: frames, rows and columns in tokens; image_embeds [B, I, D''],
        for a network that takes them -> [B, S, 4 C'].
        """
        x, embed = self.patch_embedding(patches), self.condition_embedder
        text = embed.text_embedder.linear_2(network.gelu_tanh(embed.text_embedder.linear_1(prompt_embeds)))
        time = get_timestep_embedding(time.astype(ms.float32).reshape(-1), self.sinusoids, True, 0)
        emb = embed.time_embedder.linear_1(time)  # in float32, see `pipeline.weight_dtype`
        emb = embed.time_embedder.linear_2(mint.nn.functional.silu(emb)).astype(x.dtype)
        modulation = embed.time_proj(mint.nn.functional.silu(emb))
        cos, sin = table(*sides, self.head_dim)
        cos = network.positions(cos, x.shape[0], self.heads, x.dtype)
        sin = network.positions(sin, x.shape[0], self.heads, x.dtype)
        lora = self.lora(x) if self.has_lora else self.no_lora
        cells, cell_of, weights, places = self.block_cells, self.block_cell_of, self.block_weights, self.block_lora
        if self.has_image:
            image = embed.image_embedder(image_embeds)
            for i in range(len(cell_of)):
                x = cells[cell_of[i]]((x, text, image, modulation, cos, sin), weights[i], lora[places[i]])
        else:
            for i in range(len(cell_of)):
                x = cells[cell_of[i]]((x, text, modulation, cos, sin), weights[i], lora[places[i]])
        added = ops.cat((emb, emb), 1).astype(ms.float32) + self.scale_shift_table.reshape(1, -1)
        shift, scale = network.chunks(added.astype(x.dtype), 2)
        by_frame = x.reshape(shift.shape[0], -1, x.shape[2])
        return self.proj_out(network.layer_norm_modulate(by_frame, scale, shift, self.eps).reshape(x.shape))

    def kinds(self):
        # a bias, because the weight may be stored in 8 bits
        build = partial(ImageBlock if self.has_image else Block, self.heads, self.proj_out.bias.dtype)
        return {"block": Kind("blocks", IMAGE_LAYERS if self.has_image else LAYERS, build)}
