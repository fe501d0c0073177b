"""Write LoRA files as other programs write them, small, and what each does to the weights, computed here in PyTorch.

    python tests/formats/foreign/make.py       (an environment with torch 2.13, diffusers 0.39.0 and peft 0.21.2)

Names and scales are those of the programs' sources, which the families' interchange.yaml name; the files real_... are
saved by the code of diffusers and peft. The models have one block of each kind and a width of 16. Of every change of a
weight, change @ cos(0, 1, 2, ...) is kept. A weight before is sin(1, 2, 3, ...).
"""
from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
    ZImageTransformer2DModel,
)
from diffusers.loaders.lora_conversion_utils import (
    _convert_non_diffusers_lora_to_diffusers,
    _convert_non_diffusers_wan_lora_to_diffusers,
    _maybe_map_sgm_blocks_to_diffusers,
)
from diffusers.training_utils import _collate_lora_metadata
from diffusers.utils import convert_all_state_dict_to_peft, convert_state_dict_to_kohya
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel

OUT, R = Path(__file__).parent, 2
generator = torch.Generator().manual_seed(1)
WIDTHS = {"num_layers": 1, "attention_head_dim": 8, "num_attention_heads": 2, "joint_attention_dim": 12}


def flux():
    return FluxTransformer2DModel(in_channels=4, num_single_layers=1, pooled_projection_dim=8, guidance_embeds=True,
                                  axes_dims_rope=(2, 2, 4), **WIDTHS)


MODELS = {
    "flux": flux(),
    "flux2": Flux2Transformer2DModel(in_channels=4, num_single_layers=1, timestep_guidance_channels=8,
                                     axes_dims_rope=(2, 2, 2, 2), **WIDTHS),
    "qwen_image": QwenImageTransformer2DModel(in_channels=4, out_channels=4, axes_dims_rope=(2, 2, 4), **WIDTHS),
    "sd3": SD3Transformer2DModel(sample_size=4, in_channels=4, caption_projection_dim=16, pooled_projection_dim=8,
                                 pos_embed_max_size=4, **WIDTHS),
    "sdxl": UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16, 16), norm_num_groups=4,
        layers_per_block=2, transformer_layers_per_block=(1, 1, 2), attention_head_dim=(1, 2, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=12,
        addition_embed_type="text_time", addition_time_embed_dim=4, projection_class_embeddings_input_dim=32),
    "wan": WanTransformer3DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
                                 text_dim=12, freq_dim=8, ffn_dim=24, num_layers=1, added_kv_proj_dim=16, image_dim=12,
                                 cross_attn_norm=True),
    "z_image": ZImageTransformer2DModel(in_channels=4, dim=16, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2,
                                        cap_feat_dim=12, axes_dims=[2, 2, 4], axes_lens=[8, 8, 8]),
}
SHAPES = {family: {name[:-7]: tuple(w.shape) for name, w in model.state_dict().items()
                   if name.endswith(".weight") and w.ndim == 2} for family, model in MODELS.items()}
CASES = {}


def weight(shape):
    return torch.sin(torch.arange(1, 1 + shape[0] * shape[1], dtype=torch.float64)).reshape(shape)


def random(*shape):
    return torch.randn(*shape, generator=generator) * 0.1


def pair(shape, rank=R):
    return random(rank, shape[1]), random(shape[0], rank)


def changes(pairs, scale=1.0):
    return {m: scale * (b.double() @ a.double()) for m, (a, b) in pairs.items()}


def put(family, name, tensors, expected, metadata=None, refused=None):
    """A case: file, what it does to each weight, or what the refusal says."""
    folder = OUT / family
    folder.mkdir(exist_ok=True)
    file = folder / name / "adapter_model.safetensors" if name == "peft_folder" else folder / f"{name}.safetensors"
    file.parent.mkdir(exist_ok=True)
    if tensors is not None:
        save_file({k: v.clone().contiguous() for k, v in tensors.items()}, file, metadata=metadata)
    keep(family, name, expected, refused)


def keep(family, name, expected, refused=None):
    probe = {m: (c.double() @ torch.cos(torch.arange(c.shape[1], dtype=torch.float64))).tolist()
             for m, c in (expected or {}).items()}
    CASES[f"{family}/{name}"] = {"refused": refused} if refused else {
        "changes": {m: [round(v, 9) for v in values] for m, values in probe.items()}}


