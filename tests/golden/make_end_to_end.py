"""Make the reference cases from end to end: texts, image files, noise and draws, and what PyTorch makes of them.

    ms-diffsynth tiny flux models/flux        # also sd3, sdxl, flux2, qwen_image, z_image and ddpm_unet; seed 0
    python tests/golden/make_end_to_end.py models OUTPUT [flux flux_from_image sd3 sdxl flux2 flux2_dev qwen_image
                                                          z_image ddpm_unet]

Runs in a PyTorch environment; nothing of ms_diffsynth or mindone is imported, only the tiny weights are read. FLUX.1
and Stable Diffusion 3 need transformers 4.57 with ftfy, because their CLIP tokens are those of the slow CLIPTokenizer
with ftfy, which DiffSynth-Studio requires (diffusers 0.35.2 and 0.39.0); FLUX.2 and Qwen-Image were made with diffusers
0.42.1 and transformers 5. The layout of a case is in docs/explanation/parity.md. A new family is a subclass of
`Reference` and a line in `FAMILIES`.
"""
from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import torch
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_loss_weighting_for_sd3, compute_snr
from PIL import Image, ImageOps
from safetensors.numpy import load_file, save_file

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
diffusers.logging.set_verbosity_error()
STRIDE = 4  # of the recorded rows of a matrix, and of an image's lines
LEVELS = 1000
UPDATES = 5

TEXTS = {
    "plain": "a red cat by the sea",
    "empty_space": " ",
    "empty": "",
    "leading": "   a red cat",
    "trailing": "a red cat   ",
    "double": "a  red   cat",
    "upper": "A RED CAT BY THE SEA",
    "punct": "cat, dog; bird: fish! (fox) [wolf] {bear} - \"owl\" 'bee' ... ?!",
    "newline": "a cat\na dog\r\na bird\n\na fish",
    "tab": "a cat\tand\ta dog",
    "chinese": "一只红色的猫在海边，背景是日落。",
    "mixed": "a 猫 on a 桌子, 4k",
    "japanese": "赤い猫が海のそばにいる",
    "korean": "빨간 고양이",
    "arabic": "قطة حمراء",
    "emoji": "a cat 🐱 with hearts ❤️ and 👨\u200d👩\u200d👧\u200d👦",
    "curly": "a sign that says “hello world” and ‘bye’ – it’s fine…",
    "accents": "café naïve Zoë Ångström",
    "nfd": "cafe\u0301 nai\u0308ve",
    "fullwidth": "ＡＢＣ １２３",
    "numbers": "1234567890 3.14159 1,000,000",
    "url": "https://example.com/cat.png?x=1&y=2",
    "html": "a &amp; b &lt;c&gt; cat &quot;x&quot;",
    "markup": "<b>cat</b> & <i>dog</i>",
    "t5_eos": "a cat</s> and a dog",
    "t5_extra": "a <extra_id_0> cat <extra_id_1>",
    "t5_pad": "a <pad> cat <unk> dog",
    "clip_eos": "a cat<|endoftext|> and a dog",
    "clip_sot": "<|startoftext|>a cat",
    "qwen_im": "a cat<|im_end|>\n<|im_start|>system\nevil",
    "qwen_vis": "<|vision_start|><|image_pad|><|vision_end|> cat",
    "think": "<think>a cat</think>",
    "mistral": "[INST]a cat[/INST] </s>",
    "braces": "a {cat} {} {0} %s",
    "zero_width": "a\u200bcat\u00a0dog\ufeff",
    "control": "a cat\u0007 bell",
    "sks": "a photo of sks dog",
    "underscore": "a_b-c_d  __init__ snake_case",
    "long77": "a photo of " + ", ".join(f"cat number {i}" for i in range(30)),
    "long512": " ".join(["an extremely detailed painting of a landscape with mountains"] * 80),
    "long_chinese": "一只红色的猫在海边。" * 160,
    "exact75": " ".join(["cat"] * 75),
    "exact76": " ".join(["cat"] * 76),
    "exact511": " ".join(["cat"] * 511),
    "symbols": "∑∫√≠≤≥→←↑↓★☆♥",
    "cyrillic": "Красная кошка у моря",
    "math_bold": "𝓪 𝓬𝓪𝓽 𝔠𝔞𝔱",
    "ligature": "ﬁne oﬃce",
}
ENCODED = ("plain", "empty", "chinese", "emoji", "curly", "long77", "long512")
PAIR = ("plain", "curly")  # texts of two lengths, encoded as one batch
CHINESE = "一只红色的猫在海边 🐱"


# -- what every case holds -------------------------------------------------------------------------------------------


def digest(folder: Path) -> str:
    """SHA-256 over the settings and the tensors of a component, however its files are laid out."""
    found = hashlib.sha256(json.dumps(json.loads((folder / "config.json").read_text()), sort_keys=True).encode())
    tensors = {name: array for file in folder.glob("*.safetensors") for name, array in load_file(file).items()}
    for name in sorted(tensors):
        found.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode() + tensors[name].tobytes())
    return found.hexdigest()


def some_rows(count: int) -> list[int]:
    """The recorded token rows: the first sixteen, then every sixteenth, and the last."""
    return sorted({*range(min(count, 16)), *range(0, count, 16), count - 1})


def thin(array: np.ndarray) -> np.ndarray:
    """Every fourth row of a matrix."""
    return array[::STRIDE].copy() if array.ndim > 1 else array


class Case:
    """A case on its way to the disk."""

    def __init__(self, folder: Path, family: str, models: Path | None):
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "images").mkdir(parents=True)
        self.folder, self.inputs, self.expected = folder, {}, {}
        self.info = {"kind": "end_to_end", "family": family, "row_stride": STRIDE, "reference":
                     f"diffusers {diffusers.__version__}, transformers {transformers.__version__}, "
                     f"torch {torch.__version__}, seed 0"}
        if models is not None:
            components = sorted(file.parent for file in models.glob("*/config.json"))
            self.info["model"] = {"tiny_seed": 0, "digests": {c.name: digest(c) for c in components}}
        self.random = np.random.Generator(np.random.Philox(key=0))

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.random.standard_normal(shape, dtype=np.float32))

    def uniform(self, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self.random.random(shape, dtype=np.float32))

    def write(self) -> None:
        def arrays(tensors):
            found = {name: np.asarray(value) for name, value in tensors.items()}
            return {name: np.ascontiguousarray(a).reshape(a.shape) for name, a in found.items()}

        save_file(arrays(self.inputs), self.folder / "inputs.safetensors")
        save_file(arrays(self.expected), self.folder / "expected.safetensors")
        (self.folder / "case.json").write_text(json.dumps(self.info, indent=1, sort_keys=True) + "\n")
        if not any((self.folder / "images").iterdir()):
            (self.folder / "images").rmdir()
        size = sum(file.stat().st_size for file in self.folder.rglob("*") if file.is_file())
        sys.stdout.write(f"{self.folder.name}: {size / 1e6:.2f} MB\n")


def write_images(folder: Path) -> None:
    """Small image files of the kinds that are read differently: orientation, palette, gray, odd sides, progressive."""

    def waves(height, width, phase):
        y, x = np.mgrid[0:height, 0:width]
        channels = (np.sin(x / 7 + phase), np.cos(y / 5 + phase), np.sin((x + y) / 11 + phase))
        return Image.fromarray((127 + 120 * np.stack(channels, -1)).clip(0, 255).astype(np.uint8))

    turned = Image.Exif()
    turned[0x112] = 6  # to be turned by 90 degrees
    waves(97, 67, 0).save(folder / "turned.jpg", quality=90, exif=turned.tobytes())
    waves(61, 83, 1).convert("P", palette=Image.Palette.ADAPTIVE, colors=32).save(folder / "palette.png")
    waves(75, 50, 2).convert("L").save(folder / "gray.png")
    waves(33, 127, 3).save(folder / "wide.jpg", quality=85, progressive=True, subsampling=2)
    waves(96, 64, 4).save(folder / "edit.png")


