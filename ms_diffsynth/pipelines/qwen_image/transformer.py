"""Qwen-Image's transformer: mindone's modules and weights, computed by blocks of our own.

As in `pipelines.flux.transformer`, an object is given a subclass of its own class: parameters, their names and their
places stay. What changes: equal blocks are one cell that takes the weights as arguments (`nn.blocks`); rotary positions
are real (`rotary`; mindone's are complex inside ``ms._no_grad()``, which lets no gradient through); text may be padded;
sigma stays float32 up to its sinusoids (mindone casts it to the compute dtype, where bfloat16 keeps 8 bits of it);
SiLU(temb) is computed once.

References (Qwen-Image-Edit) are further image tokens, whose velocity nobody reads. Where config.json says
``zero_cond_t`` (-2511) they are modulated as clean images are, at sigma 0, and only the image at its own sigma; the
text and the end of the network go by the image's. mindone 0.5.0 does not have this.

Shape legend: B batch, L text tokens, N image tokens, M tokens of references, S = L + N + M, D width, H heads.
"""
from __future__ import annotations

from functools import partial

import mindspore as ms
from mindspore import mint, nn, ops

from ms_diffsynth.models import arguments
from ms_diffsynth.nn.blocks import Arranged, Kind, by_head
from ms_diffsynth.ops import network
from ms_diffsynth.pipelines.qwen_image.pipeline import LATER_SETTINGS
from ms_diffsynth.pipelines.shared import control
from ms_diffsynth.pipelines.shared.quiet import quiet_imports
from ms_diffsynth.pipelines.shared.rotary import check_axes

with quiet_imports():
    from mindone.diffusers.models.transformers import transformer_qwenimage as mindone

EPS = 1e-6  # of the norms without weights, in mindone as in diffusers
NAMES = ("img_mod.1", "txt_mod.1", "attn.to_q", "attn.to_k", "attn.to_v", "attn.add_q_proj", "attn.add_k_proj",
         "attn.add_v_proj", "attn.to_out.0", "attn.to_add_out", "img_mlp.net.0.proj", "img_mlp.net.2",
         "txt_mlp.net.0.proj", "txt_mlp.net.2", "attn.norm_q", "attn.norm_k", "attn.norm_added_q", "attn.norm_added_k")


