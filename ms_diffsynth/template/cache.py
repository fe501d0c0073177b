"""The template cache: what a template's ``forward`` gives the base model, and how several of them become one.

    kv_cache         block name -> (K, V), each [B, S, heads, head_dim]: keys and values behind those of the block, with
                     neither position nor norm
    text_embedding   [B, E, D]: tokens behind those of the prompt
    lora             names and Tensors of a LoRA file: <module>.lora_A.weight [B, r, in] and .lora_B.weight
                     [B, out, r], or both without the batch axis

Merge rules (DiffSynth-Studio 2.1.12, TemplatePipeline): keys and values are joined along the tokens, text along the
tokens, LoRAs along the rank.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mindspore import Tensor, ops
from mindspore.ops.primitive import constexpr

from ms_diffsynth.errors import TemplateError, listing, nearest
from ms_diffsynth.units import TensorUnit

CACHE_KEYS = ("kv_cache", "text_embedding", "lora")
KV, LORA, TEXT = "kv_cache.", "lora.", "text_embedding"  # slots that a cache is as single Tensors

TemplateCache = dict[str, Any]


def check_cache(cache: Any, where: str = "the template's forward") -> TemplateCache:
    """A cache as it came from ``forward``. Raises: TemplateError for anything else. Usable in compiled code."""
    # compiled code comes to a check before what it guards only when something depends on it: on ``is_right``, here
    is_right = _check_keys(tuple(cache.keys()) if isinstance(cache, dict) else None, where)
    if is_right and "kv_cache" in cache:
        is_right = _check_kind("kv_cache", isinstance(cache["kv_cache"], dict), "a dict: block name -> (K, V)", where)
        for name, pair in cache["kv_cache"].items():
            is_pair = isinstance(pair, (tuple, list)) and len(pair) == 2
            is_pair = is_pair and isinstance(pair[0], Tensor) and isinstance(pair[1], Tensor)
            is_right = is_right and _check_kind(f"kv_cache['{name}']", is_pair, "two Tensors (K, V)", where)
    if is_right and "lora" in cache:
        is_right = _check_kind("lora", isinstance(cache["lora"], dict), "a dict: name -> Tensor", where)
        for name, tensor in cache["lora"].items():
            is_right = is_right and _check_kind(f"lora['{name}']", isinstance(tensor, Tensor), "a Tensor", where)
    if is_right and "text_embedding" in cache:
        is_right = _check_kind("text_embedding", isinstance(cache["text_embedding"], Tensor), "a Tensor", where)
    return cache if is_right else {}


@constexpr
def _check_keys(names: tuple[str, ...] | None, where: str) -> bool:
    odd = [name for name in names or () if name not in CACHE_KEYS]
    if odd or not names:
        found = "something that is not a dict" if names is None else listing(map(repr, odd)) or "an empty dict"
        raise TemplateError(f"{where} returned {found}: expected a dict with {listing(CACHE_KEYS)}."
                            f"{nearest(odd[0], CACHE_KEYS) if odd else ''}")
    return True


@constexpr
def _check_kind(name: str, is_right: bool, expected: str, where: str) -> bool:
    if not is_right:
        raise TemplateError(f"{where} returned a {name} of another kind: expected {expected}.")
    return True


def merge(caches: Sequence[TemplateCache]) -> TemplateCache:
    """Several caches as one, in their order."""
    found: TemplateCache = {}
    for key in CACHE_KEYS:
        parts = [cache[key] for cache in caches if key in cache]
        if len(parts) == 1:
            found[key] = parts[0]
        elif parts and key == "text_embedding":
            found[key] = _join(parts, -2)
        elif parts:
            names = dict.fromkeys(name for part in parts for name in part)
            of_name = {name: [part[name] for part in parts if name in part] for name in names}
            if key == "lora":
                found[key] = {name: _join(tensors, -2 if ".lora_A." in name else -1)
                              for name, tensors in of_name.items()}
            else:
                found[key] = {block: (_join([k for k, _ in pairs], 1), _join([v for _, v in pairs], 1))
                              for block, pairs in of_name.items()}
    return found


def _join(tensors: list[Tensor], axis: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else ops.cat([t.astype(tensors[0].dtype) for t in tensors], axis)


def to_slots(cache: TemplateCache) -> dict[str, Tensor]:
    """A cache as single Tensors by name, which a compiled step can take."""
    slots = {f"{KV}{block}.{side}": tensor for block, pair in cache.get("kv_cache", {}).items()
             for side, tensor in zip("kv", pair)}
    slots |= {f"{LORA}{name}": tensor for name, tensor in cache.get("lora", {}).items()}
    return slots | ({TEXT: cache[TEXT]} if TEXT in cache else {})


class JoinTemplateCache(TensorUnit):
    """The inverse of `to_slots`, inside the step."""

    output_params = ("template_cache",)
    is_always_fused = True

    def __init__(self, slots: Sequence[str]):
        super().__init__()
        self.input_params = tuple(name for name in slots if name.startswith((KV, LORA)) or name == TEXT)
        blocks = dict.fromkeys(n.removeprefix(KV).rpartition(".")[0] for n in self.input_params if n.startswith(KV))
        place = {name: k for k, name in enumerate(self.input_params)}
        self.kv = tuple((block, place[f"{KV}{block}.k"], place[f"{KV}{block}.v"]) for block in blocks)
        self.lora = tuple((n.removeprefix(LORA), place[n]) for n in self.input_params if n.startswith(LORA))
        self.text = place.get(TEXT, -1)

    def construct(self, *tensors):
        cache, kv, lora = {}, {}, {}
        for block, k, v in self.kv:
            kv[block] = (tensors[k], tensors[v])
        for name, k in self.lora:
            lora[name] = tensors[k]
        if len(self.kv) > 0:
            cache["kv_cache"] = kv
        if len(self.lora) > 0:
            cache["lora"] = lora
        if self.text >= 0:
            cache["text_embedding"] = tensors[self.text]
        return (cache,)