def load(file: Path, height: int, width: int) -> Image.Image:
    """An image file upright, in RGB, resized to cover height x width and cut around its middle (DiffSynth-Studio)."""
    image = ImageOps.exif_transpose(Image.open(file)).convert("RGB")
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def to_pixels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image, np.float32)).permute(2, 0, 1)[None] / 127.5 - 1


def texts(case: Case, reference: Reference) -> None:
    """Token ids of every text, embeddings of some, and of two as one batch."""
    case.info |= {"max_sequence_length": reference.max_length, "encoded": list(ENCODED), "batch": list(PAIR),
                  "known_differences": reference.known_differences}
    (case.folder / "texts.json").write_text(json.dumps(TEXTS, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    ids = [reference.tokens(text) for text in TEXTS.values()]
    for slot in ids[0]:
        rows = [np.asarray(row[slot], np.int32) for row in ids]
        case.expected[f"tokens.{slot}"] = np.concatenate(rows)
        case.expected[f"lengths.{slot}"] = np.array([len(row) for row in rows], np.int32)
    for name in ENCODED:
        record(case, f"encoded.{name}", reference.encode([TEXTS[name]]), 0)
    both = reference.encode([TEXTS[name] for name in PAIR])
    for k, name in enumerate(PAIR):
        record(case, f"batch.{name}", both, k)


def record(case: Case, name: str, slots: dict[str, list[torch.Tensor]], row: int) -> None:
    for slot, values in slots.items():
        array = values[row].numpy()
        case.expected[f"{name}.{slot}"] = array[some_rows(len(array))] if array.ndim > 1 else array


def files(case: Case, reference: Reference, height: int = 64, width: int = 48) -> None:
    """Pixels and latents of every image file."""
    write_images(case.folder / "images")
    names = sorted(file.name for file in (case.folder / "images").iterdir())
    case.info["files"] = {"height": height, "width": width, "images": names}
    for name in names:
        image = load(case.folder / "images" / name, height, width)
        case.expected[f"pixels.{name}"] = np.asarray(image)[::STRIDE]
        case.expected[f"latents.{name}"] = reference.latents(to_pixels(image))


def schedules(case: Case, reference: Reference) -> None:
    """Sampling sigmas by the scheduler_config.json of a model folder that has one of its own."""
    case.info["schedules"] = []
    for name, config in reference.configs.items():
        for steps in (4, 9):
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
            arguments = {"mu": reference.mu(config, 16 * 24, steps)} if config["use_dynamic_shifting"] else {}
            reference.set_timesteps(scheduler, steps, **arguments)
            case.info["schedules"].append({"name": f"{name} {steps}", "scheduler_config": config, "height": 256,
                                           "width": 384, "num_inference_steps": steps})
            case.expected[f"sigmas.{name} {steps}"] = scheduler.sigmas


def samples(case: Case, reference: Reference) -> None:
    """Whole images by the reference's own pipeline, in 8 bits, and the sigmas it walked."""
    case.info["samples"] = reference.samples
    for sample in reference.samples:
        name, noise = sample["name"], case.normal(1, *reference.latent_shape(sample["height"], sample["width"]))
        edit = [load_whole(case.folder / "images" / sample["edit_image"])] if "edit_image" in sample else None
        case.inputs[f"noise.{name}"] = noise
        case.expected[f"image.{name}"] = np.asarray(reference.sample(SimpleNamespace(**sample), noise, edit))
        case.expected[f"sigmas.{name}"] = reference.pipe.scheduler.sigmas


def load_whole(file: Path) -> Image.Image:
    return ImageOps.exif_transpose(Image.open(file)).convert("RGB")


# -- training --------------------------------------------------------------------------------------------------------


def bell(sigmas: torch.Tensor) -> torch.Tensor:
    """DiffSynth-Studio's loss weights: a bell over the timesteps, its least value taken off, with mean 1."""
    timesteps = sigmas * LEVELS
    weights = torch.exp(-2 * ((timesteps - LEVELS / 2) / LEVELS) ** 2)
    weights = weights - weights.min()
    return weights * (LEVELS / weights.sum())


def exponential_shift(sigmas: torch.Tensor, mu: float) -> torch.Tensor:
    return math.exp(mu) / (math.exp(mu) + (1 / sigmas - 1))


def euler_grid(config: dict) -> torch.Tensor:
    """The training grid of diffusers' DreamBooth scripts: that of the model's scheduler, before any set_timesteps."""
    return FlowMatchEulerDiscreteScheduler.from_config(config).sigmas[:LEVELS].clone()


def train(case: Case, reference: Reference, run: dict) -> None:
    """Loss and gradients at the first micro-step, then five updates from image files and captions."""
    case.info.setdefault("training", []).append(run)
    run, name = SimpleNamespace(**run), run["name"]
    grid, weights = reference.grid(run)
    parameters, undo = reference.trained(case, run)
    optimizer = torch.optim.AdamW(parameters.values(), lr=run.learning_rate, weight_decay=run.weight_decay)
    rates = get_scheduler({"constant": "constant_with_warmup"}.get(run.lr_scheduler, run.lr_scheduler), optimizer,
                          num_warmup_steps=run.lr_warmup_steps, num_training_steps=UPDATES)
    ema = EMAModel(parameters.values(), decay=run.ema_decay) if run.ema_decay else None
    recorded: dict[str, list] = {key: [] for key in ("losses", "grad_norms", "learning_rates")}
    draws: list[dict[str, torch.Tensor]] = []

    def keep(kind, values):
        case.expected |= {f"{name}.{kind}.{key}": thin(value.detach().numpy().copy())
                          for key, value in zip(parameters, values)}

    for size in groups(run):
        losses = []
        for _ in range(size):
            rows = run.batches[len(draws)]
            draws.append(reference.draw(case, run, len(rows)))
            loss = reference.loss(case, run, [run.rows[k] for k in rows], draws[-1], grid, weights)
            (loss / size).backward()
            losses.append(loss.item())
            if len(draws) == 1:
                case.expected[f"{name}.first_loss"] = loss.detach()
                keep("grad", [size * gradient_of(p) for p in parameters.values()])
        for parameter in parameters.values():  # what the loss does not depend on has a gradient of zero, not none
            parameter.grad = gradient_of(parameter)
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), run.max_grad_norm)
        for key, value in zip(recorded, (np.mean(losses), norm.item(), rates.get_last_lr()[0])):
            recorded[key].append(value)
        optimizer.step()
        rates.step()
        optimizer.zero_grad()
        if ema:
            ema.step(parameters.values())
            if len(recorded["losses"]) == 1:
                keep("ema_first", ema.shadow_params)
    keep("trained", parameters.values())
    if ema:
        keep("ema", ema.shadow_params)
    case.inputs |= {f"{name}.{key}": torch.stack([d[key] for d in draws]) for key in draws[0]}
    case.expected |= {f"{name}.{key}": np.array(values, np.float32) for key, values in recorded.items()}
    case.expected[f"{name}.grid.sigmas"] = grid
    if weights is not None:
        case.expected[f"{name}.grid.weights"] = weights
    undo()


def gradient_of(parameter: torch.Tensor) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def groups(run: SimpleNamespace) -> list[int]:
    """Micro-steps of every update: the last group of an epoch is what is left of it."""
    found, left = [], 0
    while len(found) < UPDATES:
        left = left or run.batches_per_epoch
        found.append(min(run.gradient_accumulation_steps, left))
        left -= found[-1]
    return found


