"""SDXL's UNet: residual blocks at three sizes of the latents, and transformers that attend to the prompt at two.

Parameters have diffusers' names (UNet2DConditionModel). The 70 blocks of the transformers are two kinds, each one cell
that takes its weights as arguments (`nn.blocks`).

Shape legend: B batch, C channels, H and W sides of the latents, S = H W tokens, L tokens of the prompt, T channels of
the time embedding.
"""
from __future__ import annotations

from functools import partial

import mindspore as ms
from mindspore import mint, nn, ops

from ms_diffsynth.nn.blocks import Arranged, Kind, by_head, held
from ms_diffsynth.ops import network
from ms_diffsynth.ops.sinusoid import get_timestep_embedding

ATTENTION_EPS = 1e-6  # of the norm before a transformer
LAYERS = ("norm1", "attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "norm2", "attn2.to_q", "attn2.to_k",
          "attn2.to_v", "attn2.to_out.0", "norm3", "ff.net.0.proj", "ff.net.2")
PLAIN, CROSS = ("DownBlock2D", "UpBlock2D"), ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D")
# diffusers' settings at the only value that is computed here
FIXED = {
    "act_fn": "silu", "addition_embed_type": "text_time", "attention_type": "default", "center_input_sample": False,
    "class_embed_type": None, "class_embeddings_concat": False, "conv_in_kernel": 3, "conv_out_kernel": 3,
    "cross_attention_norm": None, "downsample_padding": 1, "dropout": 0.0, "dual_cross_attention": False,
    "encoder_hid_dim": None, "encoder_hid_dim_type": None, "flip_sin_to_cos": True, "freq_shift": 0,
    "mid_block_only_cross_attention": None, "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn",
    "num_attention_heads": None, "num_class_embeds": None, "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": False, "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None, "time_cond_proj_dim": None, "time_embedding_act_fn": None,
    "time_embedding_dim": None, "time_embedding_type": "positional", "timestep_post_act": None,
    "upcast_attention": False, "use_linear_projection": True, "addition_embed_type_num_heads": 64}


class Block(nn.Cell):
    """Attention among the tokens, to the prompt, and a feed-forward, each behind a norm. The weights are of LAYERS."""

    def __init__(self, dtype: ms.Type, block: nn.Cell, layers: list[nn.Cell]):
        super().__init__(auto_prefix=False)
        (self.norm_1, self.q, self.k, self.v, self.out, self.norm_2, self.text_q, self.text_k, self.text_v,
         self.text_out, self.norm_3, self.up, self.down, self.matrices) = layers
        self.heads, self.attend = block.variant, network.attention(dtype)

    def construct(self, x, prompt, weights, lora):
        """x [B, S, C], prompt [B, L, D] -> [B, S, C]."""
        (w_norm_1, w_q, w_k, w_v, w_out, w_norm_2, w_text_q, w_text_k, w_text_v, w_text_out, w_norm_3, w_up,
         w_down) = weights
        lora = self.matrices(lora)
        x, y = network.shared(x, 2)
        y_q, y_k, y_v = network.shared(self.norm_1(y, w_norm_1, lora), 3)
        q, k = by_head(self.q(y_q, w_q, lora), self.heads), by_head(self.k(y_k, w_k, lora), self.heads)
        y = self.attend(q, k, by_head(self.v(y_v, w_v, lora), self.heads))
        x, y = network.shared(x + self.out(y, w_out, lora), 2)
        q = by_head(self.text_q(self.norm_2(y, w_norm_2, lora), w_text_q, lora), self.heads)
        p_k, p_v = network.shared(prompt, 2)
        k, v = self.text_k(p_k, w_text_k, lora), self.text_v(p_v, w_text_v, lora)
        y = self.attend(q, by_head(k, self.heads), by_head(v, self.heads))
        x, y = network.shared(x + self.text_out(y, w_text_out, lora), 2)
        y = network.geglu(self.up(self.norm_3(y, w_norm_3, lora), w_up, lora))
        return x + self.down(y, w_down, lora)