def named(pairs, begin, a="lora_A.weight", b="lora_B.weight", alpha=None, flat=False):
    tensors = {}
    for module, (down, up) in pairs.items():
        stem = begin + (module.replace(".", "_") if flat else module)
        tensors |= {f"{stem}.{a}": down, f"{stem}.{b}": up}
        if alpha is not None:
            tensors[f"{stem}.alpha"] = alpha if torch.is_tensor(alpha) else torch.tensor(float(alpha))
    return tensors


KOHYA = {"a": "lora_down.weight", "b": "lora_up.weight", "flat": True}


def attention(family):
    ends = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "to_out.0")
    return [m for m in SHAPES[family] if m.endswith(ends)]


def fused(family, layers, expected, omit=()):
    """Pairs of layers that are several of diffusers' at once: name there -> (A, B)."""
    pairs = {}
    for name, members in layers.items():
        sizes = [SHAPES[family][m][0] for m in members]
        down, up = pairs[name] = pair((sum(sizes), SHAPES[family][members[0]][1]))
        expected |= {m: part.double() @ down.double() for m, part in zip(members, up.split(sizes))}
    return pairs


DOUBLE = {
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"], "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"], "txt_attn.proj": ["attn.to_add_out"],
}
FLUX_LAYERS = {
    **{f"double_blocks.0.{k}": [f"transformer_blocks.0.{m}" for m in v] for k, v in {
        **DOUBLE, "img_mlp.0": ["ff.net.0.proj"], "img_mlp.2": ["ff.net.2"], "txt_mlp.0": ["ff_context.net.0.proj"],
        "txt_mlp.2": ["ff_context.net.2"], "img_mod.lin": ["norm1.linear"], "txt_mod.lin": ["norm1_context.linear"],
    }.items()},
    **{f"single_blocks.0.{k}": [f"single_transformer_blocks.0.{m}" for m in v] for k, v in {
        "linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"], "linear2": ["proj_out"],
        "modulation.lin": ["norm.linear"]}.items()},
    "img_in": ["x_embedder"], "txt_in": ["context_embedder"], "final_layer.linear": ["proj_out"],
}


