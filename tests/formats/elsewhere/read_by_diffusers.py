"""Load what write.py wrote by diffusers: LoRAs (the change of every weight, and the same image) and whole pipelines.

    python tests/formats/elsewhere/read_by_diffusers.py OUT [MODEL ...]       (an environment with torch and diffusers)

Prints the largest difference of the change of any weight for each layout, and of any pixel of 255, with and without the
LoRA. Text encoders are left out: what they make of the prompt is given. FLUX.1's converter of original names has the
widths 3072 and 12288 of the real model in its code; here they are replaced by those of the tiny one.
"""
from __future__ import annotations

import copy
import inspect
import json
import sys
import warnings
from pathlib import Path

import diffusers
import huggingface_hub
import peft
import torch
import transformers
from diffusers.loaders import lora_conversion_utils as converters
from safetensors.torch import load_file

STEPS, FRAMES = 4, 5
DEFAULTS = {"qwen_image": "comfy", "z_image": "comfy", "wan": "comfy", "sdxl": "kohya"}  # the layout that is saved


def pipeline(model: Path):
    """Of a folder, without text encoders. Raises: AttributeError for a class that this diffusers does not have."""
    index = json.loads((model / "model_index.json").read_text())
    made = {name: getattr(diffusers, index[name][1]).from_pretrained(model / name)
            for name in (network_of(index), "vae", "scheduler")}
    if index["_class_name"] == "WanPipeline":
        made["scheduler"] = EulerOfWan(shift=made["scheduler"].config.flow_shift)
    cls = getattr(diffusers, index["_class_name"])
    given = dict.fromkeys(n for n in inspect.signature(cls.__init__).parameters
                          if n.startswith(("text_enc", "tokenizer", "processor")))
    return cls(**given, **made)


class EulerOfWan(diffusers.FlowMatchEulerDiscreteScheduler):
    """The steps that are taken here, on the levels of the UniPC that diffusers takes."""

    def set_timesteps(self, num_inference_steps, device=None):
        super().set_timesteps(sigmas=torch.linspace(1, 1e-3, num_inference_steps + 1)[:-1].tolist(), device=device)


def network_of(names) -> str:
    return "unet" if "unet" in names else "transformer"


def network(pipe) -> torch.nn.Module:
    return getattr(pipe, network_of(pipe.components))


def packed(noise: torch.Tensor) -> torch.Tensor:
    """[1, C, H, W] as [1, H/2 W/2, 4 C]."""
    b, c, h, w = noise.shape
    return noise.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


@torch.no_grad()
def image(name: str, pipe, given: dict[str, torch.Tensor]) -> torch.Tensor:
    noise, how = given["noise"], {"prompt_embeds": given["prompt_embeds"]}
    if name in ("flux", "sd3", "sdxl"):
        how["pooled_prompt_embeds"] = given["pooled_prompt_embeds"]
    if name == "qwen_image":
        mask = given["prompt_mask"]  # prompts are padded with zeros
        length = int(mask.sum())
        how |= {"prompt_embeds": given["prompt_embeds"][:, :length], "true_cfg_scale": 1.0,
                "prompt_embeds_mask": torch.ones(1, length, dtype=torch.long)}
    if name == "z_image":
        how["prompt_embeds"] = [given["prompt_embeds"][0, :int(given["prompt_mask"].sum())]]
    how["guidance_scale"] = {"flux": 3.5, "z_image": 0.0}.get(name, 1.0)
    how["latents"] = packed(noise) if name in ("flux", "qwen_image") else noise
    how |= {"num_frames": FRAMES} if name == "wan" else {}
    made = pipe(height=64, width=64, num_inference_steps=STEPS, output_type="np", **how)[0][0]
    return (torch.as_tensor(made) * 255).round().to(torch.uint8)


def changes(pipe, file: Path, before: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> str:
    """What loading and fusing a file changes."""
    try:
        pipe.load_lora_weights(file.parent, weight_name=file.name)
        if not pipe.get_list_adapters():
            return "none"
        pipe.fuse_lora()
        pipe.unload_lora_weights()
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0][:90]}"
    after, worst, found = network(pipe).state_dict(), 0.0, 0
    for key, array in before.items():
        change, wanted = after[key].double() - array.double(), expected.get(key.removesuffix(".weight"))
        found += bool(change.abs().max() > 0)
        if wanted is not None or change.abs().max() > 0:
            worst = max(worst, float((change - (0 if wanted is None else wanted.double())).abs().max()))
    return f"{worst:.0e} ({found} of {len(expected)} layers)"


def read(name: str, out: Path) -> None:
    expected, has_images = load_file(out / "expected.safetensors"), (out / "images.safetensors").exists()
    try:
        base = pipeline(out / "model")
    except AttributeError as error:
        print(f"{name:20} {error}", flush=True)
        return
    base.set_progress_bar_config(disable=True)
    before = {k: v.clone() for k, v in network(base).state_dict().items()}
    made = {}
    if has_images:
        given, images = (load_file(out / f"{kind}.safetensors") for kind in ("given", "images"))
        made["without"] = image(name, base, given)
    for file in sorted(out.glob("lora-*.safetensors")):
        pipe = copy.deepcopy(base)
        print(f"{name:20} {file.stem:16} {changes(pipe, file, before, expected)}", flush=True)
        if has_images and file.stem == f"lora-{DEFAULTS.get(name, 'diffusers')}":
            made["with"] = image(name, pipe, given)
    if has_images:
        told = [f"{which} {int((made[which].int() - images[which].int()).abs().max())}" for which in made]
        effect = int((made["with"].int() - made["without"].int()).abs().max())
        print(f"{name:20} largest difference of a pixel: {', '.join(told)}; the LoRA changes up to {effect}",
              flush=True)
    # Qwen-Image's tiny text encoder has no vision tower, for which transformers would make one of the real size
    without = {"text_encoder": None} if name.startswith("qwen_image") else {}
    without |= {"processor": None} if name.startswith("qwen_image_edit") else {}  # nor does it come with one
    try:
        whole = diffusers.DiffusionPipeline.from_pretrained(out / "run/model", **without)
    except Exception as error:
        print(f"{name:20} run/model: {type(error).__name__}: {str(error).splitlines()[0][:200]}", flush=True)
        return
    is_same = all(torch.equal(array, before[key]) for key, array in network(whole).state_dict().items())
    print(f"{name:20} run/model is a {type(whole).__name__}; its network is the same: {is_same}", flush=True)


def use_tiny_widths() -> None:
    """FLUX.1's tiny network has the width 128."""
    for function in ("_convert_bfl_flux_control_lora_to_diffusers", "_convert_kohya_flux_lora_to_diffusers"):
        source = inspect.getsource(getattr(converters, function))
        exec(source.replace("3072", "128").replace("12288", "512"), converters.__dict__)
    from diffusers.loaders import lora_pipeline
    lora_pipeline._convert_kohya_flux_lora_to_diffusers = converters._convert_kohya_flux_lora_to_diffusers


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    print(", ".join(f"{m.__name__} {m.__version__}" for m in (diffusers, transformers, huggingface_hub, peft, torch)))
    use_tiny_widths()
    for family in sys.argv[2:] or sorted(path.name for path in Path(sys.argv[1]).iterdir()):
        read(family, Path(sys.argv[1]) / family)