def settings(name: str, task: str, **given) -> dict:
    """A training run: two rows a micro-step unless ``batches`` says otherwise."""
    defaults = {
        "height": 64, "width": 48, "max_sequence_length": 48, "weighting_scheme": "diffsynth", "posterior": "mean",
        "guidance_scale": 1.0, "prior_loss_weight": None, "extra_inputs": None, "lora_rank": 2, "lora_alpha": 3.0,
        "learning_rate": 2e-3, "weight_decay": 0.1, "max_grad_norm": 0.5, "lr_scheduler": "constant",
        "lr_warmup_steps": 0, "gradient_accumulation_steps": 1, "batches_per_epoch": 100, "loss_scale": 1.0,
        "ema_decay": None, "batches": [[0, 1], [2, 3], [1, 2], [3, 0], [0, 2]]}
    return {"name": name, "task": task} | defaults | given


ROWS = [
    {"image": "turned.jpg", "prompt": "a photo of sks dog"},
    {"image": "palette.png", "prompt": "a sign that says “sks” – it’s a dog, by the sea, in the evening, in color"},
    {"image": "gray.png", "prompt": "一只狗在海边，背景是日落"},
    {"image": "wide.jpg", "prompt": "sks"},
]
PRIOR = [*ROWS[:2], {"image": "gray.png", "prompt": "a photo of a dog"}, {"image": "wide.jpg", "prompt": "a dog"}]


# -- families --------------------------------------------------------------------------------------------------------


class Reference:
    """What a family's reference implementation computes. Latents are those of the product: [B, C, H, W], normalised.

    Attributes:
        folder: of the tiny model; None where the case holds its own.
        max_length: tokens of a prompt.
        known_differences: slot -> texts whose ids are not compared, because transformers' own tokenizers disagree.
        configs: scheduler_config.json of the models of this family; the first is the default.
        targets: ends of the names of the linear layers that get a LoRA.
        samples: whole images.
        runs: training runs.
    """

    family: str
    folder: str | None
    max_length: int
    known_differences: dict[str, list[str]] = {}
    configs: dict[str, dict] = {}
    targets: tuple[str, ...] = ()
    samples: list[dict] = []
    runs: tuple[dict, ...] = ()

    def __init__(self, models: Path):
        raise NotImplementedError

    def make(self, case: Case) -> None:
        texts(case, self)
        self.make_more(case)
        files(case, self)
        schedules(case, self)
        samples(case, self)
        for run in self.runs:
            train(case, self, run)

    def make_more(self, case: Case) -> None:
        """What this family alone records, behind its texts."""

    def tokens(self, text: str) -> dict[str, list[int]]:
        raise NotImplementedError

    def encode(self, prompts: list[str], length: int | None = None) -> dict[str, list[torch.Tensor]]:
        """Slot -> a tensor for each prompt, without padding that the product leaves away."""
        raise NotImplementedError

    def latents(self, pixels: torch.Tensor, posterior_noise: torch.Tensor | None = None) -> torch.Tensor:
        raise NotImplementedError

    def velocity(self, latents: torch.Tensor, sigma: torch.Tensor, rows: list[dict], run: SimpleNamespace,
                 folder: Path) -> torch.Tensor:
        raise NotImplementedError

    def grid(self, run: SimpleNamespace) -> tuple[torch.Tensor, torch.Tensor]:
        """Sigmas and loss weights: DiffSynth-Studio's for sft, diffusers' for dreambooth."""
        if run.task == "sft":
            sigmas = self.diffsynth_grid()
            return sigmas, bell(sigmas)
        sigmas = euler_grid(next(iter(self.configs.values())))
        return sigmas, compute_loss_weighting_for_sd3(run.weighting_scheme, sigmas=sigmas)

    def diffsynth_grid(self) -> torch.Tensor:
        raise NotImplementedError

    def set_timesteps(self, scheduler: FlowMatchEulerDiscreteScheduler, steps: int, **mu: float) -> None:
        """As the family's pipeline of diffusers does."""
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps), **mu)

    def draw(self, case: Case, run: SimpleNamespace, count: int) -> dict[str, torch.Tensor]:
        shape = self.latent_shape(run.height, run.width)
        draws = {"noise": case.normal(count, *shape), "density_draw": case.uniform(count)}
        return draws | ({"posterior_noise": case.normal(count, *shape)} if run.posterior == "sample" else {})

    def trained(self, case: Case, run: SimpleNamespace):
        """A LoRA from the draws of the case, put on by hooks: its tensors by name, and what takes it off again."""
        parameters, hooks = {}, []
        self.network.requires_grad_(False)
        for name, module in self.network.named_modules():
            if isinstance(module, torch.nn.Linear) and any(name == t or name.endswith("." + t) for t in self.targets):
                a = torch.nn.Parameter(case.normal(run.lora_rank, module.in_features) / module.in_features**0.5)
                b = torch.nn.Parameter(0.05 * case.normal(module.out_features, run.lora_rank))
                parameters |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
                scale = run.lora_alpha / run.lora_rank
                hooks.append(module.register_forward_hook(
                    lambda m, i, out, a=a, b=b, scale=scale: out + scale * (i[0] @ a.T @ b.T)))
        case.inputs |= {f"{run.name}.lora.{name}": p.detach().numpy().copy() for name, p in parameters.items()}
        return parameters, lambda: [hook.remove() for hook in hooks]

    def loss(self, case: Case, run: SimpleNamespace, rows: list[dict], draws: dict, grid: torch.Tensor,
             weights: torch.Tensor) -> torch.Tensor:
        folder = case.folder / "images"
        images = [load(folder / row["image"], run.height, run.width) for row in rows]
        with torch.no_grad():
            clean = self.latents(torch.cat([to_pixels(image) for image in images]), draws.get("posterior_noise"))
        index = (draws["density_draw"] * LEVELS).long().clamp(max=LEVELS - 1)
        sigma, noise = grid[index], draws["noise"]
        s = sigma.view(-1, 1, 1, 1)
        velocity = self.velocity((1 - s) * clean + s * noise, sigma, rows, run, folder)
        losses = ((velocity.float() - (noise - clean)) ** 2).flatten(1).mean(1) * weights[index]
        if run.prior_loss_weight is None:
            return losses.mean()
        instances, images = losses.chunk(2)
        return instances.mean() + run.prior_loss_weight * images.mean()


def dynamic(**changes) -> dict:
    """A scheduler_config.json of flow matching; FLUX.1-dev's unless something is changed."""
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.35.2", "base_image_seq_len": 256,
            "base_shift": 0.5, "max_image_seq_len": 4096, "max_shift": 1.15, "num_train_timesteps": LEVELS,
            "shift": 3.0, "use_dynamic_shifting": True} | changes


def linear_mu(config: dict, tokens: int, steps: int) -> float:
    """mu of the exponential shift, on the line through the two points of the scheduler's configuration."""
    slope = (config["max_shift"] - config["base_shift"]) / (config["max_image_seq_len"] - config["base_image_seq_len"])
    return tokens * slope + config["base_shift"] - slope * config["base_image_seq_len"]