def write_flux():
    pairs = {m: pair(SHAPES["flux"][m]) for m in attention("flux")}
    ours = named(pairs, "transformer.")
    settings = {"r": R, "lora_alpha": 8, "target_modules": sorted(pairs), "use_rslora": False, "alpha_pattern": {},
                "rank_pattern": {}}

    def metadata(**other):
        return {"format": "pt", "lora_adapter_metadata": json.dumps(
            {f"transformer.{k}": v for k, v in {**settings, **other}.items()})}

    put("flux", "diffusers_nometa", ours, changes(pairs), {"format": "pt"})
    put("flux", "diffusers_meta", ours, changes(pairs, 4.0), metadata())
    put("flux", "rslora_meta", ours, changes(pairs, 8 / R**0.5), metadata(use_rslora=True))
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp8", torch.float8_e4m3fn)):
        put("flux", f"diffusers_{name}", {k: v.to(dtype) for k, v in ours.items()},
            changes({m: (a.to(dtype), b.to(dtype)) for m, (a, b) in pairs.items()}))
    ranks = {m: pair(SHAPES["flux"][m], 1 if "to_k" in m else 4 if "to_q" in m else 2) for m in pairs}
    put("flux", "mixed_ranks", named(ranks, "transformer."), changes(ranks))
    for name, alpha in (("0d", torch.tensor(1.0)), ("1d", torch.tensor([1.0])), ("int", torch.tensor(1)),
                        ("bf16", torch.tensor(1.0).bfloat16()), ("f64", torch.tensor(1.0, dtype=torch.float64))):
        put("flux", f"alpha_{name}", named(pairs, "transformer.", alpha=alpha), changes(pairs, 1 / R))
    put("flux", "comfy_diffusers_names", named(pairs, "diffusion_model.", "lora_down.weight", "lora_up.weight", 1),
        changes(pairs, 1 / R))
    for name, begin in (("onetrainer", "lora_transformer_"), ("kohya_diffusers_names", "lora_unet_"),
                        ("lycoris", "lycoris_")):
        put("flux", name, named(pairs, begin, alpha=1, **KOHYA), changes(pairs, 1 / R))
    put("flux", "default_infix", named(pairs, "", "lora_A.default.weight", "lora_B.default.weight"), changes(pairs))
    put("flux", "named_adapter", named(pairs, "transformer.", "lora_A.cat.weight", "lora_B.cat.weight"),
        changes(pairs))
    put("flux", "peft_alone", named(pairs, "base_model.model."), None,
        refused="adapter_config.json, which is not beside")
    put("flux", "peft_folder", named(pairs, "base_model.model."), changes(pairs, 4.0))
    (OUT / "flux/peft_folder/adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **settings}))
    wide = {m: pair(SHAPES["flux"][m], 40) for m in list(pairs)[:2]}
    put("flux", "rank_over_width", named(wide, "transformer."), changes(wide))
    norm = {"norm_out.linear": pair(SHAPES["flux"]["norm_out.linear"])}
    put("flux", "norm_out", named(norm, "transformer."), changes(norm))
    down, up = norm["norm_out.linear"]
    swapped = {"final_layer.adaLN_modulation.1": (down, torch.cat([up[16:], up[:16]]))}
    put("flux", "norm_out_original", named(swapped, "lora_unet_", alpha=R, **KOHYA), changes(norm))

    expected = {}
    layers = fused("flux", FLUX_LAYERS, expected)
    halved = {m: 0.5 * change for m, change in expected.items()}
    kohya = named(layers, "lora_unet_", alpha=1, **KOHYA)
    put("flux", "kohya_fused", kohya, halved, {"ss_network_module": "networks.lora_flux"})
    put("flux", "comfy_original", named(layers, "diffusion_model."), expected)
    put("flux", "fal_kontext", named(layers, "base_model.model."), expected)
    clip = {f"text_model.encoder.layers.0.self_attn.{p}": pair((8, 8)) for p in ("q_proj", "k_proj", "v_proj")}
    t5 = {"encoder.block.0.layer.1.DenseReluDense.wo": pair((8, 8))}
    put("flux", "kohya_with_encoders", {**kohya, **named(clip, "lora_te1_", alpha=1, **KOHYA),
                                        **named(t5, "lora_te3_", alpha=1, **KOHYA)}, halved)
    put("flux", "diffusers_with_encoder", {**ours, **named(clip, "text_encoder.")}, changes(pairs))
    put("flux", "comfy_with_encoders", {**named(layers, "diffusion_model."),
                                        **named(clip, "text_encoders.clip_l.transformer."),
                                        **named(t5, "text_encoders.t5xxl.transformer.")}, expected)
    expected = {}
    own = {"blocks.0.attn.a_to_qkv": FLUX_LAYERS["double_blocks.0.img_attn.qkv"],
           "blocks.0.attn.b_to_out": FLUX_LAYERS["double_blocks.0.txt_attn.proj"],
           "single_blocks.0.to_qkv_mlp": FLUX_LAYERS["single_blocks.0.linear1"]}
    put("flux", "diffsynth_own", named(fused("flux", own, expected), "", "lora_A.default.weight",
                                       "lora_B.default.weight"), expected)
    expected = {}
    xlabs = {f"double_blocks.0.processor.{k}": FLUX_LAYERS[f"double_blocks.0.{v}"] for k, v in {
        "qkv_lora1": "img_attn.qkv", "qkv_lora2": "txt_attn.qkv", "proj_lora1": "img_attn.proj",
        "proj_lora2": "txt_attn.proj"}.items()}
    xlabs["single_blocks.0.processor.qkv_lora"] = FLUX_LAYERS["single_blocks.0.linear1"][:3]
    put("flux", "xlabs", named(fused("flux", xlabs, expected), "", "down.weight", "up.weight"), expected)

    some = list(pairs)[:3]
    full, split = {}, {}
    for m in some:
        (out, ins), begin = SHAPES["flux"][m], f"lycoris_{m.replace('.', '_')}"
        w1, w2, a, b = random(4, 4), random(out // 4, ins // 4), random(out // 4, R), random(R, ins // 4)
        full[m] = {f"{begin}.lokr_w1": w1, f"{begin}.lokr_w2": w2, f"{begin}.alpha": torch.tensor(1e10)}, w1, w2
        split[m] = {f"{begin}.lokr_w1": w1, f"{begin}.lokr_w2_a": a, f"{begin}.lokr_w2_b": b,
                    f"{begin}.alpha": torch.tensor(1.0)}, w1, a @ b / R
    for name, found in (("lokr", full), ("lokr_decomposed", split)):
        put("flux", name, {k: v for tensors, *_ in found.values() for k, v in tensors.items()},
            {m: torch.kron(w1.double(), w2.double()) for m, (_, w1, w2) in found.items()})
    w1, w2, members = random(4, 4), random(12, 4), FLUX_LAYERS["double_blocks.0.img_attn.qkv"]
    put("flux", "lokr_fused", {"diffusion_model.double_blocks.0.img_attn.qkv.lokr_w1": w1,
                               "diffusion_model.double_blocks.0.img_attn.qkv.lokr_w2": w2},
        dict(zip(members, torch.kron(w1.double(), w2.double()).split(16))))
    loha = {f"hada_w{k}_{s}": random(16, R) if s == "a" else random(R, 16) for k in (1, 2) for s in "ab"}
    change = (loha["hada_w1_a"] @ loha["hada_w1_b"]) * (loha["hada_w2_a"] @ loha["hada_w2_b"])
    begin = f"lora_unet_{some[0].replace('.', '_')}"
    put("flux", "loha", {**{f"{begin}.{k}": v for k, v in loha.items()}, f"{begin}.alpha": torch.tensor(4.0)},
        {some[0]: change * 4 / R})
    diff = random(16, 16)
    put("flux", "weight_change", {f"diffusion_model.{some[0]}.diff": diff,
                                  f"diffusion_model.{some[0]}.diff_b": random(16)}, {some[0]: diff})
    put("flux", "bias_change", {**ours, f"transformer.{some[1]}.diff_b": random(16)}, changes(pairs))
    put("flux", "bias_alone", {**ours, "transformer.single_transformer_blocks.0.norm.linear.diff_b": random(48)},
        changes(pairs))
    magnitudes = {m: random(SHAPES["flux"][m][0]).abs() + 1 for m in pairs}
    dora = {m: (v := weight(SHAPES["flux"][m]) + change) * magnitudes[m].double()[:, None]
            / v.norm(dim=1, keepdim=True) - weight(SHAPES["flux"][m]) for m, change in changes(pairs, 0.5).items()}
    put("flux", "dora_kohya", {**named(pairs, "lora_unet_", alpha=1, **KOHYA), **{
        f"lora_unet_{m.replace('.', '_')}.dora_scale": v[:, None] for m, v in magnitudes.items()}}, dora)
    put("flux", "dora_over_inputs", {**named(pairs, "lora_unet_", alpha=1, **KOHYA), **{
        f"lora_unet_{m.replace('.', '_')}.dora_scale": random(1, 16) for m in pairs}}, None,
        refused="are not a triple")
    put("flux", "other_depth", {**ours, **named({"transformer_blocks.77.attn.to_q": pair((16, 16))}, "transformer.")},
        None, refused="transformer_blocks.77.attn.to_q is not a module of the model")
    put("flux", "oft", {f"lora_unet_{m.replace('.', '_')}.oft_blocks": random(4, 4, 4) for m in some}, None,
        refused="is of OFT")
    put("flux", "no_rows", named({"double_blocks.0.img_attn.qkv": pair((50, 16))}, "diffusion_model."), None,
        refused="whose rows are not")
    put("flux", "repeating_pattern", ours, None, metadata(alpha_pattern={"(a+)+": 1}), refused="groups that repeat")


def write_real():
    """Saved by diffusers' own FluxPipeline.save_lora_weights from layers that peft made."""
    targets = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_k_proj"]
    for name, settings in {
        "plain": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}, "encoder": {},
        "bias": {"lora_bias": True, "init_lora_weights": True},
        "patterns": {"rank_pattern": {"to_k": 4, "attn.to_v": 1}, "alpha_pattern": {"to_k": 32}},
        "regular_expressions": {"alpha_pattern": {r"transformer_blocks\.\d+\.attn\.to_q": 1},
                                "rank_pattern": {r"single_transformer_blocks.*to_v": 1}},
    }.items():
        torch.manual_seed(0)
        model = flux()
        for m, shape in SHAPES["flux"].items():
            model.get_submodule(m).weight.data.copy_(weight(shape))
        model.add_adapter(LoraConfig(**{"r": R, "lora_alpha": 8, "target_modules": targets,
                                        "init_lora_weights": "gaussian", **settings}))
        for n, p in model.named_parameters():
            if "lora_B" in n or "magnitude" in n:
                p.data += 0.1 * torch.randn_like(p)
        modules, extra = {"transformer": model}, {}
        if name == "encoder":
            encoder = clip()
            encoder.add_adapter(LoraConfig(r=1, lora_alpha=9, target_modules=["q_proj", "k_proj"]))
            modules["text_encoder"] = encoder
            extra["text_encoder_lora_layers"] = get_peft_model_state_dict(encoder)
        (OUT / "flux").mkdir(exist_ok=True)
        FluxPipeline.save_lora_weights(OUT / "flux", transformer_lora_layers=get_peft_model_state_dict(model),
                                       weight_name=f"real_{name}.safetensors", **extra,
                                       **_collate_lora_metadata(modules))
        layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, LoraLayer)}
        found = {}
        for n, layer in layers.items():
            layer.merge()
            found[n] = (layer.get_base_layer().weight.double() - weight(SHAPES["flux"][n])).detach()
        keep("flux", f"real_{name}", found)


