"""Write tiny checkpoints in their publishers' names, and the digests of what diffusers makes of their tensors.

    python tests/formats/originals/make.py       (an environment with torch 2.13, diffusers 0.39.0 and
                                                 transformers 4.57.1)

FLUX.1's converter has the width of the real model in its code; here it is replaced by that of the tiny one.
"""
from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from pathlib import Path

import torch
from diffusers import AutoencoderKLQwenImage, AutoencoderKLWan
from diffusers.loaders import single_file_utils as diffusers
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

OUT, D = Path(__file__).parent, 8
generator = torch.Generator().manual_seed(0)
DIGESTS = {}


def linear(name, rows, columns, bias=True):
    found = {f"{name}.weight": torch.randn(rows, columns, generator=generator).bfloat16()}
    return found | ({f"{name}.bias": torch.randn(rows, generator=generator).bfloat16()} if bias else {})


def scale(name):
    return {f"{name}.scale": torch.randn(4, generator=generator).bfloat16()}


def weight(name, width):
    return {f"{name}.weight": torch.randn(width, generator=generator).bfloat16()}


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


def z_image():
    """One block of each kind."""
    tensors = {"x_pad_token": torch.randn(1, D, generator=generator).bfloat16(),
               "cap_pad_token": torch.randn(1, D, generator=generator).bfloat16(),
               **linear("x_embedder", D, 6), **linear("cap_embedder.1", D, 6), **weight("cap_embedder.0", 6),
               **linear("t_embedder.mlp.0", 10, 6), **linear("t_embedder.mlp.2", D, 10),
               **linear("final_layer.linear", 6, D), **linear("final_layer.adaLN_modulation.1", D, D)}
    for block in ("layers.0", "noise_refiner.0", "context_refiner.0"):
        tensors |= {**linear(f"{block}.attention.qkv", 3 * D, D, False), **weight(f"{block}.attention.q_norm", 4),
                    **linear(f"{block}.attention.out", D, D, False), **weight(f"{block}.attention.k_norm", 4),
                    **linear(f"{block}.feed_forward.w1", 20, D, False),
                    **linear(f"{block}.feed_forward.w2", D, 20, False),
                    **linear(f"{block}.feed_forward.w3", 20, D, False)}
        for name in ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2"):
            tensors |= weight(f"{block}.{name}", D)
        if block != "context_refiner.0":
            tensors |= linear(f"{block}.adaLN_modulation.0", 4 * D, D)
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


def film_autoencoder():
    """Wan 2.1's and Qwen-Image's: all blocks that they have, with 1 or 2 channels."""
    tensors = film_ends()
    for k in range(11):  # levels of two blocks, and what makes smaller
        name = f"encoder.downsamples.{k}"
        tensors |= convolution(f"{name}.resample.1", 2, 2) if k % 3 == 2 else film_block(name, k in (3, 6))
        tensors |= film_convolution(f"{name}.time_conv", 1) if k in (5, 8) else {}
    for k in range(15):  # levels of three blocks, and what enlarges
        name = f"decoder.upsamples.{k}"
        tensors |= convolution(f"{name}.resample.1", 1, 2) if k % 4 == 3 else film_block(name, k == 4)
        tensors |= film_convolution(f"{name}.time_conv", 1) if k in (3, 7) else {}
    return tensors


def film_ends():
    tensors = {**film_convolution("conv1", 1), **film_convolution("conv2", 1)}
    for half in ("encoder", "decoder"):
        tensors |= {**film_convolution(f"{half}.conv1"), **film_block(f"{half}.middle.0"),
                    **film_block(f"{half}.middle.2"), f"{half}.middle.1.norm.gamma": gamma(2, 2),
                    **convolution(f"{half}.middle.1.to_qkv", 6, 2, 1), **convolution(f"{half}.middle.1.proj", 2, 2, 1),
                    f"{half}.head.0.gamma": gamma(2), **film_convolution(f"{half}.head.2")}
    return tensors