def pack(latents: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] -> [B, H W / 4, 4 C]: 2x2 patches as tokens."""
    b, c, h, w = latents.shape
    patches = latents.view(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, h // 2 * (w // 2), 4 * c)


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    b, _, c = tokens.shape
    patches = tokens.view(b, height // 2, width // 2, c // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, c // 4, height, width)


def sized(name: str, prompt: str, height: int, width: int, steps: int, cfg_scale: float = 1.0, negative: str = "",
          **more) -> dict:
    return {"name": name, "prompt": prompt, "negative_prompt": negative, "cfg_scale": cfg_scale, "height": height,
            "width": width, "num_inference_steps": steps} | more


def check_slow_clip() -> None:
    """CLIP's tokens are those of transformers 4's slow CLIPTokenizer with ftfy."""
    import ftfy  # noqa: F401 without it the slow tokenizer gives other ids

    if not transformers.__version__.startswith("4."):
        raise SystemExit("CLIP's tokens are those of transformers 4's slow CLIPTokenizer: use 4.57.")


class Flux(Reference):
    """FLUX.1-dev: transformers' slow CLIPTokenizer with ftfy, T5TokenizerFast, FluxPipeline."""

    family, folder, max_length = "flux", "flux", 512
    known_differences = {"t5_ids": ["mistral"]}  # a blank before "</s>": T5Tokenizer and T5TokenizerFast differ
    configs = {"dev": dynamic(), "schnell": dynamic(shift=1.0, use_dynamic_shifting=False)}
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
               "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
               "ff_context.net.2")
    samples = [sized("plain", "a red cat by the sea", 128, 128, 4, embedded_guidance=3.5),
               sized("negative", "a red cat by the sea", 96, 160, 5, 4.0, "ugly, blurry image of a dog",
                     embedded_guidance=3.5),
               sized("chinese", CHINESE, 64, 96, 3, 3.0, embedded_guidance=2.0)]
    mu = staticmethod(linear_mu)
    sft = settings("sft", "sft", lr_scheduler="linear", lr_warmup_steps=1, rows=ROWS)
    runs = (settings(
        "dreambooth", "dreambooth", weighting_scheme="cosmap", posterior="sample", guidance_scale=3.5,
        prior_loss_weight=0.7, lr_scheduler="cosine", gradient_accumulation_steps=2, batches_per_epoch=3,
        loss_scale=64.0, ema_decay=0.9, rows=PRIOR, instances=2,
        batches=[[0, 2], [1, 3], [0, 3], [1, 2], [0, 2], [1, 3], [1, 2], [0, 3]]), sft)

    def __init__(self, models: Path):
        check_slow_clip()
        from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
        from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        m = models / self.folder
        self.network = FluxTransformer2DModel.from_pretrained(m / "transformer").eval()
        self.vae = AutoencoderKL.from_pretrained(m / "vae").eval()
        self.pipe = FluxPipeline(
            FlowMatchEulerDiscreteScheduler.from_config(dynamic()), self.vae,
            CLIPTextModel.from_pretrained(m / "text_encoder").eval(), CLIPTokenizer.from_pretrained(m / "tokenizer"),
            T5EncoderModel.from_pretrained(m / "text_encoder_2").eval(),
            T5TokenizerFast.from_pretrained(m / "tokenizer_2"), self.network)

    def make_more(self, case: Case) -> None:
        """T5's embeddings of 150 ids, and the bucket of every distance up to 150."""
        from transformers.models.t5.modeling_t5 import T5Attention

        ids = torch.from_numpy(case.random.integers(3, 32000, (1, 150)).astype(np.int32))
        clip = torch.from_numpy(np.array([self.tokens("a red cat")["clip_ids"]], np.int32))
        with torch.no_grad():
            hidden = self.pipe.text_encoder_2(ids)[0][0]
            pooled = self.pipe.text_encoder(clip.long()).pooler_output[0]
        case.info["given"] = ["t5_150"]
        case.inputs |= {"t5_150.t5_ids": ids, "t5_150.clip_ids": clip}
        record(case, "given.t5_150", {"prompt_embeds": [hidden], "pooled_prompt_embeds": [pooled]}, 0)
        case.expected["t5.buckets"] = T5Attention._relative_position_bucket(
            torch.arange(-150, 150), bidirectional=True, num_buckets=32, max_distance=128).int()

    def tokens(self, text):
        def ids(tokenizer, length):
            return tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids

        return {"clip_ids": ids(self.pipe.tokenizer, 77), "t5_ids": ids(self.pipe.tokenizer_2, self.max_length)}

    @torch.no_grad()
    def encode(self, prompts, length=None):
        embeds, pooled, _ = self.pipe.encode_prompt(prompts, prompts, max_sequence_length=length or self.max_length)
        return {"prompt_embeds": list(embeds), "pooled_prompt_embeds": list(pooled)}

    @torch.no_grad()
    def latents(self, pixels, posterior_noise=None):
        posterior, config = self.vae.encode(pixels).latent_dist, self.vae.config
        drawn = posterior.mean if posterior_noise is None else posterior.mean + posterior.std * posterior_noise
        return (drawn - config.shift_factor) * config.scaling_factor

    def latent_shape(self, height, width):
        return (16, height // 8, width // 8)

    def sample(self, s, noise, edit):
        with torch.no_grad():
            return self.pipe(s.prompt, negative_prompt=s.negative_prompt, true_cfg_scale=s.cfg_scale,
                             guidance_scale=s.embedded_guidance, height=s.height, width=s.width, latents=pack(noise),
                             num_inference_steps=s.num_inference_steps, max_sequence_length=self.max_length).images[0]

    def velocity(self, latents, sigma, rows, run, folder):
        slots = self.encode([row["prompt"] for row in rows], run.max_sequence_length)
        height, width = latents.shape[2:]
        places = torch.zeros(height // 2, width // 2, 3)
        places[..., 1] += torch.arange(height // 2)[:, None]
        places[..., 2] += torch.arange(width // 2)[None]
        tokens = self.network(
            hidden_states=pack(latents), timestep=sigma, guidance=torch.full_like(sigma, run.guidance_scale),
            pooled_projections=torch.stack(slots["pooled_prompt_embeds"]),
            encoder_hidden_states=torch.stack(slots["prompt_embeds"]), txt_ids=torch.zeros(run.max_sequence_length, 3),
            img_ids=places.reshape(-1, 3), return_dict=False)[0]
        return unpack(tokens, height, width)

    def diffsynth_grid(self):
        sigmas = torch.linspace(1.0, 0.003 / 1.002, LEVELS)
        return 3 * sigmas / (1 + 2 * sigmas)


class FluxFromImage(Flux):
    """FLUX.1-dev from an image and a prompt: FluxImg2ImgPipeline, with the mean of the VAE's posterior.

    A sample holds no noise of its own for the posterior, and what trains and samples here is the mean.
    """

    samples = [sized(f"strength {strength}", "a red cat by the sea", 64, 96, 10, embedded_guidance=3.5,
                     input_image="palette.png", denoising_strength=strength) for strength in (0.3, 0.6, 1.0)]
    samples.append(sized("negative", "a red cat by the sea", 96, 64, 7, 3.0, "ugly, blurry image of a dog",
                         embedded_guidance=2.0, input_image="palette.png", denoising_strength=0.5))

    def make(self, case):
        from diffusers import FluxImg2ImgPipeline
        from diffusers.pipelines.flux import pipeline_flux_img2img as module

        write_images(case.folder / "images")
        for file in (case.folder / "images").iterdir():
            if file.name not in {sample["input_image"] for sample in self.samples}:
                file.unlink()
        self.case, self.pipe = case, FluxImg2ImgPipeline(**self.pipe.components)
        self.pipe.set_progress_bar_config(disable=True)
        retrieve = module.retrieve_latents
        module.retrieve_latents = lambda encoded, generator=None: retrieve(encoded, generator, "argmax")
        module.randn_tensor = lambda *shape, **given: self.noise
        case.info["max_sequence_length"] = self.max_length
        samples(case, self)
        for sample in self.samples:  # the steps that were left out are not walked
            steps, strength = sample["num_inference_steps"], sample["denoising_strength"]
            _, kept = self.pipe.get_timesteps(steps, strength, "cpu")
            sigmas = case.expected[f"sigmas.{sample['name']}"]
            case.expected[f"sigmas.{sample['name']}"] = sigmas[-kept - 1:]

    @torch.no_grad()
    def sample(self, s, noise, edit):
        self.noise = noise
        tokens = self.pipe(s.prompt, negative_prompt=s.negative_prompt, true_cfg_scale=s.cfg_scale,
                           image=load_whole(self.case.folder / "images" / s.input_image),
                           strength=s.denoising_strength, guidance_scale=s.embedded_guidance, height=s.height,
                           width=s.width, num_inference_steps=s.num_inference_steps, output_type="latent",
                           max_sequence_length=self.max_length).images
        latents, config = unpack(tokens, s.height // 8, s.width // 8), self.vae.config
        self.case.expected[f"final.{s.name}"] = latents
        pixels = self.vae.decode(latents / config.scaling_factor + config.shift_factor).sample
        return self.pipe.image_processor.postprocess(pixels, output_type="pil")[0]


class Sd3(Flux):
    """Stable Diffusion 3: transformers' slow CLIPTokenizers with ftfy, T5TokenizerFast, StableDiffusion3Pipeline."""

    family, folder, max_length = "sd3", "sd3", 256
    configs = {"sd3": dynamic(use_dynamic_shifting=False), "dynamic": dynamic()}
    targets = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
               "attn.add_v_proj", "attn.to_add_out")
    samples = [sized("plain", "a red cat by the sea", 128, 128, 4),
               sized("negative", "a red cat by the sea", 96, 160, 4, 7.0, "ugly, blurry image of a dog"),
               sized("chinese", CHINESE, 64, 96, 2, 3.0)]

    runs = (settings("dreambooth", "dreambooth", weighting_scheme="none", posterior="sample", lr_scheduler="cosine",
                     rows=ROWS), Flux.sft)

    def __init__(self, models: Path):
        check_slow_clip()
        from diffusers import AutoencoderKL, SD3Transformer2DModel, StableDiffusion3Pipeline
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

        m = models / self.folder
        self.network = SD3Transformer2DModel.from_pretrained(m / "transformer").eval()
        self.vae = AutoencoderKL.from_pretrained(m / "vae").eval()
        self.pipe = StableDiffusion3Pipeline(
            transformer=self.network, vae=self.vae,
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(self.configs["sd3"]),
            text_encoder=CLIPTextModelWithProjection.from_pretrained(m / "text_encoder").eval(),
            tokenizer=CLIPTokenizer.from_pretrained(m / "tokenizer"),
            text_encoder_2=CLIPTextModelWithProjection.from_pretrained(m / "text_encoder_2").eval(),
            tokenizer_2=CLIPTokenizer.from_pretrained(m / "tokenizer_2"),
            text_encoder_3=T5EncoderModel.from_pretrained(m / "text_encoder_3").eval(),
            tokenizer_3=T5TokenizerFast.from_pretrained(m / "tokenizer_3"))

    def make_more(self, case: Case) -> None:
        """Nothing beside what all record."""

    def tokens(self, text):
        pipe = self.pipe
        given = {"clip_l_ids": (pipe.tokenizer, 77), "clip_g_ids": (pipe.tokenizer_2, 77),
                 "t5_ids": (pipe.tokenizer_3, self.max_length)}
        return {slot: tokenizer(text, padding="max_length", max_length=length, truncation=True).input_ids
                for slot, (tokenizer, length) in given.items()}

    @torch.no_grad()
    def encode(self, prompts, length=None):
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, None, None, do_classifier_free_guidance=False,
                                                       max_sequence_length=length or self.max_length)
        return {"prompt_embeds": list(embeds), "pooled_prompt_embeds": list(pooled)}

    @torch.no_grad()
    def sample(self, s, noise, edit):
        return self.pipe(s.prompt, negative_prompt=s.negative_prompt, guidance_scale=s.cfg_scale, height=s.height,
                         width=s.width, latents=noise, num_inference_steps=s.num_inference_steps,
                         max_sequence_length=self.max_length).images[0]

    def set_timesteps(self, scheduler, steps, **mu):
        scheduler.set_timesteps(steps, **mu)

    def velocity(self, latents, sigma, rows, run, folder):
        slots = self.encode([row["prompt"] for row in rows], run.max_sequence_length)
        return self.network(
            hidden_states=latents, timestep=sigma * LEVELS, encoder_hidden_states=torch.stack(slots["prompt_embeds"]),
            pooled_projections=torch.stack(slots["pooled_prompt_embeds"]), return_dict=False)[0]


class Sdxl(Sd3):
    """Stable Diffusion XL: transformers' slow CLIPTokenizers with ftfy, StableDiffusionXLPipeline, and training of the
    noise, with its offset and min-SNR weights."""

    family, folder, max_length = "sdxl", "sdxl", None
    configs = {"leading": {}, "trailing": {"timestep_spacing": "trailing"},
               "linspace": {"timestep_spacing": "linspace"},
               "v": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}}
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    samples = [sized("plain", "a red cat by the sea", 128, 128, 4, 5.0, None),
               sized("negative", "a red cat by the sea", 96, 160, 4, 7.0, "ugly, blurry image of a dog"),
               sized("chinese", CHINESE, 64, 96, 3),
               sized("linspace", "a dog", 64, 64, 5, 3.0, "", scheduler_config=configs["linspace"]),
               sized("v", "a dog", 64, 64, 5, 3.0, None, scheduler_config=configs["v"])]
    runs = (settings("sft", "sft", height=64, width=96, max_sequence_length=None, posterior="sample", rows=ROWS,
                     lr_scheduler="cosine", objective={}),
            settings("options", "sft", height=96, width=64, max_sequence_length=None, posterior="sample", rows=ROWS,
                     objective={"noise_offset": 0.05, "snr_gamma": 5.0, "prediction_type": "v_prediction"}))

    def __init__(self, models: Path):
        check_slow_clip()
        from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
        from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

        m = models / self.folder
        self.config = json.loads((m / "scheduler/scheduler_config.json").read_text())
        self.network = UNet2DConditionModel.from_pretrained(m / "unet").eval()
        self.vae = AutoencoderKL.from_pretrained(m / "vae").eval()
        self.pipe = StableDiffusionXLPipeline(
            unet=self.network, vae=self.vae, scheduler=EulerDiscreteScheduler.from_config(self.config),
            text_encoder=CLIPTextModel.from_pretrained(m / "text_encoder").eval(),
            tokenizer=CLIPTokenizer.from_pretrained(m / "tokenizer"),
            text_encoder_2=CLIPTextModelWithProjection.from_pretrained(m / "text_encoder_2").eval(),
            tokenizer_2=CLIPTokenizer.from_pretrained(m / "tokenizer_2"), add_watermarker=False)

    def make(self, case: Case) -> None:
        from diffusers import EulerDiscreteScheduler

        texts(case, self)
        files(case, self, 64, 96)
        case.info["schedules"] = []
        for name, config in self.configs.items():
            for steps in (4, 9):
                scheduler = EulerDiscreteScheduler.from_config(self.config | config)
                scheduler.set_timesteps(steps)
                case.info["schedules"].append({"name": f"{name} {steps}", "scheduler_config": config, "height": 256,
                                               "width": 384, "num_inference_steps": steps})
                case.expected[f"sigmas.{name} {steps}"] = scheduler.sigmas
        samples(case, self)
        for run in self.runs:
            train(case, self, run)

    def tokens(self, text):
        tokenizers = {"clip_l_ids": self.pipe.tokenizer, "clip_g_ids": self.pipe.tokenizer_2}
        return {slot: tokenizer(text, padding="max_length", max_length=77, truncation=True).input_ids
                for slot, tokenizer in tokenizers.items()}

    @torch.no_grad()
    def encode(self, prompts, length=None):
        embeds, _, pooled, _ = self.pipe.encode_prompt(prompts, do_classifier_free_guidance=False)
        return {"prompt_embeds": list(embeds), "pooled_prompt_embeds": list(pooled)}

    @torch.no_grad()
    def latents(self, pixels, posterior_noise=None):
        posterior = self.vae.encode(pixels).latent_dist
        drawn = posterior.mean if posterior_noise is None else posterior.mean + posterior.std * posterior_noise
        return drawn * self.vae.config.scaling_factor

    def latent_shape(self, height, width):
        return (4, height // 8, width // 8)

    @torch.no_grad()
    def sample(self, s, noise, edit):
        from diffusers import EulerDiscreteScheduler

        self.pipe.scheduler = EulerDiscreteScheduler.from_config(self.config | getattr(s, "scheduler_config", {}))
        return self.pipe(s.prompt, negative_prompt=s.negative_prompt, guidance_scale=s.cfg_scale, height=s.height,
                         width=s.width, latents=noise, num_inference_steps=s.num_inference_steps).images[0]

    def draw(self, case, run, count):
        further = {"noise_offset_draw": case.normal(count, 4, 1, 1)} if run.objective.get("noise_offset") else {}
        return super().draw(case, run, count) | further

    def grid(self, run):
        from diffusers import DDPMScheduler

        kind = run.objective.get("prediction_type", "epsilon")
        self.scheduler = DDPMScheduler.from_config(self.config, prediction_type=kind)
        return (1 - self.scheduler.alphas_cumprod) ** 0.5, None

    def loss(self, case, run, rows, draws, grid, weights):
        images = [load(case.folder / "images" / row["image"], run.height, run.width) for row in rows]
        clean = self.latents(torch.cat([to_pixels(image) for image in images]), draws["posterior_noise"])
        sizes = torch.tensor([[*framing(case.folder / "images" / row["image"], run.height, run.width), run.height,
                               run.width] for row in rows], dtype=torch.float32)
        index = (draws["density_draw"] * LEVELS).long()
        noise = draws["noise"] + run.objective.get("noise_offset", 0.0) * draws.get("noise_offset_draw", 0.0)
        slots = self.encode([row["prompt"] for row in rows])
        prediction = self.network(
            self.scheduler.add_noise(clean, noise, index), index, torch.stack(slots["prompt_embeds"]),
            added_cond_kwargs={"text_embeds": torch.stack(slots["pooled_prompt_embeds"]), "time_ids": sizes}).sample
        is_v = self.scheduler.config.prediction_type == "v_prediction"
        target = self.scheduler.get_velocity(clean, noise, index) if is_v else noise
        losses = ((prediction - target) ** 2).flatten(1).mean(1)
        if gamma := run.objective.get("snr_gamma"):
            snr = compute_snr(self.scheduler, index)
            losses = losses * snr.clamp(max=gamma) / (snr + 1 if is_v else snr)
        return losses.mean()


def framing(file: Path, height: int, width: int) -> tuple[int, int, int, int]:
    """Height and width of an upright image, and where its part begins in what it is scaled to."""
    w, h = load_whole(file).size
    scale = max(width / w, height / h)
    return h, w, round((round(h * scale) - height) / 2), round((round(w * scale) - width) / 2)


class Flux2(Reference):
    """FLUX.2-klein: Qwen2TokenizerFast with Qwen3's later tokens and template, Flux2KleinPipeline."""

    family, folder, max_length = "flux2", "flux2", 512
    configs = {"klein": dynamic(time_shift_type="exponential")}
    targets = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "linear_in",
               "linear_out", "to_qkv_mlp_proj", "attn.to_out")
    samples = [sized("plain", "a red cat by the sea", 128, 128, 4),
               sized("negative", "a red cat by the sea", 96, 160, 5, 4.0, "ugly, blurry image of a dog"),
               sized("chinese", CHINESE, 64, 96, 3, 3.0),
               sized("edit", "make it red", 64, 64, 3, edit_image="edit.png")]
    # what Qwen3's own chat template makes of messages without tools
    template = ("{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' + message.content + "
                "'<|im_end|>' + '\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
                "{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}"
                "{%- endif %}{%- endif %}")
    runs = (settings("sft", "sft", lr_scheduler="constant", lr_warmup_steps=1, rows=ROWS),
            settings("edit", "sft", extra_inputs="edit_image", lr_scheduler="cosine",
                     rows=[{**row, "edit_image": before["image"]} for row, before in zip(ROWS, (ROWS[-1], *ROWS))]))

    def __init__(self, models: Path):
        from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline, Flux2Transformer2DModel
        from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

        m = models / self.folder
        tokenizer = Qwen2TokenizerFast.from_pretrained(m / "tokenizer")
        tokenizer.add_tokens(["<tool_response>", "</tool_response>", "<think>", "</think>"])
        tokenizer.chat_template = self.template
        encoder = Qwen3ForCausalLM.from_pretrained(m / "text_encoder").eval()
        count = encoder.config.num_hidden_layers
        self.layers = (count // 4, count // 2, 3 * count // 4)
        self.network = Flux2Transformer2DModel.from_pretrained(m / "transformer").eval()
        self.vae = AutoencoderKLFlux2.from_pretrained(m / "vae").eval()
        self.pipe = Flux2KleinPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(dynamic()), vae=self.vae, text_encoder=encoder,
            tokenizer=tokenizer, transformer=self.network)

    @staticmethod
    def mu(config: dict, tokens: int, steps: int) -> float:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return compute_empirical_mu(tokens, steps)

    def tokens(self, text):
        tokenizer = self.pipe.tokenizer
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                             add_generation_prompt=True, enable_thinking=False)
        found = tokenizer(text, padding="max_length", max_length=self.max_length, truncation=True)
        return {"prompt_ids": found.input_ids, "prompt_mask": found.attention_mask}

    @torch.no_grad()
    def encode(self, prompts, length=None):
        embeds = self.pipe.encode_prompt(prompt=prompts, max_sequence_length=length or self.max_length,
                                         text_encoder_out_layers=self.layers)[0]
        return {"prompt_embeds": list(embeds)}

    @torch.no_grad()
    def latents(self, pixels, posterior_noise=None):
        mode, norm = self.vae.encode(pixels).latent_dist.mode(), self.vae.bn
        b, c, h, w = mode.shape
        patches = mode.view(b, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4).reshape(b, 4 * c, h // 2, w // 2)
        deviation = torch.sqrt(norm.running_var + self.vae.config.batch_norm_eps)
        return (patches - norm.running_mean.view(1, -1, 1, 1)) / deviation.view(1, -1, 1, 1)

    def latent_shape(self, height, width):
        return (128, height // 16, width // 16)

    @torch.no_grad()
    def sample(self, s, noise, edit):
        negative = {}
        if s.negative_prompt:
            negative["negative_prompt_embeds"] = self.encode([s.negative_prompt])["prompt_embeds"][0][None]
        return self.pipe(image=edit, prompt=s.prompt, guidance_scale=s.cfg_scale, height=s.height, width=s.width,
                         latents=noise, num_inference_steps=s.num_inference_steps, max_sequence_length=self.max_length,
                         text_encoder_out_layers=self.layers, **negative).images[0]

    def velocity(self, latents, sigma, rows, run, folder):
        embeds = torch.stack(self.encode([row["prompt"] for row in rows], run.max_sequence_length)["prompt_embeds"])
        text = torch.zeros(1, embeds.shape[1], 4)
        text[0, :, 3] = torch.arange(embeds.shape[1])
        tokens, places = [latents.flatten(2).transpose(1, 2)], [self.places(*latents.shape[2:], 0)]
        if run.extra_inputs == "edit_image":
            edit = [load(folder / row["edit_image"], run.height, run.width) for row in rows]
            edit = self.latents(torch.cat([to_pixels(image) for image in edit]))
            tokens.append(edit.flatten(2).transpose(1, 2))
            places.append(self.places(*edit.shape[2:], 10))
        out = self.network(hidden_states=torch.cat(tokens, 1), timestep=sigma, guidance=None,
                           encoder_hidden_states=embeds, txt_ids=text.expand(len(rows), -1, -1),
                           img_ids=torch.cat(places, 1).expand(len(rows), -1, -1), return_dict=False)[0]
        return out[:, :tokens[0].shape[1]].transpose(1, 2).reshape(latents.shape)

    @staticmethod
    def places(height: int, width: int, time: int) -> torch.Tensor:
        """Where the tokens of an image lie: (time, row, column, 0); edit images lie at time 10, 20, ..."""
        places = torch.zeros(height, width, 4)
        places[..., 0] = time
        places[..., 1] += torch.arange(height)[:, None]
        places[..., 2] += torch.arange(width)[None]
        return places.reshape(1, -1, 4)

    def diffsynth_grid(self):
        return exponential_shift(torch.linspace(1.0, 1 / LEVELS, LEVELS), 0.8)


class Flux2Dev(Flux2):
    """FLUX.2-dev's text encoder: transformers' Mistral on the template of the tokenizer; both are in the case."""

    folder = None
    config = {"model_type": "mistral", "vocab_size": 384, "hidden_size": 32, "intermediate_size": 64,
              "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
              "hidden_act": "silu", "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 1e9,
              "sliding_window": None}
    # the first twenty tokens of Mistral's tokenizers since v7, in their order
    special = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]",
               "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]", "[IMG_END]", "[PREFIX]", "[MIDDLE]",
               "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[TOOL_CONTENT]")
    # what Mistral-Small-3.1's chat template does with one system and one user message
    template = ("{{- bos_token }}{{- '[SYSTEM_PROMPT]' + messages[0]['content'][0]['text'] + '[/SYSTEM_PROMPT]' }}"
                "{%- for message in messages[1:] %}{{- '[INST]' }}{%- for block in message['content'] %}"
                "{{- block['text'] }}{%- endfor %}{{- '[/INST]' }}{%- endfor %}")

    def __init__(self, models: Path):
        from transformers import MistralConfig, MistralModel

        self.model = MistralModel(MistralConfig(**self.config)).eval()
        count = self.config["num_hidden_layers"]
        self.layers = (count // 4, count // 2, 3 * count // 4)

    def make(self, case: Case) -> None:
        self.write_model(case)
        texts(case, self)

    def write_model(self, case: Case) -> None:
        """The lower three quarters of a Mistral with random weights, by the names of FLUX.2-dev's files."""
        from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        bpe.train_from_iterator([SYSTEM_MESSAGE], trainers.BpeTrainer(
            vocab_size=self.config["vocab_size"], special_tokens=list(self.special), show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet())))
        self.tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>",
            padding_side="left", chat_template=self.template)
        self.tokenizer.save_pretrained(case.folder / "tokenizer")
        settings = case.folder / "tokenizer" / "tokenizer_config.json"
        named = json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}  # 4 knows it too
        settings.write_text(json.dumps(named, indent=1) + "\n")
        weights = {}
        for name, weight in self.model.state_dict().items():
            if weight.ndim > 1:
                weight.copy_(case.normal(*weight.shape) / weight.shape[1] ** 0.5)
            if not name.startswith(("norm.", "layers.3.")):
                weights[f"language_model.model.{name}"] = weight.numpy()
        folder = case.folder / "text_encoder"
        folder.mkdir()
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        config = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3",
                  "image_token_index": 10, "text_config": self.config, "vision_config": {"model_type": "pixtral"}}
        (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
        (case.folder / "model_index.json").write_text(json.dumps({"_class_name": "Flux2Pipeline"}) + "\n")

    def padded(self, prompts: list[str], length: int):
        from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE, format_input

        messages = format_input(prompts=prompts, system_message=SYSTEM_MESSAGE)
        return self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=False, tokenize=True, return_dict=True, return_tensors="pt",
            padding="max_length", truncation=True, max_length=length)

    def tokens(self, text):
        found = self.padded([text], self.max_length)
        return {"prompt_ids": found["input_ids"][0], "prompt_mask": found["attention_mask"][0]}

    @torch.no_grad()
    def encode(self, prompts, length=None):
        found = self.padded(prompts, length or self.max_length)
        states = self.model(input_ids=found["input_ids"], attention_mask=found["attention_mask"], use_cache=False,
                            output_hidden_states=True).hidden_states
        return {"prompt_embeds": list(torch.cat([states[k] for k in self.layers], -1))}


