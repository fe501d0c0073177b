"""How a template cache enters FLUX.2: what each block gets, and the text behind the prompt. All of it is compiled.

A block is called as DiffSynth-Studio calls it, ``double_0``, ..., ``single_0``, ...; the layers of a LoRA as diffusers
calls them.

Shape legend: B batch, S tokens of the template, H heads, D channels of a head, r rank of a LoRA.
"""
from __future__ import annotations

from typing import Any

import mindspore as ms
from mindspore import Tensor, ops
from mindspore.ops.primitive import constexpr

from ms_diffsynth.errors import TemplateError, listing, nearest

JOINT_LAYERS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
                "attn.add_v_proj", "attn.to_add_out", "ff.linear_in", "ff.linear_out", "ff_context.linear_in",
                "ff_context.linear_out")
SINGLE_LAYERS = ("attn.to_qkv_mlp_proj", "attn.to_out")
FOLDERS = {"double": "transformer_blocks", "single": "single_transformer_blocks"}


def by_block(cache: dict[str, Any], blocks: tuple[str, ...], batch: int, head: tuple[int, int],
             dtype: ms.Type) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Block -> ``{"kv": (K, V), "attn.to_q": (A, B), ...}``, with the entries a cache has for it, in ``dtype``.

    Shapes: K and V [B, S, H, D]; A [B, r, in] and B [B, out, r].
    """
    kv = cache["kv_cache"] if "kv_cache" in cache else {}
    lora = cache["lora"] if "lora" in cache else {}
    found = {}
    # compiled code comes to a check before what it guards only when that depends on it: so they stand in conditions
    is_known = check_blocks(tuple(kv.keys()), blocks) and check_layers(tuple(lora.keys()), blocks)
    for block in blocks if is_known else ():
        entry = {}
        if block in kv and check_pair(block, kv[block][0].shape, kv[block][1].shape, batch, head):
            k, v = kv[block]
            entry["kv"] = (for_batch(k.astype(dtype), batch), for_batch(v.astype(dtype), batch))
        for layer in layers_of(block):
            a, b = f"{path_of(block)}.{layer}.lora_A.weight", f"{path_of(block)}.{layer}.lora_B.weight"
            if a in lora and check_ranks(f"{path_of(block)}.{layer}", lora[a].shape, lora[b].shape, batch):
                entry[layer] = (for_samples(lora[a].astype(dtype), batch), for_samples(lora[b].astype(dtype), batch))
        found[block] = entry
    return found


def with_text(prompt_embeds: Tensor, cache: dict[str, Any]) -> Tensor:
    """Tokens of a template behind those of the prompt: [B, L, D] and [B or 1, E, D] -> [B, L + E, D]."""
    if "text_embedding" in cache and check_text(cache["text_embedding"].shape, prompt_embeds.shape):
        text = for_batch(cache["text_embedding"].astype(prompt_embeds.dtype), prompt_embeds.shape[0])
        return ops.cat((prompt_embeds, text), 1)
    return prompt_embeds


def for_batch(x: Tensor, batch: int) -> Tensor:
    """A Tensor whose first axis is ``batch``, or 1: then the same for every row."""
    return x if x.shape[0] == batch else ops.broadcast_to(x, (batch,) + x.shape[1:])


def for_samples(x: Tensor, batch: int) -> Tensor:
    """A matrix for every sample: [out, in] or [B or 1, out, in] -> [B, out, in]."""
    return for_batch(x.expand_dims(0) if x.ndim == 2 else x, batch)


def joined(weights: tuple, template: dict, block: str, shapes: tuple[tuple[int, int], ...]) -> tuple:
    """The weights of a block with what a template has for it: (layer weights, pairs of keys and values).

    The weights of its first layers, those of `layers_of`, become (weights, pairs of A and B), with one pair or none.

    Args:
        weights: of each layer. template: of `by_block`. shapes: (out, in) of the first layers.
    """
    found = template[block] if block in template else {}
    layers, first = layers_of(block), ()
    for i in range(len(layers)):
        pairs = ()
        if layers[i] in found and check_widths(layers[i], found[layers[i]][0].shape, found[layers[i]][1].shape,
                                               shapes[i]):
            pairs = (found[layers[i]],)
        first = first + ((weights[i], pairs),)
    return first + weights[len(layers):], (found["kv"],) if "kv" in found else ()


@constexpr
def layers_of(block: str) -> tuple[str, ...]:
    """The layers of a block that a template's LoRA reaches."""
    return JOINT_LAYERS if block.startswith("double_") else SINGLE_LAYERS