def write_others():
    for family, begins in (("qwen_image", "transformer_blocks."), ("flux2", ""), ("sd3", "transformer_blocks.")):
        pairs = {m: pair(s) for m, s in SHAPES[family].items() if "transformer_blocks." in m and m.startswith(begins)}
        put(family, "diffusers", named(pairs, "transformer."), changes(pairs))
        put(family, "diffsynth", named(pairs, "", "lora_A.default.weight", "lora_B.default.weight"), changes(pairs))
        if family == "qwen_image":
            put(family, "aitoolkit", named(pairs, "diffusion_model."), changes(pairs))
            put(family, "lightning", named(pairs, "", "lora_down.weight", "lora_up.weight", 1), changes(pairs, 0.5))
            for name, begin in (("musubi", "lora_unet_"), ("lycoris", "lycoris_"), ("onetrainer", "lora_transformer_")):
                put(family, name, named(pairs, begin, alpha=1, **KOHYA), changes(pairs, 0.5))
            some = [m for m in pairs if SHAPES[family][m] == (16, 16)][:3]
            factors = {m: (random(4, 4), random(4, 4)) for m in some}
            put(family, "lokr_aitoolkit", {f"diffusion_model.{m}.lokr_w{k}": f[k - 1] for m, f in factors.items()
                                           for k in (1, 2)}, {m: torch.kron(*f).double() for m, f in factors.items()})
    mlp = {"img_mlp.0": "ff.linear_in", "img_mlp.2": "ff.linear_out", "txt_mlp.0": "ff_context.linear_in",
           "txt_mlp.2": "ff_context.linear_out"}
    layers = {f"double_blocks.0.{k}": [f"transformer_blocks.0.{m}" for m in v]
              for k, v in {**DOUBLE, **{k: [v] for k, v in mlp.items()}}.items()}
    layers |= {"single_blocks.0.linear1": ["single_transformer_blocks.0.attn.to_qkv_mlp_proj"],
               "single_blocks.0.linear2": ["single_transformer_blocks.0.attn.to_out"]}
    expected = {}
    pairs = fused("flux2", layers, expected)
    put("flux2", "aitoolkit", named(pairs, "diffusion_model."), expected)
    put("flux2", "kohya", named(pairs, "lora_unet_", alpha=1, **KOHYA), {m: 0.5 * c for m, c in expected.items()})
    layers = {f"joint_blocks.0.{k}": [f"transformer_blocks.0.{m}" for m in v] for k, v in {
        "x_block.attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"], "x_block.mlp.fc1": ["ff.net.0.proj"],
        "context_block.attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"]}.items()}
    expected = {}
    put("sd3", "kohya", named(fused("sd3", layers, expected), "lora_unet_", alpha=R, **KOHYA), expected)


