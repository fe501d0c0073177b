"""Z-Image's transformer, S3-DiT: image and text are refined apart, then one stream of blocks attends to both.

mindone 0.5.0 does not have it. Parameters have diffusers' names; equal blocks are one cell that takes the weights as
arguments (`nn.blocks`).

Shape legend: B batch, N image tokens and L text tokens (both filled up to a multiple of 32), S = N + L, D width,
H heads, T channels of the time embedding.
"""
from __future__ import annotations

from functools import partial

import mindspore as ms
from mindspore import Parameter, mint, nn, ops
from mindspore.common.initializer import initializer

from ms_diffsynth.nn.blocks import Arranged, Kind, by_head, held
from ms_diffsynth.ops import network
from ms_diffsynth.ops.sinusoid import get_timestep_embedding
from ms_diffsynth.pipelines.shared.quiet import quiet_imports

with quiet_imports():
    from mindone.diffusers.models.normalization import RMSNorm

SINUSOIDS, TIME_WIDTH, TIME_INNER = 256, 256, 1024  # fixed, whatever the width of the network is
HEAD_EPS, FINAL_EPS = 1e-5, 1e-6  # of the norms of queries and keys; of the last norm
PATCHES = "2-1"  # what diffusers calls layers for patches of 2 x 2 latent pixels of one frame
LAYERS = ("attention.to_q", "attention.to_k", "attention.to_v", "attention.to_out.0", "feed_forward.w1",
          "feed_forward.w2", "feed_forward.w3", "attention.norm_q", "attention.norm_k", "attention_norm1",
          "attention_norm2", "ffn_norm1", "ffn_norm2")
MODULATED_LAYERS = (*LAYERS, "adaLN_modulation.0")


class Block(nn.Cell):
    """Attention and feed-forward between norms; with ``modulate``, time scales their inputs and gates their outputs.

    The weights are those of LAYERS, or of MODULATED_LAYERS, in that order.
    """

    def __init__(self, heads: int, dtype: ms.Type, _: nn.Cell, layers: list[nn.Cell]):
        super().__init__(auto_prefix=False)
        (self.to_q, self.to_k, self.to_v, self.to_out, self.gate, self.down, self.up, norm_q, _, norm, _, _, _,
         *modulate, self.matrices) = layers
        self.heads, self.head_eps, self.eps = heads, norm_q.eps, norm.eps
        self.attend = network.masked_attention(dtype)
        if modulate:
            self.modulate = modulate[0]

    def attention(self, x, cos, sin, mask, weights, lora):
        """The normalised input [B, S, D] -> [B, S, D]."""
        w_q, w_k, w_v, w_out, _, _, _, w_norm_q, w_norm_k = weights[:9]
        x_q, x_k, x_v = network.shared(x, 3)
        q = network.norm_rotate(by_head(self.to_q(x_q, w_q, lora), self.heads), w_norm_q[0], cos, sin, self.head_eps)
        k = network.norm_rotate(by_head(self.to_k(x_k, w_k, lora), self.heads), w_norm_k[0], cos, sin, self.head_eps)
        return self.to_out(self.attend(q, k, by_head(self.to_v(x_v, w_v, lora), self.heads), mask), w_out, lora)

    def feed_forward(self, x, weights, lora):
        """The same for the feed-forward part."""
        x_gate, x_up = network.shared(x, 2)
        hidden = network.gated_silu(self.gate(x_gate, weights[4], lora), self.up(x_up, weights[6], lora))
        return self.down(hidden, weights[5], lora)


class ModulatedBlock(Block):
    def construct(self, x, emb, cos, sin, mask, weights, lora):
        """x [B, S, D], emb [B, T], cos and sin of `network.positions`, mask of `network.text_mask` -> [B, S, D]."""
        w_before, w_behind, w_before_2, w_behind_2, w_modulate = weights[9:]
        lora = self.matrices(lora)
        scale, gate, scale_2, gate_2 = network.chunks(self.modulate(emb, w_modulate, lora), 4)
        x, y = network.shared(x, 2)
        y = network.rms_norm_modulate(y, w_before[0], scale, self.eps)
        y = network.rms_norm(self.attention(y, cos, sin, mask, weights, lora), w_behind[0], self.eps)
        x, y = network.shared(network.gate_add(x, network.tanh(gate), y), 2)
        y = network.rms_norm_modulate(y, w_before_2[0], scale_2, self.eps)
        y = network.rms_norm(self.feed_forward(y, weights, lora), w_behind_2[0], self.eps)
        return network.gate_add(x, network.tanh(gate_2), y)