class TransformerBlock(nn.Cell):
    """The weights of a block."""

    is_arranged = True

    def __init__(self, width: int, heads: int, prompt_width: int):
        super().__init__()
        self.variant = heads
        for name, others in (("attn1", width), ("attn2", prompt_width)):
            self.insert_child_to_cell(name, held(
                to_q=mint.nn.Linear(width, width, bias=False), to_k=mint.nn.Linear(others, width, bias=False),
                to_v=mint.nn.Linear(others, width, bias=False), to_out=held(**{"0": mint.nn.Linear(width, width)})))
        self.ff = held(net=held(**{"0": held(proj=mint.nn.Linear(width, 8 * width)),
                                   "2": mint.nn.Linear(4 * width, width)}))
        self.norm1, self.norm2, self.norm3 = (mint.nn.LayerNorm((width,), 1e-5) for _ in range(3))


class Transformer(nn.Cell):
    """What lies around the blocks of a transformer; they are called in between, by the network.

    Args:
        first: place of the first of its blocks among all of the network.
    """

    def __init__(self, width: int, heads: int, prompt_width: int, depth: int, groups: int, first: int):
        super().__init__()
        self.norm = mint.nn.GroupNorm(groups, width, ATTENTION_EPS)
        self.proj_in, self.proj_out = mint.nn.Linear(width, width), mint.nn.Linear(width, width)
        self.transformer_blocks = nn.CellList([TransformerBlock(width, heads, prompt_width) for _ in range(depth)])
        self.first, self.depth = first, depth

    def tokens(self, x):
        """[B, C, H, W] -> [B, S, C]."""
        batch, width, height, breadth = x.shape
        return self.proj_in(self.norm(x).reshape(batch, width, height * breadth).swapaxes(1, 2))

    def image(self, tokens, x):
        """[B, S, C], and what `tokens` was given -> [B, C, H, W]."""
        return self.proj_out(tokens).swapaxes(1, 2).reshape(x.shape) + x


class Resnet(nn.Cell):
    """x [B, C, H, W], emb [B, T] behind its SiLU -> [B, C', H, W]."""

    def __init__(self, width: int, out_width: int, time_width: int, groups: int, eps: float):
        super().__init__()
        self.norm1, self.norm2 = mint.nn.GroupNorm(groups, width, eps), mint.nn.GroupNorm(groups, out_width, eps)
        self.conv1, self.conv2 = convolution(width, out_width), convolution(out_width, out_width)
        self.time_emb_proj = mint.nn.Linear(time_width, out_width)
        self.groups, self.eps, self.is_wider = groups, eps, width != out_width
        if self.is_wider:
            self.conv_shortcut = mint.nn.Conv2d(width, out_width, 1)

    def construct(self, x, emb):
        x, y = network.shared(x, 2)
        y = self.conv1(network.group_norm_silu(y, self.groups, self.norm1.weight, self.norm1.bias, self.eps))
        y = y + self.time_emb_proj(emb).expand_dims(2).expand_dims(3)
        y = self.conv2(network.group_norm_silu(y, self.groups, self.norm2.weight, self.norm2.bias, self.eps))
        if self.is_wider:
            x = self.conv_shortcut(x)
        return x + y


def convolution(width: int, out_width: int, stride: int = 1) -> mint.nn.Conv2d:
    return mint.nn.Conv2d(width, out_width, 3, stride, 1)


def embedding(width: int, time_width: int) -> nn.Cell:
    return held(linear_1=mint.nn.Linear(width, time_width), linear_2=mint.nn.Linear(time_width, time_width))


