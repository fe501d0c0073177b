"""Puts the CPU kernels in place: functions by identity, cells by their ``construct``, mindone by its imports."""
from __future__ import annotations

import logging
import sys
from types import ModuleType

from mindspore import mint, ops

from ms_diffsynth.errors import DeviceError, listing
from ms_diffsynth.ops.cpu import attention, functional, random, spatial, tensor
from ms_diffsynth.ops.cpu.adamw import adamw_construct
from ms_diffsynth.ops.cpu.source import adapt_imports
from ms_diffsynth.ops.sinusoid import get_timestep_embedding

if functional.HAS_NATIVE:
    from ms_diffsynth.ops.cpu.native import blocks
else:
    blocks = None

logger = logging.getLogger(__name__)

KERNELS = ((mint, tensor), (mint, random), (mint.nn.functional, functional), (mint.nn.functional, spatial))
CELLS = {
    mint.nn.Linear: functional.linear_construct,
    mint.nn.GroupNorm: functional.group_norm_construct,
    mint.nn.Embedding: functional.embedding_construct,
    mint.nn.Dropout: functional.dropout_construct,
    mint.nn.Conv1d: spatial.conv1d_construct,
    mint.nn.Conv2d: spatial.conv2d_construct,
    mint.nn.Conv3d: spatial.conv3d_construct,
    mint.nn.AvgPool2d: spatial.avg_pool2d_construct,
    mint.optim.AdamW: adamw_construct,
}
MINDONE = {
    "mindone.diffusers.models.layers_compat":
        {"scaled_dot_product_attention": attention.scaled_dot_product_attention},
    "mindone.transformers.integrations.sdpa_attention":
        {"scaled_dot_product_attention": attention.scaled_dot_product_attention},
    "mindone.diffusers.models.embeddings": {"get_timestep_embedding": get_timestep_embedding},
    "mindone.diffusers.models.transformers.transformer_qwenimage": {"get_timestep_embedding": get_timestep_embedding},
}
_installed = False


def install() -> None:
    """Install once; see `ms_diffsynth.ops.install_cpu_kernels`."""
    global _installed
    if _installed:
        return
    early = sorted(m for m in sys.modules if m.startswith("mindone.") and m != "mindone.version")
    if early:
        raise DeviceError(f"mindone was imported before ms_diffsynth ({listing(early, 3)}), but its networks are "
                          "adapted to the CPU while they are imported. Expected 'import ms_diffsynth' first: put it "
                          "above the first import from mindone.")
    replaced = _replace_functions()
    for cell, construct in CELLS.items():
        cell.construct = construct
    ops.layer_norm, ops.rms_norm = functional.layer_norm, functional.rms_norm
    ops.flash_attention_score = attention.flash_attention_score
    ops.operations.nn_ops.FlashAttentionScore = attention.FlashAttentionScore
    adapt_imports({**MINDONE, **blocks.METHODS} if blocks else MINDONE)
    _installed = True
    logger.debug("CPU kernels installed: %d functions of mindspore.mint, %d cells.", replaced, len(CELLS))


def _replace_functions() -> int:
    """Put our function wherever `mindspore.mint` holds its own, under whatever name; return how many were found."""
    ours = {id(getattr(space, name)): getattr(module, name)
            for space, module in KERNELS for name in module.__all__ if hasattr(space, name)}
    for name, module in list(sys.modules.items()):
        if isinstance(module, ModuleType) and name.startswith("mindspore.mint"):
            for key, value in list(vars(module).items()):
                if id(value) in ours:
                    setattr(module, key, ours[id(value)])
    return len(ours)