def write_z_image():
    """By the names of ai-toolkit (de-distillation adapters of Turbo too), DiffSynth-Studio and musubi-tuner, and joined
    as in the publisher's file."""
    family, blocks = "z_image", ("layers", "noise_refiner", "context_refiner")
    pairs = {m: pair(s) for m, s in SHAPES[family].items() if m.startswith(blocks)}
    put(family, "diffusers", named(pairs, "transformer."), changes(pairs))
    put(family, "aitoolkit", named(pairs, "diffusion_model."), changes(pairs))
    put(family, "diffsynth", named(pairs, "", "lora_A.default.weight", "lora_B.default.weight"), changes(pairs))
    put(family, "musubi", named(pairs, "lora_unet_", alpha=1, **KOHYA), changes(pairs, 0.5))
    layers = {f"{b}.0.attention.{k}": [f"{b}.0.attention.{m}" for m in v] for b in blocks
              for k, v in {"qkv": ["to_q", "to_k", "to_v"], "out": ["to_out.0"]}.items()}
    expected = {}
    joined = fused(family, layers, expected)
    put(family, "comfy_original", named(joined, "diffusion_model.", "lora_down.weight", "lora_up.weight", 1),
        {m: 0.5 * c for m, c in expected.items()})


def clip():
    return CLIPTextModel(CLIPTextConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                        num_attention_heads=2, vocab_size=8))