class Block(nn.Cell):
    """Image and text as two streams that attend to each other; the weights are those of NAMES, in that order."""

    def __init__(self, layers: list[nn.Cell], heads: int, dtype: ms.Type, is_last: bool):
        super().__init__(auto_prefix=False)
        (self.modulate, self.text_modulate, self.to_q, self.to_k, self.to_v, self.text_q, self.text_k, self.text_v,
         self.to_out, self.text_out, self.up, self.down, self.text_up, self.text_down,
         norm, _, _, _, self.matrices) = layers
        self.heads, self.attend, self.is_last = heads, network.masked_attention(dtype), is_last
        self.norm_eps = norm.eps
        self.is_float16 = dtype == ms.float16

    def construct(self, image, text, emb, cos, sin, mask, weights, lora):
        """image [B, N, D], text [B, L, D], emb [B, D], cos and sin of `network.positions`, mask of
        `network.text_mask` -> image, text; of the last block the image only."""
        (w_modulate, w_text_modulate, w_q, w_k, w_v, w_text_q, w_text_k, w_text_v, w_out, w_text_out, w_up, w_down,
         w_text_up, w_text_down, w_norm_q, w_norm_k, w_text_norm_q, w_text_norm_k) = weights
        lora = self.matrices(lora)
        shift, scale, gate, shift_2, scale_2, gate_2 = network.chunks(self.modulate(emb, w_modulate, lora), 6)
        text_shift, text_scale, text_gate, text_shift_2, text_scale_2, text_gate_2 = network.chunks(
            self.text_modulate(emb, w_text_modulate, lora), 6)
        (image, x), (text, y) = network.shared(image, 2), network.shared(text, 2)
        x_q, x_k, x_v = network.shared(network.layer_norm_modulate(x, scale, shift, EPS), 3)
        y_q, y_k, y_v = network.shared(network.layer_norm_modulate(y, text_scale, text_shift, EPS), 3)
        q = network.norm_rotate_joint(
            by_head(self.text_q(y_q, w_text_q, lora), self.heads), by_head(self.to_q(x_q, w_q, lora), self.heads),
            w_text_norm_q[0], w_norm_q[0], cos, sin, self.norm_eps)
        k = network.norm_rotate_joint(
            by_head(self.text_k(y_k, w_text_k, lora), self.heads), by_head(self.to_k(x_k, w_k, lora), self.heads),
            w_text_norm_k[0], w_norm_k[0], cos, sin, self.norm_eps)
        v = network.join(by_head(self.text_v(y_v, w_text_v, lora), self.heads),
                         by_head(self.to_v(x_v, w_v, lora), self.heads))
        y, x = network.part(self.attend(q, k, v, mask), text.shape[1])
        image, x = network.shared(network.gate_add(image, gate, self.to_out(x, w_out, lora)), 2)
        x = self.up(network.layer_norm_modulate(x, scale_2, shift_2, EPS), w_up, lora)
        image = network.gate_add(image, gate_2, self.down(network.gelu_tanh(x), w_down, lora))
        if self.is_float16:
            image = image.clamp(-65504, 65504)
        if self.is_last:
            return image
        text, y = network.shared(network.gate_add(text, text_gate, self.text_out(y, w_text_out, lora)), 2)
        y = self.text_up(network.layer_norm_modulate(y, text_scale_2, text_shift_2, EPS), w_text_up, lora)
        text = network.gate_add(text, text_gate_2, self.text_down(network.gelu_tanh(y), w_text_down, lora))
        if self.is_float16:
            text = text.clamp(-65504, 65504)
        return image, text


class TwoTimesBlock(Block):
    """The same for references that are modulated by another time than the image: two streams of image tokens."""

    def construct(self, image, text, emb, cos, sin, mask, reference, both, weights, lora):
        """reference [B, M, D]; both [2 B, D]: the image's time and the references', the first is ``emb`` -> image,
        text, reference; of the last block the image only. The others as in `Block`."""
        (w_modulate, w_text_modulate, w_q, w_k, w_v, w_text_q, w_text_k, w_text_v, w_out, w_text_out, w_up, w_down,
         w_text_up, w_text_down, w_norm_q, w_norm_k, w_text_norm_q, w_text_norm_k) = weights
        lora, batch, tokens = self.matrices(lora), image.shape[0], image.shape[1]
        # one call for both times, so that the weight has one gradient
        of_image, of_reference = network.part(self.modulate(both, w_modulate, lora).expand_dims(0), batch)
        shift, scale, gate, shift_2, scale_2, gate_2 = network.chunks(of_image.reshape(batch, -1), 6)
        r_shift, r_scale, r_gate, r_shift_2, r_scale_2, r_gate_2 = network.chunks(of_reference.reshape(batch, -1), 6)
        text_shift, text_scale, text_gate, text_shift_2, text_scale_2, text_gate_2 = network.chunks(
            self.text_modulate(emb, w_text_modulate, lora), 6)
        (image, x), (reference, r), (text, y) = (network.shared(image, 2), network.shared(reference, 2),
                                                 network.shared(text, 2))
        x = network.join(network.layer_norm_modulate(x, scale, shift, EPS),
                         network.layer_norm_modulate(r, r_scale, r_shift, EPS))
        x_q, x_k, x_v = network.shared(x, 3)
        y_q, y_k, y_v = network.shared(network.layer_norm_modulate(y, text_scale, text_shift, EPS), 3)
        q = network.norm_rotate_joint(
            by_head(self.text_q(y_q, w_text_q, lora), self.heads), by_head(self.to_q(x_q, w_q, lora), self.heads),
            w_text_norm_q[0], w_norm_q[0], cos, sin, self.norm_eps)
        k = network.norm_rotate_joint(
            by_head(self.text_k(y_k, w_text_k, lora), self.heads), by_head(self.to_k(x_k, w_k, lora), self.heads),
            w_text_norm_k[0], w_norm_k[0], cos, sin, self.norm_eps)
        v = network.join(by_head(self.text_v(y_v, w_text_v, lora), self.heads),
                         by_head(self.to_v(x_v, w_v, lora), self.heads))
        y, x = network.part(self.attend(q, k, v, mask), text.shape[1])
        x, r = network.part(self.to_out(x, w_out, lora), tokens)
        image, x = network.shared(network.gate_add(image, gate, x), 2)
        x = network.layer_norm_modulate(x, scale_2, shift_2, EPS)
        if self.is_last:
            image = network.gate_add(image, gate_2, self.down(network.gelu_tanh(self.up(x, w_up, lora)), w_down, lora))
            if self.is_float16:
                image = image.clamp(-65504, 65504)
            return image
        reference, r = network.shared(network.gate_add(reference, r_gate, r), 2)
        x = network.join(x, network.layer_norm_modulate(r, r_scale_2, r_shift_2, EPS))
        x, r = network.part(self.down(network.gelu_tanh(self.up(x, w_up, lora)), w_down, lora), tokens)
        image, reference = network.gate_add(image, gate_2, x), network.gate_add(reference, r_gate_2, r)
        text, y = network.shared(network.gate_add(text, text_gate, self.text_out(y, w_text_out, lora)), 2)
        y = self.text_up(network.layer_norm_modulate(y, text_scale_2, text_shift_2, EPS), w_text_up, lora)
        text = network.gate_add(text, text_gate_2, self.text_down(network.gelu_tanh(y), w_text_down, lora))
        if self.is_float16:
            image, text, reference = (image.clamp(-65504, 65504), text.clamp(-65504, 65504),
                                      reference.clamp(-65504, 65504))
        return image, text, reference


