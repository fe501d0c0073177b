"""Write tiny checkpoints in their publishers' names, and the digests of what diffusers makes of their tensors.

    python tests/formats/originals/make.py       (an environment with torch 2.13 and diffusers 0.39.0)

FLUX.1's converter has the width of the real model in its code; here it is replaced by that of the tiny one.
"""
from __future__ import annotations

import hashlib
import inspect
import json
from pathlib import Path

import torch
from diffusers.loaders import single_file_utils as diffusers
from safetensors.torch import save_file

OUT, D = Path(__file__).parent, 8
generator = torch.Generator().manual_seed(0)
DIGESTS = {}


def linear(name, rows, columns, bias=True):
    found = {f"{name}.weight": torch.randn(rows, columns, generator=generator).bfloat16()}
    return found | ({f"{name}.bias": torch.randn(rows, generator=generator).bfloat16()} if bias else {})


def scale(name):
    return {f"{name}.scale": torch.randn(4, generator=generator).bfloat16()}


def convolution(name, rows, columns, side=3):
    return {f"{name}.weight": torch.randn(rows, columns, side, side, generator=generator).bfloat16(),
            f"{name}.bias": torch.randn(rows, generator=generator).bfloat16()}


def norm(name, width):
    return {f"{name}.{part}": torch.randn(width, generator=generator).bfloat16() for part in ("weight", "bias")}


def transformer(bias, mlp, fused):
    """FLUX.1's, or FLUX.2's: one block of each kind."""
    tensors = {}
    for side in ("img", "txt"):
        block = f"double_blocks.0.{side}"
        tensors |= {**linear(f"{block}_attn.qkv", 3 * D, D, bias), **linear(f"{block}_attn.proj", D, D, bias),
                    **scale(f"{block}_attn.norm.query_norm"), **scale(f"{block}_attn.norm.key_norm"),
                    **linear(f"{block}_mlp.0", (1 if bias else 2) * mlp * D, D, bias),
                    **linear(f"{block}_mlp.2", D, mlp * D, bias), **linear(f"{side}_in", D, 6, bias)}
        if bias:
            tensors |= linear(f"{block}_mod.lin", 6 * D, D)
        else:
            tensors |= linear(f"double_stream_modulation_{side}.lin", 6 * D, D, False)
    tensors |= {**linear("single_blocks.0.linear1", fused * D, D, bias), **scale("single_blocks.0.norm.query_norm"),
                **linear("single_blocks.0.linear2", D, (1 + mlp) * D, bias), **scale("single_blocks.0.norm.key_norm"),
                **linear("final_layer.linear", 6, D, bias), **linear("final_layer.adaLN_modulation.1", 2 * D, D, bias)}
    tensors |= linear("single_blocks.0.modulation.lin" if bias else "single_stream_modulation.lin", 3 * D, D, bias)
    for embedder in ("time_in", "guidance_in", *(["vector_in"] if bias else [])):
        tensors |= {**linear(f"{embedder}.in_layer", D, 6, bias), **linear(f"{embedder}.out_layer", D, D, bias)}
    return tensors


def autoencoder():
    tensors = {}
    for half, outward in (("encoder", "down"), ("decoder", "up")):
        tensors |= {**convolution(f"{half}.conv_in", 4, 3), **convolution(f"{half}.conv_out", 3, 4),
                    **norm(f"{half}.norm_out", 4), **norm(f"{half}.mid.attn_1.norm", 4)}
        for k in (1, 2):
            block = f"{half}.mid.block_{k}"
            tensors |= {**norm(f"{block}.norm1", 4), **norm(f"{block}.norm2", 4), **convolution(f"{block}.conv1", 4, 4),
                        **convolution(f"{block}.conv2", 4, 4)}
        for part in ("q", "k", "v", "proj_out"):
            tensors |= convolution(f"{half}.mid.attn_1.{part}", 4, 4, 1)
        for level in range(4):
            block = f"{half}.{outward}.{level}.block.0"
            tensors |= {**norm(f"{block}.norm1", 4), **norm(f"{block}.norm2", 4), **convolution(f"{block}.conv1", 4, 4),
                        **convolution(f"{block}.conv2", 4, 4), **convolution(f"{block}.nin_shortcut", 4, 4, 1)}
            if level != (3 if half == "encoder" else 0):
                name = "downsample" if half == "encoder" else "upsample"
                tensors |= convolution(f"{half}.{outward}.{level}.{name}.conv", 4, 4)
    return tensors


def mmdit():
    """Stable Diffusion 3.5's: the first block has two attentions, the last changes no text."""
    tensors = {"pos_embed": torch.randn(1, 9, D, generator=generator).bfloat16(),
               **convolution("x_embedder.proj", D, 4, 2), **linear("context_embedder", D, 6),
               **linear("final_layer.linear", 16, D), **linear("final_layer.adaLN_modulation.1", 2 * D, D)}
    for embedder in ("t_embedder", "y_embedder"):
        tensors |= {**linear(f"{embedder}.mlp.0", D, 6), **linear(f"{embedder}.mlp.2", D, D)}
    for k, (parts, parts_of_text) in enumerate(((9, 6), (6, 6), (6, 2))):
        for side, count in (("x_block", parts), ("context_block", parts_of_text)):
            block = f"joint_blocks.{k}.{side}"
            tensors |= {**linear(f"{block}.attn.qkv", 3 * D, D), **linear(f"{block}.adaLN_modulation.1", count * D, D),
                        **norm_of_heads(f"{block}.attn")}
            if count > 2:
                tensors |= {**linear(f"{block}.attn.proj", D, D), **linear(f"{block}.mlp.fc1", 4 * D, D),
                            **linear(f"{block}.mlp.fc2", D, 4 * D)}
            if count == 9:
                tensors |= {**linear(f"{block}.attn2.qkv", 3 * D, D), **linear(f"{block}.attn2.proj", D, D),
                            **norm_of_heads(f"{block}.attn2")}
    return {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}


def norm_of_heads(name):
    return {f"{name}.{part}.weight": torch.randn(4, generator=generator).bfloat16() for part in ("ln_q", "ln_k")}


def put(name, tensors, converted):
    save_file(tensors, OUT / f"{name}.safetensors")
    DIGESTS[name] = {key: [list(array.shape), hashlib.sha256(
        array.contiguous().view(torch.uint16).numpy().tobytes()).hexdigest()[:16]] for key, array in converted.items()}


if __name__ == "__main__":
    source = inspect.getsource(diffusers.convert_flux_transformer_checkpoint_to_diffusers)
    exec(source.replace("inner_dim = 3072", f"inner_dim = {D}"), diffusers.__dict__)
    flux, flux2, vae = transformer(True, 4, 7), transformer(False, 3, 9), autoencoder()
    put("flux", flux, diffusers.convert_flux_transformer_checkpoint_to_diffusers(dict(flux)))
    put("flux2", flux2, diffusers.convert_flux2_transformer_checkpoint_to_diffusers(dict(flux2)))
    config = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    put("vae", vae, diffusers.convert_ldm_vae_checkpoint(dict(vae), config))
    sd3 = mmdit()
    put("sd3", sd3, diffusers.convert_sd3_transformer_checkpoint_to_diffusers(dict(sd3)))
    (OUT / "digests.json").write_text(json.dumps(DIGESTS, indent=0, sort_keys=True) + "\n")
