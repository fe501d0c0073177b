"""Stable Diffusion 3's transformer: mindone's modules and weights, computed by blocks of our own.

Equal blocks are one cell that takes the weights as arguments (`nn.blocks`). mindone's own network computes the table of
positions in float64 on the device although a checkpoint holds it, and takes it for a weight; with a LoRA on queries,
keys and values MindSpore 2.10 cannot compile it for an Ascend ("Invalid datatype:26").

Shape legend: B batch, L text tokens, N image tokens, D width, p patch size, S side of the table of positions.
"""
from __future__ import annotations

from functools import partial

import mindspore as ms
from mindspore import Parameter, mint, nn
from mindspore.common.initializer import initializer

from ms_diffsynth.nn.blocks import Arranged, Kind, by_head
from ms_diffsynth.ops import network
from ms_diffsynth.pipelines.shared.quiet import quiet_imports

with quiet_imports():
    from mindone.diffusers.models.attention import JointTransformerBlock
    from mindone.diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings
    from mindone.diffusers.models.normalization import AdaLayerNormContinuous

EPS = 1e-6  # of the norms without weights
# what a block calls its layers -> where they are
LAYERS = {
    "modulate": "norm1.linear", "to_q": "attn.to_q", "to_k": "attn.to_k", "to_v": "attn.to_v",
    "to_out": "attn.to_out.0", "up": "ff.net.0.proj", "down": "ff.net.2", "text_modulate": "norm1_context.linear",
    "text_q": "attn.add_q_proj", "text_k": "attn.add_k_proj", "text_v": "attn.add_v_proj"}
TEXT_LAYERS = {"text_out": "attn.to_add_out", "text_up": "ff_context.net.0.proj", "text_down": "ff_context.net.2"}
DUAL_LAYERS = {"own_q": "attn2.to_q", "own_k": "attn2.to_k", "own_v": "attn2.to_v", "own_out": "attn2.to_out.0"}
NORMS = {"norm_q": "attn.norm_q", "norm_k": "attn.norm_k", "text_norm_q": "attn.norm_added_q",
         "text_norm_k": "attn.norm_added_k"}
DUAL_NORMS = {"own_norm_q": "attn2.norm_q", "own_norm_k": "attn2.norm_k"}


class Layer(nn.Cell):
    """A layer of a block with the place of its weights among those of the block."""

    def __init__(self, function: nn.Cell, place: int):
        super().__init__(auto_prefix=False)
        self.function, self.place = function, place

    def construct(self, x, weights, lora):
        return self.function(x, weights[self.place], lora)


class Same(nn.Cell):
    """In the place of a norm that the network does not have."""

    def construct(self, x, weights, lora):
        return x