def adapted(model, family, r, alpha, targets):
    """A model with a LoRA that peft made of random numbers, and what it does to each weight."""
    for name, shape in SHAPES[family].items() if family else ():
        model.get_submodule(name).weight.data.copy_(weight(shape))
    torch.manual_seed(0)
    model.add_adapter(LoraConfig(r=r, lora_alpha=alpha, target_modules=targets, init_lora_weights="gaussian"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLayer)}
    return model, {name: layer.get_delta_weight("default").detach() for name, layer in layers.items()}


SGM = {"input_blocks.4.1": "down_blocks.1.attentions.0", "input_blocks.8.1": "down_blocks.2.attentions.1",
       "middle_block.1": "mid_block.attentions.0", "output_blocks.0.1": "up_blocks.0.attentions.0",
       "output_blocks.5.1": "up_blocks.1.attentions.2"}  # of kohya's UNet, which is Stability AI's


def write_sdxl():
    """By diffusers' own code, in its names and in those that its training scripts write for kohya's; by the names of
    kohya's sd-scripts, of ComfyUI, and of diffusers before peft."""
    family, encoder = "sdxl", ["q_proj", "k_proj", "v_proj", "out_proj"]
    models, found = {}, {}
    for name, own, r, alpha, targets in (("unet", MODELS[family], R, 8, ["to_q", "to_k", "to_v", "to_out.0"]),
                                         ("text_encoder", clip(), 1, 3, encoder),
                                         ("text_encoder_2", clip(), 1, 5, encoder)):
        models[name], found[name] = adapted(own, family if name == "unet" else None, r, alpha, targets)
    (OUT / family).mkdir(exist_ok=True)
    states = {name: get_peft_model_state_dict(model) for name, model in models.items()}
    StableDiffusionXLPipeline.save_lora_weights(
        OUT / family, weight_name="real_three.safetensors", unet_lora_layers=states["unet"],
        text_encoder_lora_layers=states["text_encoder"], text_encoder_2_lora_layers=states["text_encoder_2"],
        **_collate_lora_metadata(models))
    keep(family, "real_three", found["unet"])
    state = convert_all_state_dict_to_peft({f"{model}.{key}": array for model, own in states.items()
                                            for key, array in own.items()})
    put(family, "real_kohya_format", convert_state_dict_to_kohya(state), {m: c / 4 for m, c in found["unet"].items()})

    layers = ["proj_in", "proj_out", *(f"transformer_blocks.0.{m}" for m in (
        "attn1.to_q", "attn1.to_out.0", "attn2.to_k", "attn2.to_v", "ff.net.0.proj", "ff.net.2"))]
    pairs = {f"{block}.{m}": pair(SHAPES[family][f"{ours}.{m}"]) for block, ours in SGM.items() for m in layers}
    expected = {f"{SGM[block]}.{m}": 0.5 * pairs[f"{block}.{m}"][1].double() @ pairs[f"{block}.{m}"][0].double()
                for block in SGM for m in layers}
    tensors = named(pairs, "lora_unet_", alpha=1, **KOHYA)
    for begin in ("lora_te1_", "lora_te2_"):
        tensors |= named({f"text_model.encoder.layers.0.{m}": pair((8, 8)) for m in (
            "self_attn.q_proj", "self_attn.out_proj", "mlp.fc1")}, begin, alpha=1, **KOHYA)
    read = _maybe_map_sgm_blocks_to_diffusers(dict(tensors), MODELS[family].config)
    read = {key.replace(".lora.", ".").removeprefix("unet."): array
            for key, array in _convert_non_diffusers_lora_to_diffusers(read)[0].items() if key.startswith("unet.")}
    assert {key.rsplit(".", 2)[0].replace("processor.", "").replace("_lora", "") for key in read} == {
        m.replace("to_out.0", "to_out") for m in expected}
    put(family, "kohya", tensors, expected, {"ss_network_module": "networks.lora", "ss_base_model_version":
                                             "sdxl_base_v1-0"})
    put(family, "comfy", named(pairs, "diffusion_model."), {m: 2 * c for m, c in expected.items()})
    old = {f"{SGM[block]}.{m.replace('attn1.to_q', 'attn1.processor.to_q_lora')}": pairs[f"{block}.{m}"]
           for block in SGM for m in layers if m.endswith("attn1.to_q")}
    put(family, "before_peft", named(old, "unet.", "down.weight", "up.weight"), {
        m: 2 * c for m, c in expected.items() if m.endswith("attn1.to_q")})
    convolution = {"lora_unet_input_blocks_1_0_in_layers_2.lora_down.weight": random(R, 8, 3, 3),
                   "lora_unet_input_blocks_1_0_in_layers_2.lora_up.weight": random(8, R, 1, 1),
                   "lora_unet_input_blocks_1_0_in_layers_2.alpha": torch.tensor(1.0)}
    put(family, "kohya_convolutions", {**tensors, **convolution}, None,
        refused="lora_unet_input_blocks_1_0_in_layers_2 is not a module of the model (it is "
                "down_blocks.0.resnets.0.conv1)")