def film_block(name, is_wider=False):
    found = {f"{name}.residual.0.gamma": gamma(2), **film_convolution(f"{name}.residual.2"),
             f"{name}.residual.3.gamma": gamma(2), **film_convolution(f"{name}.residual.6")}
    return found | (film_convolution(f"{name}.shortcut", 1) if is_wider else {})


def residual_film_autoencoder():
    """Wan 2.2's, of TI2V-5B, and its tensors by diffusers' names.

    In both programs' modules the tensors of a level are in one order; the others have the names of Wan 2.1's.
    """
    tensors, levels = film_ends(), {}
    for half, part, count, wider, of_time in (("encoder", "downsamples", 2, (1, 2), (1, 2)),
                                              ("decoder", "upsamples", 3, (2, 3), (0, 1))):
        for level in range(4):
            name = f"{half}.{part}.{level}.{part}"
            for k in range(count):
                levels |= film_block(f"{name}.{k}", not k and level in wider)
            levels |= convolution(f"{name}.{count}.resample.1", 2, 2) if level < 3 else {}
            levels |= film_convolution(f"{name}.{count}.time_conv", 1) if level in of_time else {}
    with torch.device("meta"):
        network = AutoencoderKLWan(base_dim=160, decoder_base_dim=256, z_dim=48, is_residual=True, in_channels=12,
                                   out_channels=12, patch_size=2, scale_factor_spatial=16).state_dict()
    theirs = [n for n in network if n.startswith(("encoder.down_blocks", "decoder.up_blocks"))]
    assert len(theirs) == len(levels) and all(a.endswith(b.rpartition(".")[2]) for a, b in zip(theirs, levels))
    converted = diffusers.convert_wan_vae_to_diffusers(dict(tensors)) | dict(zip(theirs, levels.values()))
    assert converted.keys() == network.keys()
    return tensors | levels, converted


def film_convolution(name, side=3):
    return {f"{name}.weight": torch.randn(2, 1, side, side, side, generator=generator).bfloat16(),
            f"{name}.bias": torch.randn(2, generator=generator).bfloat16()}


def gamma(width, sides=3):
    return torch.randn(width, *([1] * sides), generator=generator).bfloat16()


def vision_language_model():
    """Qwen2.5-VL by transformers, as ComfyUI's file of 8 bits has it; and its tensors, multiplied by their factors."""
    text = {"vocab_size": 16, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1,
            "rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 0]}}
    vision = {"depth": 1, "hidden_size": 8, "intermediate_size": 12, "num_heads": 2, "out_hidden_size": 8,
              "patch_size": 2}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        Qwen2_5_VLForConditionalGeneration(config).bfloat16().save_pretrained(folder)
        tensors = load_file(f"{folder}/model.safetensors")
    stored, found = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}, {}
    for name, tensor in tensors.items():
        stored[name], found[name] = tensor, tensor
        if name.endswith("proj.weight") and tensor.ndim == 2:
            factor = tensor.float().abs().max() / 448
            stored[name] = (tensor.float() / factor).to(torch.float8_e4m3fn)
            stored |= {name.replace(".weight", ".scale_weight"): factor,
                       name.replace(".weight", ".scale_input"): torch.ones(())}
            found[name] = stored[name].float() * factor
    (OUT / "qwen_text.json").write_text(json.dumps(config.to_diff_dict() | {"architectures": [
        "Qwen2_5_VLForConditionalGeneration"]}, indent=1, sort_keys=True) + "\n")
    return stored, found


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
        array.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest()[:16]] for key, array in converted.items()}


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
    found = z_image()
    put("z_image", found, diffusers.convert_z_image_transformer_checkpoint_to_diffusers(dict(found)))
    film = film_autoencoder()
    converted = diffusers.convert_wan_vae_to_diffusers(dict(film))
    with torch.device("meta"):
        for network in (AutoencoderKLQwenImage(), AutoencoderKLWan()):
            assert converted.keys() == network.state_dict().keys()
    put("film_vae", film, converted)
    put("film22_vae", *residual_film_autoencoder())
    put("qwen_text", *vision_language_model())
    (OUT / "digests.json").write_text(json.dumps(DIGESTS, indent=0, sort_keys=True) + "\n")