class Block(nn.Cell):
    """Image and text as two streams that attend to each other.

    A block that is ``dual`` has a second attention, of the image alone; of the ``last`` nothing reads what becomes of
    the text, and neither it nor its queries are computed.
    """

    def __init__(self, layers: dict[str, str], heads: int, dtype: ms.Type, _: nn.Cell, functions: list[nn.Cell]):
        super().__init__(auto_prefix=False)
        *functions, self.matrices = functions
        for name in (*NORMS, *DUAL_NORMS):
            setattr(self, name, Same())
        for place, (name, function) in enumerate(zip(layers, functions)):
            setattr(self, name, Layer(function, place))
        self.heads, self.attend = heads, network.attention(dtype)
        self.is_dual, self.is_last = "own_q" in layers, "text_out" not in layers

    def construct(self, image, text, emb, weights, lora):
        """image [B, N, D], text [B, L, D], emb [B, D] -> image, text; of the last block the image only."""
        lora = self.matrices(lora)
        shift, scale, gate, shift_2, scale_2, gate_2, own = self.changes(self.modulate(emb, weights, lora))
        image, x = network.shared(image, 2)
        if self.is_dual:
            x, z = network.shared(x, 2)
        x_q, x_k, x_v = network.shared(network.layer_norm_modulate(x, scale, shift, EPS), 3)
        q = self.norm_q(by_head(self.to_q(x_q, weights, lora), self.heads), weights, lora)
        k = self.norm_k(by_head(self.to_k(x_k, weights, lora), self.heads), weights, lora)
        v = by_head(self.to_v(x_v, weights, lora), self.heads)
        text_changes = self.text_modulate(emb, weights, lora)
        if self.is_last:
            text_scale, text_shift = network.chunks(text_changes, 2)
            y_k, y_v = network.shared(network.layer_norm_modulate(text, text_scale, text_shift, EPS), 2)
        else:
            text_shift, text_scale, text_gate, text_shift_2, text_scale_2, text_gate_2 = network.chunks(text_changes, 6)
            text, y = network.shared(text, 2)
            y_q, y_k, y_v = network.shared(network.layer_norm_modulate(y, text_scale, text_shift, EPS), 3)
            text_q = by_head(self.text_q(y_q, weights, lora), self.heads)
            q = network.join(q, self.text_norm_q(text_q, weights, lora))
        text_k = by_head(self.text_k(y_k, weights, lora), self.heads)
        k = network.join(k, self.text_norm_k(text_k, weights, lora))
        v = network.join(v, by_head(self.text_v(y_v, weights, lora), self.heads))
        x = self.attend(q, k, v)
        if not self.is_last:
            x, y = network.part(x, image.shape[1])
        image = network.gate_add(image, gate, self.to_out(x, weights, lora))
        if self.is_dual:
            own_shift, own_scale, own_gate = own
            z = self.attend_itself(network.layer_norm_modulate(z, own_scale, own_shift, EPS), weights, lora)
            image = network.gate_add(image, own_gate, z)
        image, x = network.shared(image, 2)
        x = self.up(network.layer_norm_modulate(x, scale_2, shift_2, EPS), weights, lora)
        image = network.gate_add(image, gate_2, self.down(network.gelu_tanh(x), weights, lora))
        if self.is_last:
            return image
        text, y = network.shared(network.gate_add(text, text_gate, self.text_out(y, weights, lora)), 2)
        y = self.text_up(network.layer_norm_modulate(y, text_scale_2, text_shift_2, EPS), weights, lora)
        return image, network.gate_add(text, text_gate_2, self.text_down(network.gelu_tanh(y), weights, lora))

    def changes(self, x):
        """Shift, scale and gate before attention and before the feed-forward; those of the second attention."""
        if self.is_dual:
            parts = network.chunks(x, 9)
            return (*parts[:6], parts[6:])
        return (*network.chunks(x, 6), ())

    def attend_itself(self, x, weights, lora):
        """The second attention: [B, N, D] -> the same."""
        x_q, x_k, x_v = network.shared(x, 3)
        q = self.own_norm_q(by_head(self.own_q(x_q, weights, lora), self.heads), weights, lora)
        k = self.own_norm_k(by_head(self.own_k(x_k, weights, lora), self.heads), weights, lora)
        return self.own_out(self.attend(q, k, by_head(self.own_v(x_v, weights, lora), self.heads)), weights, lora)


class SD3Block(JointTransformerBlock):
    """The weights of a block."""

    is_arranged = True


class PatchEmbed(nn.Cell):
    """Patches of latents as tokens, with the middle of a table of S x S positions added.

    Shapes: [B, C, H, W] -> [B, N, D]; H and W are at most p S.
    """

    buffer_names = ("pos_embed",)

    def __init__(self, patch_size: int, in_channels: int, width: int, side: int):
        super().__init__()
        self.patch_size, self.side = patch_size, side
        self.proj = mint.nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)
        self.pos_embed = Parameter(initializer("zeros", (1, side * side, width), ms.float32), "pos_embed", False)

    def construct(self, latents):
        patches = self.proj(latents)
        batch, width, rows, columns = patches.shape
        top, left = (self.side - rows) // 2, (self.side - columns) // 2
        table = self.pos_embed.reshape(1, self.side, self.side, width)
        # not by slices: StridedSlice is a kernel of the old aclop path on an Ascend
        table = mint.narrow(mint.narrow(table, 1, top, rows), 2, left, columns)
        tokens = patches.reshape(batch, width, rows * columns).swapaxes(1, 2)
        return (tokens + table.reshape(1, rows * columns, width)).astype(tokens.dtype)