class QwenImageBlock(mindone.QwenImageTransformerBlock):
    """The weights of a block."""

    is_arranged = True


class QwenImageLastBlock(QwenImageBlock):
    """The weights of the last block. Nothing reads what becomes of its text after attention: it is not computed."""


class QwenImageNetwork(Arranged):
    """What Qwen-Image's transformer and its ControlNet share: blocks, and what all blocks are given."""

    def places_and_mask(self, cos, sin, prompt_mask, batch, text_tokens, dtype):
        """cos and sin of `rotary.image_table` or `rotary.edit_table`, prompt_mask float32 [B, L], or None for text
        alone -> those of `network.positions`, and `network.text_mask`."""
        cos, sin = (network.positions(table, batch, self.heads, dtype) for table in (cos, sin))
        if prompt_mask is None:
            prompt_mask = ops.ones((batch, text_tokens), ms.float32)
        keys = ops.cat((prompt_mask, ops.ones((batch, cos.shape[1] - text_tokens), ms.float32)), 1)
        return cos, sin, network.text_mask(keys, keys.shape[1], self.heads, dtype)

    def embed(self, sigma, dtype):
        """sigma float32 [B] -> what modulates the tokens [B, D]."""
        sinusoids = self.time_text_embed.time_proj(sigma)
        return mint.nn.functional.silu(self.time_text_embed.timestep_embedder(sinusoids.astype(dtype)))

    def kinds(self):
        return {"block": Kind("transformer_blocks", NAMES, partial(self._build, Block))}

    def _build(self, kind, block, layers):
        # a bias, because the weight may be stored in 8 bits
        return kind(layers, self.heads, self.img_in.bias.dtype, isinstance(block, QwenImageLastBlock))

    @classmethod
    def of(cls, net: nn.Cell) -> nn.Cell:
        """mindone's network, made to compute by the blocks of this module."""
        del net.pos_embed  # complex tables of 4096 positions that nothing reads any more
        net.__class__, net.heads = cls, net.config.num_attention_heads
        for block in net.transformer_blocks:
            block.__class__ = QwenImageBlock
        net.transformer_blocks[-1].__class__ = QwenImageLastBlock
        return net