@constexpr
def path_of(block: str) -> str:
    """``transformer_blocks.0`` for ``double_0``."""
    kind, _, number = block.partition("_")
    return f"{FOLDERS[kind]}.{number}"


@constexpr
def check_blocks(found: tuple[str, ...], known: tuple[str, ...]) -> bool:
    odd = [name for name in found if name not in known]
    if odd:
        raise TemplateError(f"the template's kv_cache names {listing(odd)}: this network has {listing(known, 60)}."
                            f"{nearest(odd[0], known)}")
    return True


@constexpr
def check_layers(found: tuple[str, ...], blocks: tuple[str, ...]) -> bool:
    known = [f"{FOLDERS[b.partition('_')[0]]}.{b.partition('_')[2]}.{layer}" for b in blocks
             for layer in (JOINT_LAYERS if b.startswith("double_") else SINGLE_LAYERS)]
    modules = dict.fromkeys(n.removesuffix(".lora_A.weight").removesuffix(".lora_B.weight") for n in found)
    odd = [m for m in modules if m not in known]
    halves = [f"half of {m}" for m in modules if m in known and
              not {f"{m}.lora_A.weight", f"{m}.lora_B.weight"} <= set(found)]
    if odd or halves:
        raise TemplateError(f"the template's lora names {listing(odd + halves)}: expected <module>.lora_A.weight and "
                            "<module>.lora_B.weight of linear layers of the blocks, such as "
                            f"{listing(known, 3)}.{nearest(odd[0], known) if odd else ''}")
    return True


@constexpr
def check_pair(name: str, k: tuple[int, ...], v: tuple[int, ...], batch: int, head: tuple[int, int]) -> bool:
    if k != v or len(k) != 4 or k[0] not in (1, batch) or tuple(k[2:]) != tuple(head):
        raise TemplateError(f"the template's kv_cache['{name}'] has the shapes {list(k)} and {list(v)}: expected (K, "
                            f"V), each [{batch}, tokens, {head[0]}, {head[1]}] (batch, tokens, heads, channels).")
    return True


@constexpr
def check_ranks(name: str, a: tuple[int, ...], b: tuple[int, ...], batch: int) -> bool:
    if len(a) != len(b) or len(a) not in (2, 3) or a[-2] != b[-1] or (len(a) == 3 and {a[0], b[0]} - {1, batch}):
        raise TemplateError(f"the template's lora of {name} has the shapes {list(a)} and {list(b)}: expected A [rank, "
                            f"in] and B [out, rank], or both with a batch axis of {batch} in front.")
    return True


@constexpr
def check_widths(name: str, a: tuple[int, ...], b: tuple[int, ...], weight: tuple[int, int]) -> bool:
    if (b[-2], a[-1]) != tuple(weight):
        raise TemplateError(f"the template's lora of a layer {name} has the shapes {list(a)} and {list(b)}: expected A "
                            f"[rank, {weight[1]}] and B [{weight[0]}, rank].")
    return True


@constexpr
def check_text(text: tuple[int, ...], prompt: tuple[int, ...]) -> bool:
    if len(text) != 3 or text[0] not in (1, prompt[0]) or text[2] != prompt[2]:
        raise TemplateError(f"the template's text_embedding has the shape {list(text)}: expected [{prompt[0]}, tokens, "
                            f"{prompt[2]}], as prompt_embeds.")
    return True