WAN = {**{f"self_attn.{k}": f"attn1.{m}" for k, m in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"))},
       **{f"cross_attn.{k}": f"attn2.{m}" for k, m in zip("qkvo", ("to_q", "to_k", "to_v", "to_out.0"))},
       "cross_attn.k_img": "attn2.add_k_proj", "cross_attn.v_img": "attn2.add_v_proj",
       "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2"}


def write_wan():
    """By diffusers' own code; by the publisher's names behind the beginnings of ComfyUI and others, of DiffSynth-Studio
    and of musubi-tuner."""
    family = "wan"
    model, found = adapted(MODELS[family], family, R, 8, ["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj",
                                                          "ffn.net.2"])
    (OUT / family).mkdir(exist_ok=True)
    WanPipeline.save_lora_weights(OUT / family, weight_name="real_plain.safetensors",
                                  transformer_lora_layers=get_peft_model_state_dict(model),
                                  **_collate_lora_metadata({"transformer": model}))
    keep(family, "real_plain", found)
    pairs = {f"blocks.0.{k}": pair(SHAPES[family][f"blocks.0.{m}"]) for k, m in WAN.items()}
    expected = {f"blocks.0.{m}": pairs[f"blocks.0.{k}"][1].double() @ pairs[f"blocks.0.{k}"][0].double()
                for k, m in WAN.items()}
    halved = {m: 0.5 * c for m, c in expected.items()}
    comfy = named(pairs, "diffusion_model.")
    assert {key.removeprefix("transformer.").rsplit(".", 2)[0] for key in _convert_non_diffusers_wan_lora_to_diffusers(
        dict(comfy))} == expected.keys()
    put(family, "comfy", comfy, expected)
    put(family, "comfy_down_up", named(pairs, "diffusion_model.", "lora_down.weight", "lora_up.weight", 1), halved)
    put(family, "diffsynth", named(pairs, "", "lora_A.default.weight", "lora_B.default.weight"), expected)
    put(family, "musubi", named(pairs, "lora_unet_", alpha=1, **KOHYA), halved,
        {"ss_network_module": "networks.lora_wan"})


if __name__ == "__main__":
    write_flux()
    write_real()
    write_others()
    write_z_image()
    write_sdxl()
    write_wan()
    (OUT / "cases.json").write_text(json.dumps({"layers": SHAPES, "cases": CASES}, sort_keys=True) + "\n")
    print(len(CASES), "cases")