class QwenImage(Reference):
    """Qwen-Image: Qwen2TokenizerFast, QwenImagePipeline with 1024 text tokens."""

    family, folder, max_length = "qwen_image", "qwen_image", 1024
    configs = {"base": dynamic(shift=1.0, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02,
                               time_shift_type="exponential"),
               "lightning": dynamic(shift=1.0, base_shift=math.log(3), max_shift=math.log(3), max_image_seq_len=8192,
                                    shift_terminal=None, time_shift_type="exponential")}
    targets = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out",
               "img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1")
    samples = [sized("plain", "a red cat by the sea", 128, 128, 4),
               sized("negative", "a red cat by the sea", 96, 160, 5, 4.0, "ugly, blurry image of a dog"),
               sized("chinese", CHINESE, 64, 96, 3, 3.0)]
    mu = staticmethod(linear_mu)
    template = ("<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
                "spatial relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
                "<|im_start|>assistant\n")
    dropped = 34  # tokens of the template in front of the prompt
    runs = (settings("sft", "sft", lr_scheduler="linear", lr_warmup_steps=1, max_grad_norm=0.3,
                     gradient_accumulation_steps=2, max_sequence_length=None, rows=ROWS,
                     batches=[[0, 1], [2, 3], [1, 2], [3, 0], [0, 2], [1, 3], [2, 1], [0, 3], [0, 1], [2, 3]]),)

    def __init__(self, models: Path):
        from diffusers import AutoencoderKLQwenImage, QwenImagePipeline, QwenImageTransformer2DModel
        from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2TokenizerFast

        m = models / self.folder
        self.network = QwenImageTransformer2DModel.from_pretrained(m / "transformer").eval()
        self.vae = AutoencoderKLQwenImage.from_pretrained(m / "vae").eval()
        self.pipe = QwenImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(self.configs["base"]), vae=self.vae,
            text_encoder=Qwen2_5_VLForConditionalGeneration.from_pretrained(m / "text_encoder").eval(),
            tokenizer=Qwen2TokenizerFast.from_pretrained(m / "tokenizer"), transformer=self.network)

    def tokens(self, text):
        ids = self.pipe.tokenizer(self.template.format(text), max_length=self.max_length + self.dropped,
                                  truncation=True).input_ids
        return {"prompt_ids": ids[self.dropped:]}

    @torch.no_grad()
    def encode(self, prompts, length=None):
        embeds, mask = self.pipe.encode_prompt(prompt=prompts, max_sequence_length=self.max_length)
        counts = [embeds.shape[1]] * len(prompts) if mask is None else mask.sum(1).tolist()
        return {"prompt_embeds": [row[:int(count)] for row, count in zip(embeds, counts)]}

    @torch.no_grad()
    def latents(self, pixels, posterior_noise=None):
        mode, config = self.vae.encode(pixels[:, :, None]).latent_dist.mode()[:, :, 0], self.vae.config
        mean, deviation = (torch.tensor(values).view(1, -1, 1, 1) for values in (config.latents_mean,
                                                                                config.latents_std))
        return (mode - mean) / deviation

    def latent_shape(self, height, width):
        return (16, height // 8, width // 8)

    @torch.no_grad()
    def sample(self, s, noise, edit):
        return self.pipe(s.prompt, negative_prompt=s.negative_prompt, true_cfg_scale=s.cfg_scale, height=s.height,
                         width=s.width, latents=pack(noise), num_inference_steps=s.num_inference_steps,
                         max_sequence_length=self.max_length).images[0]

    def velocity(self, latents, sigma, rows, run, folder):
        """Each row alone, so that no text is padded."""
        height, width = latents.shape[2:]
        found = []
        for k, row in enumerate(rows):
            embeds = self.encode([row["prompt"]])["prompt_embeds"][0][None]
            tokens = self.network(hidden_states=pack(latents[k:k + 1]), timestep=sigma[k:k + 1],
                                  encoder_hidden_states=embeds, encoder_hidden_states_mask=None,
                                  img_shapes=[[(1, height // 2, width // 2)]], return_dict=False)[0]
            found.append(unpack(tokens, height, width))
        return torch.cat(found)

    def diffsynth_grid(self):
        rest = 1 - exponential_shift(torch.linspace(1.0, 0.0, LEVELS + 1)[:-1], 0.8)
        return 1 - rest / (rest[-1] / (1 - 0.02))


class ZImage(Reference):
    """Z-Image: Qwen2TokenizerFast with Qwen3's later tokens and template, ZImagePipeline."""

    family, folder, max_length = "z_image", "z_image", 512
    configs = {"base": dynamic(shift=6.0, use_dynamic_shifting=False),
               "turbo": dynamic(shift=3.0, use_dynamic_shifting=False)}
    targets = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
    samples = [sized("plain", "a red cat by the sea", 128, 128, 4),
               sized("negative", "a red cat by the sea", 96, 160, 5, 4.0, "ugly, blurry image of a dog"),
               sized("chinese", CHINESE, 64, 96, 3, 3.0)]
    template = Flux2.template
    runs = (settings("sft", "sft", lr_scheduler="constant", lr_warmup_steps=1, rows=ROWS),
            settings("dreambooth", "dreambooth", weighting_scheme="none", posterior="sample", lr_scheduler="linear",
                     rows=ROWS))

    def __init__(self, models: Path):
        from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
        from transformers import Qwen2TokenizerFast, Qwen3ForCausalLM

        m = models / self.folder
        tokenizer = Qwen2TokenizerFast.from_pretrained(m / "tokenizer")
        tokenizer.add_tokens(["<tool_response>", "</tool_response>", "<think>", "</think>"])
        tokenizer.chat_template = self.template
        self.network = ZImageTransformer2DModel.from_pretrained(m / "transformer").eval()
        self.vae = AutoencoderKL.from_pretrained(m / "vae").eval()
        self.pipe = ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(self.configs["base"]), vae=self.vae,
            text_encoder=Qwen3ForCausalLM.from_pretrained(m / "text_encoder").eval(), tokenizer=tokenizer,
            transformer=self.network)

    def tokens(self, text):
        tokenizer = self.pipe.tokenizer
        text = tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False,
                                             add_generation_prompt=True, enable_thinking=True)
        found = tokenizer(text, max_length=self.max_length, truncation=True)
        return {"prompt_ids": found.input_ids, "prompt_mask": found.attention_mask}

    @torch.no_grad()
    def encode(self, prompts, length=None):
        embeds, _ = self.pipe.encode_prompt(list(prompts), do_classifier_free_guidance=False,
                                            max_sequence_length=length or self.max_length)
        return {"prompt_embeds": embeds}

    @torch.no_grad()
    def sample(self, s, noise, edit):
        return self.pipe(s.prompt, negative_prompt=s.negative_prompt, guidance_scale=s.cfg_scale - 1, height=s.height,
                         width=s.width, latents=noise, num_inference_steps=s.num_inference_steps,
                         max_sequence_length=self.max_length).images[0]

    def velocity(self, latents, sigma, rows, run, folder):
        embeds = self.encode([row["prompt"] for row in rows], run.max_sequence_length)["prompt_embeds"]
        found = self.network([image[:, None] for image in latents], 1 - sigma, embeds, return_dict=False)[0]
        return -torch.stack(list(found))[:, :, 0]

    latents, latent_shape = Flux.latents, Flux.latent_shape

    def diffsynth_grid(self):
        sigmas = torch.linspace(1.0, 0.0, LEVELS + 1)[:-1]
        return 3 * sigmas / (1 + 2 * sigmas)


class DdpmUnet(Reference):
    """A UNet on pixels: DDIMScheduler, DDPMScheduler, and training of every weight on the noise."""

    family, folder = "ddpm_unet", "ddpm_unet"
    trailing = {"timestep_spacing": "trailing"}
    samples = [
        {"name": "ddim", "height": 32, "width": 32, "sampler": "ddim", "num_inference_steps": 10, "eta": 0.0},
        {"name": "ddim eta", "height": 40, "width": 24, "sampler": "ddim", "num_inference_steps": 5, "eta": 0.5},
        {"name": "ddpm", "height": 32, "width": 32, "sampler": "ddpm", "num_inference_steps": 8, "eta": 0.0},
        {"name": "ddpm trailing", "height": 24, "width": 24, "sampler": "ddpm", "num_inference_steps": 7, "eta": 0.0,
         "scheduler_config": trailing},
        {"name": "ddim trailing", "height": 24, "width": 24, "sampler": "ddim", "num_inference_steps": 7, "eta": 0.0,
         "scheduler_config": trailing}]

    def __init__(self, models: Path):
        from diffusers import UNet2DModel

        self.network = UNet2DModel.from_pretrained(models / self.folder / "unet").eval()
        self.config = json.loads((models / self.folder / "scheduler/scheduler_config.json").read_text())

    def make(self, case: Case) -> None:
        files(case, self, 32, 32)
        case.info["samples"] = self.samples
        for sample in self.samples:
            self.sample(case, SimpleNamespace(**{"scheduler_config": {}} | sample))
        train(case, self, settings("ddpm", "sft", height=32, width=32, lora_rank=None, lr_scheduler="cosine",
                                   learning_rate=1e-3, max_grad_norm=1.0, rows=ROWS))

    def latents(self, pixels, posterior_noise=None):
        return pixels

    def latent_shape(self, height, width):
        return (3, height, width)

    def sample(self, case: Case, s: SimpleNamespace) -> None:
        from diffusers import DDIMScheduler, DDPMScheduler
        from diffusers.schedulers import scheduling_ddpm

        scheduler = (DDIMScheduler if s.sampler == "ddim" else DDPMScheduler).from_config(
            self.config | s.scheduler_config)
        scheduler.set_timesteps(s.num_inference_steps)
        x = case.normal(1, 3, s.height, s.width)
        case.inputs[f"noise.{s.name}"] = x
        noise = case.normal(s.num_inference_steps, *x.shape) if s.eta or s.sampler == "ddpm" else None
        if noise is not None:
            case.inputs[f"step_noise.{s.name}"] = noise
        for k, t in enumerate(scheduler.timesteps):
            with torch.no_grad():
                prediction = self.network(x, t).sample
            if s.sampler == "ddim":
                given = {} if noise is None else {"variance_noise": noise[k]}
                x = scheduler.step(prediction, t, x, eta=s.eta, **given).prev_sample
            else:
                scheduling_ddpm.randn_tensor = lambda *_, k=k, **__: noise[k]  # the only door for given noise
                x = scheduler.step(prediction, t, x).prev_sample
        image = (x[0] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()
        case.expected[f"image.{s.name}"] = (image * 255).round().astype(np.uint8)

    def grid(self, run):
        from diffusers import DDPMScheduler

        self.alphas = DDPMScheduler.from_config(self.config).alphas_cumprod
        return (1 - self.alphas) ** 0.5, None

    def trained(self, case, run):
        self.network.requires_grad_(True)
        return dict(self.network.named_parameters()), lambda: None

    def loss(self, case, run, rows, draws, grid, weights):
        images = [load(case.folder / "images" / row["image"], run.height, run.width) for row in rows]
        clean = torch.cat([to_pixels(image) for image in images])
        index = (draws["density_draw"] * LEVELS).long()
        a = self.alphas[index].view(-1, 1, 1, 1)
        prediction = self.network(a**0.5 * clean + (1 - a) ** 0.5 * draws["noise"], index).sample
        return ((prediction - draws["noise"]) ** 2).mean()


FAMILIES = {"flux": Flux, "flux_from_image": FluxFromImage, "sd3": Sd3, "sdxl": Sdxl, "flux2": Flux2,
            "flux2_dev": Flux2Dev, "qwen_image": QwenImage, "z_image": ZImage, "ddpm_unet": DdpmUnet}


def main(models: str, output: str, *names: str) -> None:
    """Make the named cases, or all."""
    for name in names or FAMILIES:
        torch.manual_seed(0)
        reference = FAMILIES[name](Path(models))
        if hasattr(reference, "pipe"):
            reference.pipe.set_progress_bar_config(disable=True)
        folder = Path(models) / reference.folder if reference.folder else None
        case = Case(Path(output) / f"{name}_end_to_end", reference.family, folder)
        reference.make(case)
        case.write()


if __name__ == "__main__":
    main(*sys.argv[1:])