class QwenImageTransformer(QwenImageNetwork, mindone.QwenImageTransformer2DModel):
    """Velocity of packed latents."""

    def construct(self, tokens, sigma, prompt_embeds, cos, sin, prompt_mask=None, references=None, samples=None):
        """tokens [B, N, 4C], sigma float32 [B], prompt_embeds [B, L, D'], cos and sin of `rotary.image_table` or
        `rotary.edit_table`, prompt_mask float32 [B, L] (1 for text, 0 for padding; None: all text), references
        [B, M, 4C] (None: no reference), samples of `controlnet.QwenImageControlNet`, without references -> velocity
        [B, N, 4C].

        Padding is not attended to. Its own queries attend like any other; nothing reads what becomes of them.
        """
        has_two_times = references is not None and self.zero_cond_t
        batch, image_tokens, both = tokens.shape[0], tokens.shape[1], None
        if references is not None and not has_two_times:
            tokens = ops.cat((tokens, references), 1)
        image = self.img_in(tokens)
        text = self.txt_in(self.txt_norm(prompt_embeds))
        sigma = sigma.astype(ms.float32)
        if has_two_times:
            references = self.img_in(references)
            both = self.embed(ops.cat((sigma, ops.zeros_like(sigma)), 0), image.dtype)
            emb = mint.split(both, batch, 0)[0]
        else:
            emb = self.embed(sigma, image.dtype)
        cos, sin, mask = self.places_and_mask(cos, sin, prompt_mask, batch, text.shape[1], image.dtype)
        lora = self.lora(image) if self.has_lora else self.no_lora
        if has_two_times:
            cells, cell_of = self.two_times_cells, self.two_times_cell_of
            weights, places = self.two_times_weights, self.two_times_lora
            last = len(cell_of) - 1
            for i in range(last):
                image, text, references = cells[cell_of[i]]((image, text, emb, cos, sin, mask, references, both),
                                                            weights[i], lora[places[i]])
            image = cells[cell_of[last]]((image, text, emb, cos, sin, mask, references, both), weights[last],
                                         lora[places[last]])
        else:
            cells, cell_of, weights, places = self.block_cells, self.block_cell_of, self.block_weights, self.block_lora
            last = len(cell_of) - 1
            for i in range(last):
                image, text = cells[cell_of[i]]((image, text, emb, cos, sin, mask), weights[i], lora[places[i]])
                image = control.with_sample(image, samples, i, len(cell_of))
            image = cells[cell_of[last]]((image, text, emb, cos, sin, mask), weights[last], lora[places[last]])
            image = control.with_sample(image, samples, last, len(cell_of))
            if references is not None:
                image = network.part(image, image_tokens)[0]
        scale, shift = network.chunks(self.norm_out.linear(emb), 2)
        return self.proj_out(network.layer_norm_modulate(image, scale, shift, EPS))

    def kinds(self):
        return {**super().kinds(),
                "two_times": Kind("transformer_blocks", NAMES, partial(self._build, TwoTimesBlock), twin_of="block")}


def build_transformer(config: dict) -> QwenImageTransformer:
    """The network of a ``config.json``, its weights still to come.

    Raises: WeightError for a setting that cannot be meant.
    """
    is_timed = bool(config.get("zero_cond_t", False))
    config = {name: value for name, value in config.items() if name != "zero_cond_t"}
    given = arguments(mindone.QwenImageTransformer2DModel, config, LATER_SETTINGS)
    check_axes(given)
    dit = mindone.QwenImageTransformer2DModel(**given)
    dit.register_to_config(zero_cond_t=is_timed)
    dit.zero_cond_t = is_timed
    return QwenImageTransformer.of(dit)