class PlainBlock(Block):
    """Of the text, which does not depend on the time."""

    def construct(self, x, cos, sin, mask, weights, lora):
        """As `ModulatedBlock`, without a time embedding."""
        w_before, w_behind, w_before_2, w_behind_2 = weights[9:]
        lora = self.matrices(lora)
        x, y = network.shared(x, 2)
        y = self.attention(network.rms_norm(y, w_before[0], self.eps), cos, sin, mask, weights, lora)
        x, y = network.shared(x + network.rms_norm(y, w_behind[0], self.eps), 2)
        y = self.feed_forward(network.rms_norm(y, w_before_2[0], self.eps), weights, lora)
        return x + network.rms_norm(y, w_behind_2[0], self.eps)


class ZImageBlock(nn.Cell):
    """The weights of a block, by diffusers' names."""

    is_arranged = True

    def __init__(self, width: int, heads: int, eps: float, time_width: int | None):
        super().__init__()
        hidden = int(width / 3 * 8)
        self.attention = held(
            to_q=mint.nn.Linear(width, width, bias=False), to_k=mint.nn.Linear(width, width, bias=False),
            to_v=mint.nn.Linear(width, width, bias=False),
            to_out=held(**{"0": mint.nn.Linear(width, width, bias=False)}),
            norm_q=RMSNorm(width // heads, HEAD_EPS), norm_k=RMSNorm(width // heads, HEAD_EPS))
        self.feed_forward = held(w1=mint.nn.Linear(width, hidden, bias=False),
                                 w2=mint.nn.Linear(hidden, width, bias=False),
                                 w3=mint.nn.Linear(width, hidden, bias=False))
        for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            self.insert_child_to_cell(name, RMSNorm(width, eps))
        if time_width is not None:
            self.adaLN_modulation = held(**{"0": mint.nn.Linear(time_width, 4 * width)})


class ZImageTransformer(Arranged, nn.Cell):
    """What latents become, minus the noise, by patches. The arguments are the settings of diffusers'
    ZImageTransformer2DModel, without its defaults. ``n_kv_heads`` is not read, as there, and ``axes_lens`` only says
    how long diffusers' tables are.

    Raises: TypeError for a network that is of another make.
    """

    def __init__(self, *, in_channels: int, dim: int, n_layers: int, n_refiner_layers: int, n_heads: int,
                 n_kv_heads: int, cap_feat_dim: int, rope_theta: float, axes_dims: tuple[int, ...],
                 axes_lens: tuple[int, ...], norm_eps: float = 1e-5, t_scale: float = 1000.0, qk_norm: bool = True,
                 all_patch_size: tuple[int, ...] = (2,), all_f_patch_size: tuple[int, ...] = (1,),
                 siglip_feat_dim: int | None = None):
        super().__init__()
        fixed = {"all_patch_size": ((2,), tuple(all_patch_size)), "all_f_patch_size": ((1,), tuple(all_f_patch_size)),
                 "qk_norm": (True, qk_norm), "siglip_feat_dim": (None, siglip_feat_dim)}
        wrong = [f"{name}={given}: expected {wanted}" for name, (wanted, given) in fixed.items() if given != wanted]
        if len(axes_dims) != 3 or sum(axes_dims) * n_heads != dim or any(size % 2 for size in axes_dims):
            wrong.append(f"axes_dims={list(axes_dims)}: expected three even numbers that add up to dim / n_heads = "
                         f"{dim} / {n_heads}")
        if wrong:
            raise TypeError("; ".join(wrong))
        self.config = {
            "_class_name": "ZImageTransformer2DModel", "all_patch_size": [2], "all_f_patch_size": [1],
            "in_channels": in_channels, "dim": dim, "n_layers": n_layers, "n_refiner_layers": n_refiner_layers,
            "n_heads": n_heads, "n_kv_heads": n_kv_heads, "norm_eps": norm_eps, "qk_norm": qk_norm,
            "cap_feat_dim": cap_feat_dim, "siglip_feat_dim": None, "rope_theta": rope_theta, "t_scale": t_scale,
            "axes_dims": list(axes_dims), "axes_lens": list(axes_lens)}
        self.heads, self.t_scale, time_width = n_heads, t_scale, min(dim, TIME_WIDTH)
        self.all_x_embedder = held(**{PATCHES: mint.nn.Linear(4 * in_channels, dim)})
        final = held(linear=mint.nn.Linear(dim, 4 * in_channels),
                     adaLN_modulation=held(**{"1": mint.nn.Linear(time_width, dim)}))
        self.all_final_layer = held(**{PATCHES: final})
        self.t_embedder = held(mlp=held(**{"0": mint.nn.Linear(SINUSOIDS, TIME_INNER),
                                           "2": mint.nn.Linear(TIME_INNER, time_width)}))
        self.cap_embedder = held(**{"0": RMSNorm(cap_feat_dim, norm_eps), "1": mint.nn.Linear(cap_feat_dim, dim)})
        self.x_pad_token = Parameter(initializer("zeros", (1, dim), ms.float32), "x_pad_token")
        self.cap_pad_token = Parameter(initializer("zeros", (1, dim), ms.float32), "cap_pad_token")
        self.noise_refiner, self.context_refiner, self.layers = (
            nn.CellList([ZImageBlock(dim, n_heads, norm_eps, width) for _ in range(count)])
            for count, width in ((n_refiner_layers, time_width), (n_refiner_layers, None), (n_layers, time_width)))

    def construct(self, patches, time, prompt_embeds, prompt_mask, keys, cos, sin):
        """The answer, clean minus noisy, by patches.

        Shapes: patches [B, n, 4 C]; time float32 [B], 1 - sigma, float32 up to its sinusoids; prompt_embeds
        [B, L, D']; prompt_mask float32 [B, L], 1 for text; keys float32 [B, L], 1 for what is attended to: the text,
        filled up; cos and sin float32 [B, S, D / H] of `rotary.table` -> [B, n, 4 C].
        """
        image = getattr(self.all_x_embedder, PATCHES)(patches)
        batch, tokens, width = image.shape
        image_tokens = cos.shape[1] - keys.shape[1]
        if image_tokens > tokens:
            rest = ops.broadcast_to(self.x_pad_token.astype(image.dtype), (batch, image_tokens - tokens, width))
            image = network.join(image, rest)
        norm, is_text = getattr(self.cap_embedder, "0"), prompt_mask.expand_dims(2).astype(image.dtype)
        text = getattr(self.cap_embedder, "1")(network.rms_norm(prompt_embeds, norm.weight, norm.eps))
        text = text * is_text + self.cap_pad_token.astype(text.dtype) * (1 - is_text)
        sinusoids = get_timestep_embedding(time.astype(ms.float32) * self.t_scale, SINUSOIDS, True, 0)
        mlp = self.t_embedder.mlp  # kept in float32, see `pipeline.weight_dtype`
        emb = getattr(mlp, "2")(mint.nn.functional.silu(getattr(mlp, "0")(sinusoids))).astype(image.dtype)
        all_image = ops.ones((batch, image_tokens), ms.float32)
        mask = network.text_mask(all_image, image_tokens, self.heads, image.dtype)
        text_mask = network.text_mask(keys, keys.shape[1], self.heads, image.dtype)
        joint_mask = network.text_mask(ops.cat((all_image, keys), 1), cos.shape[1], self.heads, image.dtype)
        (image_cos, text_cos), (image_sin, text_sin) = network.part(cos, image_tokens), network.part(sin, image_tokens)
        cos, image_cos, text_cos = [network.positions(x, batch, self.heads, image.dtype)
                                    for x in (cos, image_cos, text_cos)]
        sin, image_sin, text_sin = [network.positions(x, batch, self.heads, image.dtype)
                                    for x in (sin, image_sin, text_sin)]
        lora = self.lora(image) if self.has_lora else self.no_lora
        cells, cell_of, weights, places = self.noise_cells, self.noise_cell_of, self.noise_weights, self.noise_lora
        for i in range(len(cell_of)):
            image = cells[cell_of[i]]((image, emb, image_cos, image_sin, mask), weights[i], lora[places[i]])
        cells, cell_of, weights, places = self.text_cells, self.text_cell_of, self.text_weights, self.text_lora
        for i in range(len(cell_of)):
            text = cells[cell_of[i]]((text, text_cos, text_sin, text_mask), weights[i], lora[places[i]])
        x = network.join(image, text)
        cells, cell_of, weights, places = self.joint_cells, self.joint_cell_of, self.joint_weights, self.joint_lora
        for i in range(len(cell_of)):
            x = cells[cell_of[i]]((x, emb, cos, sin, joint_mask), weights[i], lora[places[i]])
        image = network.part(x, tokens)[0]
        final = getattr(self.all_final_layer, PATCHES)
        scale = getattr(final.adaLN_modulation, "1")(mint.nn.functional.silu(emb))
        return final.linear(network.layer_norm_modulate(image, scale, ops.zeros_like(scale), FINAL_EPS))

    def kinds(self):
        # a bias, because the weight may be stored in 8 bits
        dtype = getattr(self.all_x_embedder, PATCHES).bias.dtype
        modulated = partial(ModulatedBlock, self.heads, dtype)
        return {"noise": Kind("noise_refiner", MODULATED_LAYERS, modulated),
                "text": Kind("context_refiner", LAYERS, partial(PlainBlock, self.heads, dtype)),
                "joint": Kind("layers", MODULATED_LAYERS, modulated)}