class SDXLUNet(Arranged, nn.Cell):
    """The noise in latents, or their v. The arguments are the settings of diffusers' UNet2DConditionModel.

    Args:
        attention_head_dim: heads of each level; diffusers has this name for it.
        sample_size: side of the latents in training.

    Attributes:
        repeated: names of the cells that `nn.recompute` recomputes.

    Raises: TypeError for a network of another make.
    """

    def __init__(self, *, sample_size: int, in_channels: int, out_channels: int, block_out_channels: tuple[int, ...],
                 layers_per_block: int, down_block_types: tuple[str, ...], up_block_types: tuple[str, ...],
                 transformer_layers_per_block: tuple[int, ...], attention_head_dim: tuple[int, ...],
                 cross_attention_dim: int, addition_time_embed_dim: int, projection_class_embeddings_input_dim: int,
                 norm_num_groups: int = 32, norm_eps: float = 1e-5):
        super().__init__()
        widths, levels = tuple(block_out_channels), len(block_out_channels)
        up_types = (*reversed(up_block_types),)
        wrong = [f"{name}={found}: expected {levels}, one for each of block_out_channels" for name, found in (
            ("down_block_types", down_block_types), ("up_block_types", up_block_types),
            ("transformer_layers_per_block", transformer_layers_per_block),
            ("attention_head_dim", attention_head_dim)) if len(found) != levels]
        wrong += [f"up_block_types={up_block_types}, down_block_types={down_block_types}: expected blocks of "
                  f"{', '.join((*PLAIN, *CROSS))} with attention at the same levels"
                  for down, up in [*zip(down_block_types, up_types)][:levels] if (down, up) not in (PLAIN, CROSS)][:1]
        if down_block_types and down_block_types[-1] != CROSS[0]:
            wrong.append(f"down_block_types={down_block_types}: expected attention at the last level")
        if wrong:
            raise TypeError("; ".join(wrong))
        self.config = {
            "_class_name": "UNet2DConditionModel", "sample_size": sample_size, "in_channels": in_channels,
            "out_channels": out_channels, "block_out_channels": list(widths), "layers_per_block": layers_per_block,
            "down_block_types": list(down_block_types), "up_block_types": list(up_block_types),
            "transformer_layers_per_block": list(transformer_layers_per_block),
            "attention_head_dim": list(attention_head_dim), "cross_attention_dim": cross_attention_dim,
            "addition_time_embed_dim": addition_time_embed_dim,
            "projection_class_embeddings_input_dim": projection_class_embeddings_input_dim,
            "norm_num_groups": norm_num_groups, "norm_eps": norm_eps, **FIXED}
        self.time_channels, self.size_channels = widths[0], addition_time_embed_dim
        self.groups, self.eps, time_width = norm_num_groups, norm_eps, 4 * widths[0]
        self.conv_in = convolution(in_channels, widths[0])
        self.time_embedding = embedding(widths[0], time_width)
        self.add_embedding = embedding(projection_class_embeddings_input_dim, time_width)
        # of all transformers; not an attribute: a cell would take them for its own
        self.__dict__["blocks"] = blocks = []
        self.repeated: list[str] = []

        def resnet(width: int, out_width: int) -> Resnet:
            return Resnet(width, out_width, time_width, norm_num_groups, norm_eps)

        def transformer(level: int) -> Transformer:
            made = Transformer(widths[level], attention_head_dim[level], cross_attention_dim,
                               transformer_layers_per_block[level], norm_num_groups, len(blocks))
            blocks.extend(made.transformer_blocks)
            return made

        def block(name: str, level: int, resnets: list[Resnet], **others: nn.Cell) -> nn.Cell:
            found = held(resnets=nn.CellList(resnets), **others)
            found.has_attention = name == "mid_block" or down_block_types[level] == CROSS[0]
            self.repeated.append(f"{name}.resnets")
            if found.has_attention:
                count = 1 if name == "mid_block" else len(resnets)
                found.insert_child_to_cell("attentions", nn.CellList([transformer(level) for _ in range(count)]))
                self.repeated += [f"{name}.attentions.{k}.transformer_blocks" for k in range(count)]
            return found

        down, skips = [], [widths[0]]
        for level, width in enumerate(widths):
            is_last, before = level == levels - 1, skips[-1]
            sampler = {} if is_last else {"downsamplers": nn.CellList([held(conv=convolution(width, width, 2))])}
            resnets = [resnet(before if k == 0 else width, width) for k in range(layers_per_block)]
            down.append(block(f"down_blocks.{level}", level, resnets, **sampler))
            skips += [width] * (layers_per_block + (not is_last))
        self.down_blocks, last = nn.CellList(down), widths[-1]
        self.mid_block = block("mid_block", levels - 1, [resnet(last, last), resnet(last, last)])
        up, before = [], last
        for k, level in enumerate(reversed(range(levels))):
            width, resnets = widths[level], []
            sampler = {} if level == 0 else {"upsamplers": nn.CellList([held(conv=convolution(width, width))])}
            for _ in range(layers_per_block + 1):
                resnets.append(resnet(before + skips.pop(), width))
                before = width
            up.append(block(f"up_blocks.{k}", level, resnets, **sampler))
        self.up_blocks = nn.CellList(up)
        self.conv_norm_out = mint.nn.GroupNorm(norm_num_groups, widths[0], norm_eps)
        self.conv_out = convolution(widths[0], out_channels)

    def construct(self, latents, timestep, prompt_embeds, pooled_prompt_embeds, time_ids):
        """latents [B, 4, H, W]; timestep [B] of 0 to 999; prompt_embeds [B, L, D]; pooled_prompt_embeds [B, P];
        time_ids float32 [B, 6], see `units.SizeConditions` -> [B, 4, H, W]."""
        sizes = get_timestep_embedding(time_ids.reshape(-1), self.size_channels, True, 0)
        sizes = sizes.reshape(time_ids.shape[0], -1).astype(latents.dtype)
        time = get_timestep_embedding(timestep, self.time_channels, True, 0).astype(latents.dtype)
        emb = self.embed(self.time_embedding, time)
        emb = emb + self.embed(self.add_embedding, ops.cat((pooled_prompt_embeds, sizes), -1))
        emb = mint.nn.functional.silu(emb)
        lora = self.lora(latents) if self.has_lora else self.no_lora
        x, skip = network.shared(self.conv_in(latents), 2)
        skips = (skip,)
        for i in range(len(self.down_blocks)):
            block = self.down_blocks[i]
            for j in range(len(block.resnets)):
                x = block.resnets[j](x, emb)
                if block.has_attention:
                    x = self.attend(block.attentions[j], x, prompt_embeds, lora)
                x, skip = network.shared(x, 2)
                skips += (skip,)
            if i < len(self.down_blocks) - 1:
                x, skip = network.shared(block.downsamplers[0].conv(x), 2)
                skips += (skip,)
        x = self.mid_block.resnets[0](x, emb)
        x = self.attend(self.mid_block.attentions[0], x, prompt_embeds, lora)
        x = self.mid_block.resnets[1](x, emb)
        for i in range(len(self.up_blocks)):
            block = self.up_blocks[i]
            for j in range(len(block.resnets)):
                x = block.resnets[j](network.join(x, skips[-1]), emb)
                skips = skips[:-1]
                if block.has_attention:
                    x = self.attend(block.attentions[j], x, prompt_embeds, lora)
            if i < len(self.up_blocks) - 1:
                x = mint.nn.functional.interpolate(x, scale_factor=2.0, mode="nearest")
                x = block.upsamplers[0].conv(x)
        norm = self.conv_norm_out
        return self.conv_out(network.group_norm_silu(x, self.groups, norm.weight, norm.bias, self.eps))

    def embed(self, layers, x):
        return layers.linear_2(mint.nn.functional.silu(layers.linear_1(x)))

    def attend(self, transformer, x, prompt_embeds, lora):
        """[B, C, H, W] through a transformer."""
        x, y = network.shared(x, 2)
        y = transformer.tokens(y)
        cells, cell_of, weights, places = self.block_cells, self.block_cell_of, self.block_weights, self.block_lora
        for k in range(transformer.first, transformer.first + transformer.depth):
            y = cells[cell_of[k]]((y, prompt_embeds), weights[k], lora[places[k]])
        return transformer.image(y, x)

    def kinds(self):
        # a bias, because the weight may be stored in 8 bits
        return {"block": Kind("blocks", LAYERS, partial(Block, self.conv_in.bias.dtype))}