class SD3Transformer(Arranged, nn.Cell):
    """Velocity of latents. The arguments are the settings of diffusers' SD3Transformer2DModel, without its defaults.

    Args:
        sample_size: side of the latents in training; the table of positions in the checkpoint is made for it.
        dual_attention_layers: the first blocks, where they have a second attention (SD3.5-medium).
        qk_norm: ``rms_norm`` of queries and keys (SD3.5), or None.

    Raises: TypeError for a network that is of another make.
    """

    def __init__(self, *, sample_size: int, patch_size: int, in_channels: int, num_layers: int, attention_head_dim: int,
                 num_attention_heads: int, joint_attention_dim: int, caption_projection_dim: int,
                 pooled_projection_dim: int, out_channels: int, pos_embed_max_size: int,
                 dual_attention_layers: tuple[int, ...] = (), qk_norm: str | None = None):
        super().__init__()
        duals, width = len(dual_attention_layers), attention_head_dim * num_attention_heads
        if tuple(dual_attention_layers) != tuple(range(duals)) or duals >= num_layers:
            raise TypeError(f"dual_attention_layers={dual_attention_layers}: expected the first blocks, and not the "
                            f"last of {num_layers}")
        if qk_norm not in (None, "rms_norm"):
            raise TypeError(f"qk_norm={qk_norm!r}: expected rms_norm or null")
        self.config = {
            "_class_name": "SD3Transformer2DModel", "sample_size": sample_size, "patch_size": patch_size,
            "in_channels": in_channels, "num_layers": num_layers, "attention_head_dim": attention_head_dim,
            "num_attention_heads": num_attention_heads, "joint_attention_dim": joint_attention_dim,
            "caption_projection_dim": caption_projection_dim, "pooled_projection_dim": pooled_projection_dim,
            "out_channels": out_channels, "pos_embed_max_size": pos_embed_max_size,
            "dual_attention_layers": dual_attention_layers, "qk_norm": qk_norm}
        self.out_channels, self.patch_size, self.heads = out_channels, patch_size, num_attention_heads
        self.pos_embed = PatchEmbed(patch_size, in_channels, width, pos_embed_max_size)
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(width, pooled_projection_dim)
        self.context_embedder = mint.nn.Linear(joint_attention_dim, caption_projection_dim)
        self.transformer_blocks = nn.CellList([
            SD3Block(width, num_attention_heads, attention_head_dim, context_pre_only=k == num_layers - 1,
                     qk_norm=qk_norm, use_dual_attention=k < duals) for k in range(num_layers)])
        self.norm_out = AdaLayerNormContinuous(width, width, elementwise_affine=False, eps=1e-6)
        self.proj_out = mint.nn.Linear(width, patch_size * patch_size * out_channels)
        blocks = list(self.transformer_blocks)
        # not attributes: a cell would take them for its own
        self.__dict__ |= {"dual_blocks": blocks[:duals], "joint_blocks": blocks[duals:-1], "last_blocks": blocks[-1:]}

    def construct(self, latents, prompt_embeds, pooled_prompt_embeds, timestep):
        """latents [B, C, H, W], prompt_embeds [B, L, D'], pooled_prompt_embeds [B, P], timestep float32 [B] (1000
        sigma), float32 up to its sinusoids -> velocity [B, C, H, W]."""
        batch, _, height, width = latents.shape
        image, text = self.pos_embed(latents), self.context_embedder(prompt_embeds)
        emb = mint.nn.functional.silu(self.time_text_embed(timestep, pooled_prompt_embeds))
        lora = self.lora(image) if self.has_lora else self.no_lora
        cells, cell_of, weights, places = self.dual_cells, self.dual_cell_of, self.dual_weights, self.dual_lora
        for i in range(len(cell_of)):
            image, text = cells[cell_of[i]]((image, text, emb), weights[i], lora[places[i]])
        cells, cell_of, weights, places = self.joint_cells, self.joint_cell_of, self.joint_weights, self.joint_lora
        for i in range(len(cell_of)):
            image, text = cells[cell_of[i]]((image, text, emb), weights[i], lora[places[i]])
        image = self.last_cells[0]((image, text, emb), self.last_weights[0], lora[self.last_lora[0]])
        scale, shift = network.chunks(self.norm_out.linear(emb), 2)
        patches = self.proj_out(network.layer_norm_modulate(image, scale, shift, EPS))  # [B, N, p p C]
        p = self.patch_size
        patches = patches.reshape(batch, height // p, width // p, p, p, self.out_channels)
        return patches.permute(0, 5, 1, 3, 2, 4).reshape(batch, self.out_channels, height, width)

    def kinds(self):
        norms, own_norms = (NORMS, DUAL_NORMS) if self.config["qk_norm"] else ({}, {})
        return {"dual": self._kind("dual_blocks", LAYERS | TEXT_LAYERS | norms | DUAL_LAYERS | own_norms),
                "joint": self._kind("joint_blocks", LAYERS | TEXT_LAYERS | norms),
                "last": self._kind("last_blocks", LAYERS | norms)}

    def _kind(self, list_name, layers):
        # a bias, because the weight may be stored in 8 bits
        return Kind(list_name, tuple(layers.values()),
                    partial(Block, layers, self.heads, self.context_embedder.bias.dtype))
