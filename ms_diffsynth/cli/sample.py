"""``ms-diffsynth sample``: images or videos from a model, with or without a LoRA."""
from __future__ import annotations

import argparse
import contextlib
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ms_diffsynth import __version__
from ms_diffsynth.cli.template import add_trust_flags
from ms_diffsynth.config import SAMPLE_OVERRIDES, load_config, prompts_of
from ms_diffsynth.config.flags import model_path_and_factor, path_argument
from ms_diffsynth.config.setting import out_of_range
from ms_diffsynth.config.settings import SETTINGS
from ms_diffsynth.data.prompts import prompt_problem
from ms_diffsynth.diffusion.schedule import check_strength
from ms_diffsynth.errors import ConfigError, DataError, HubError, OutputError, listing, naming, nearest, shortened
from ms_diffsynth.formats.json_text import NotJSON, parse_json, read_json
from ms_diffsynth.formats.weights import read_header
from ms_diffsynth.hub.bundled import bundled, names
from ms_diffsynth.pipelines.shared.tiles import Tiles
from ms_diffsynth.progress import Progress, is_terminal
from ms_diffsynth.redact import redact
from ms_diffsynth.registry import FAMILIES, family, family_of

if TYPE_CHECKING:
    import numpy as np

    from ms_diffsynth.config import TrainConfig

ON_A_HUB = re.compile(r"(?:hf:|ms:)?[\w][\w.-]*/[\w][\w.-]*(?:@[\w./-]+)?")
INDEX_FILE = "model_index.json"
RANGES = {name: SETTINGS[name].metadata["range"] for name in ("num_inference_steps", "height", "width", "fps",
                                                              "max_sequence_length", "edit_max_pixels")} | {
    "num_frames": "1 <= num_frames <= 100000",
    "seed": "0 <= seed <= 9223372036854775807", "count": "1 <= count <= 65536",
    "lora_scale": "-1000 <= lora_scale <= 1000", "cfg_scale": "0 <= cfg_scale <= 1000",
    "embedded_guidance": "0 <= embedded_guidance <= 1000", "conditioning_scale": "-1000 <= conditioning_scale <= 1000",
    "control_mode": SETTINGS["control_mode"].metadata["range"]}
CONTROL = ("control_image", "control_mask", "conditioning_scale", "control_range", "control_mode")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, prompts, and how to sample."""
    parser.usage = "ms-diffsynth sample [FAMILY] MODEL [--prompt PROMPT] [--flag value ...]"
    parser.add_argument("model", nargs="*", type=path_argument, metavar="MODEL",
                        help="folder of a diffusers-format model; emoji-flux, which the package brings; or owner/name "
                             "(ms:owner/name) of one on a hub; before it, "
                             f"where the model does not tell its family, one of {', '.join(sorted(FAMILIES))}")
    parser.add_argument("--run", type=path_argument, metavar="FOLDER",
                        help="folder of a run, in place of MODEL: its base model with what it saved last")
    parser.add_argument("--step", type=int, metavar="N", help="with --run: what it saved after step N")
    parser.add_argument("--prompt", action="append",
                        help="may be given several times (default with --run: its sample_prompts)")
    parser.add_argument("--count", type=int, help="how many, of a family without prompts (default: 16)")
    parser.add_argument("--weights", type=path_argument,
                        help="weights that full training saved, for the models they are of")
    parser.add_argument("--negative_prompt", help="what cfg_scale leads away from")
    parser.add_argument("--lora", action="append", default=[], type=model_path_and_factor,
                        metavar="[MODEL=]FILE[:FACTOR]",
                        help="file of a LoRA, or of another adapter, of any program, and its factor (1); may be "
                             "given several times; the model that it is for (dit2=FILE) where its names tell not")
    parser.add_argument("--lora_scale", type=float, help="a further factor on all of them (default: 1)")
    parser.add_argument("--template", action="append", default=[],
                        help="folder of a template, or owner/name: on a hub; several times for several")
    parser.add_argument("--template_inputs", metavar="JSON",
                        help='JSON list of template inputs, e.g. [{"scale": 0.5}]; "model_id" counts the templates')
    parser.add_argument("--negative_template_inputs", metavar="JSON", help="the same, for the negative prompt")
    add_trust_flags(parser)
    parser.add_argument("--height", type=int, help="pixels (default: the family's)")
    parser.add_argument("--width", type=int, help="pixels (default: the family's)")
    parser.add_argument("--num_frames", type=int, help="of a video (default: the family's)")
    parser.add_argument("--fps", type=float, help="frames a second at which a video is saved (default: the model's)")
    parser.add_argument("--input_image", type=path_argument, metavar="FILE",
                        help="start from this image instead of from noise alone; height and width are then its own")
    parser.add_argument("--edit_image", action="append", default=[], type=path_argument, metavar="FILE",
                        help="edit this image, or use it as a reference; several times for several, in their order; "
                             "height and width are then those of the first, or as the family says")
    parser.add_argument("--edit_max_pixels", type=int, help="most pixels of such an image (default: 1048576)")
    parser.add_argument("--edit_template", help="how Qwen-Image-Edit is shown it: first, or plus as -2509 and -2511 "
                                                "(default: as the model's files tell)")
    parser.add_argument("--controlnet", metavar="FOLDER", help="a ControlNet, or owner/name: of one on a hub "
                        "(default with --run: the run's)")
    parser.add_argument("--control_image", action="append", default=[], type=path_argument, metavar="FILE",
                        help="draw after this image, such as edges, or fill the hole in it; several times for several")
    parser.add_argument("--control_mask", type=path_argument, metavar="FILE", help="where the hole is: white")
    parser.add_argument("--conditioning_scale", type=float, help="how strong a ControlNet is (default: 1)")
    parser.add_argument("--control_range", nargs=2, type=float, metavar=("BEGIN", "END"),
                        help="the part of the steps in which control images are read (default: 0 1)")
    parser.add_argument("--control_mode", type=int, help="which kind of control image it is, of a union of ControlNets "
                                                         "(default: 0)")
    parser.add_argument("--denoising_strength", type=float,
                        help="how much of it is made anew: above 0, at most 1 = all (default: 1)")
    parser.add_argument("--tiled", action="store_true", help="the VAE works in tiles, to save memory")
    parser.add_argument("--tile_size", type=int, help="side of a tile in latent pixels, 8 pixels each (default: 128)")
    parser.add_argument("--tile_stride", type=int, help="from one tile to the next (default: half of tile_size)")
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the next ones add 1 (default: 0)")
    parser.add_argument("--num_inference_steps", type=int, help="sampling steps (default: the family's)")
    parser.add_argument("--sampler", help="one of the family's samplers (default: its first)")
    parser.add_argument("--cfg_scale", type=float, help="two-branch guidance, 1 is off (default: the family's)")
    parser.add_argument("--embedded_guidance", type=float,
                        help="told to guidance-distilled models (default: the family's)")
    parser.add_argument("--fp8_models", metavar="MODELS", help="models whose linear layers are stored in 8 bits, with "
                        "commas, after LoRAs are added (default with --run: the run's)")
    parser.add_argument("--max_sequence_length", type=int, help="text tokens a prompt is padded or cut to")
    parser.add_argument("--mode", default="graph", help="graph or pynative (default: graph)")
    parser.add_argument("--device", help="CPU or Ascend (default: what is there)")
    parser.add_argument("--output", type=path_argument, default=Path("samples"), help="folder (default: samples)")


def execute(args: argparse.Namespace) -> int:
    """Generate the images or videos, and write each when it is there."""
    if args.step is not None and not args.run:
        raise ConfigError(f"step={args.step} without --run: expected the run whose weights of that step are meant.")
    if args.run and args.model:
        raise ConfigError(f"--run {args.run} with {listing(args.model)}: expected a run or a model. Remove one.")
    if not args.run and not args.model:
        raise ConfigError("no model: expected MODEL, a folder, or --run FOLDER, a run.")
    args.own = []  # what each image has of its own
    base = _of_run(args) if args.run and not (args.run / "model_index.json").is_file() else None
    _check(args)
    if base is None:
        args.family, args.model = _family_and_model(args.model or [args.run])
    chosen = family(args.family)
    from ms_diffsynth import runtime
    from ms_diffsynth.nn.quant import store_models_8bit
    from ms_diffsynth.run.pipeline import open_pipeline

    runtime.configure(args.mode, args.device)
    cls = chosen.pipeline
    if chosen.takes_prompts and not args.prompt:
        raise ConfigError(f"no prompt: images of the family {args.family} follow one. Give --prompt.")
    of_others = ("count",) if chosen.takes_prompts else (
        "prompt", "negative_prompt", "lora", "template", "cfg_scale", "embedded_guidance", "input_image", "edit_image",
        "edit_max_pixels", "edit_template", "tiled", "fp8_models", "controlnet", *CONTROL)
    of_others += ("num_frames", "fps") if cls.medium != "video" else ()
    unused = [name for name in of_others if getattr(args, name) not in (None, [], False)]
    if unused:
        raise ConfigError(f"{', '.join(unused)}: the family {args.family} has no use for it. Remove it.")
    cls.check_sampler(args.sampler)
    pipe = open_pipeline(args.family, device=args.device, max_sequence_length=args.max_sequence_length,
                         edit_max_pixels=args.edit_max_pixels, edit_template=args.edit_template,
                         control_mode=args.control_mode, **({"models": str(args.model)} | (base or {}) | (
                             {"controlnet": args.controlnet} if args.controlnet else {})))
    if args.embedded_guidance is not None and not pipe.takes_guidance:
        raise ConfigError(f"embedded_guidance={args.embedded_guidance}: this model is told none. Remove it, or use "
                          "--cfg_scale.")
    if args.weights:
        loaded = pipe.load_weights(args.weights)
        sys.stderr.write(f"{args.weights}: {', '.join(f'{n} tensors of {model}' for model, n in loaded.items())}\n")
    for model, path, factor in args.lora:
        scale = factor * (1.0 if args.lora_scale is None else args.lora_scale)
        fused = pipe.load_lora(model, path, scale)
        sys.stderr.write(f"{path}: fused into {fused} layers{'' if scale == 1 else f', {scale:g} times'}\n")
    if args.fp8_models:
        names = [pipe.given_as.get(name.strip(), name.strip()) for name in args.fp8_models.split(",")]
        store_models_8bit(pipe, ",".join(names))
    bar = Progress(is_terminal())
    pipe.announce = bar.announce if bar.enabled else pipe.announce
    calls = _calls(args)
    if args.prompt:
        images = partial(_with_prompts, args, pipe, calls, bar)
    else:
        images = partial(pipe, batch_size=args.count or 16, on_step=_on_step(bar, "sampling"), **calls[0])
    loras = (f"--lora {f'{model}=' if model else ''}{path}:{factor:g}" for model, path, factor in args.lora)
    given = [f"MODEL {args.model}", *loras,
             *(f"--{name} {value}" for name in ("weights", "lora_scale", "cfg_scale", "embedded_guidance")
               if (value := getattr(args, name)) is not None)]
    memory = runtime.memory_for(height=args.height, width=args.width, count=args.count, model=args.model)
    with memory, naming(" ".join(given), DataError):  # images that are not finite are made of these
        first = _next_number(args.output)
        for k, image in enumerate(images()):
            call = calls[k if args.prompt else 0]
            paths = _write(args.output / f"{first + k:03d}-seed{call['seed']}", image, args.fps or pipe.frame_rate,
                           _parameters(args, pipe, call, image))
            bar.end()
            sys.stdout.writelines(f"{path}\n" for path in paths)
            sys.stdout.flush()
    return 0


def _calls(args: argparse.Namespace) -> list[dict[str, Any]]:
    """With what each image is made; for a family without prompts, all of them."""
    same = {"num_inference_steps": args.num_inference_steps, "sampler": args.sampler, "height": args.height,
            "width": args.width}
    same |= {"num_frames": args.num_frames} if family(args.family).pipeline.medium == "video" else {}
    if not args.prompt:
        return [same | {"seed": args.seed}]
    same |= {"negative_prompt": args.negative_prompt, "cfg_scale": args.cfg_scale,
             "embedded_guidance": args.embedded_guidance}
    same |= {name: files for name in ("edit_image", "control_image", "control_mask") if (files := getattr(args, name))}
    own = args.own or [{}] * len(args.prompt)
    return [same | {"prompt": prompt, "seed": args.seed + k} | own[k] for k, prompt in enumerate(args.prompt)]


def _on_step(bar: Progress, text: str) -> Callable[[int, int], None]:
    """What moves the bar of an image, or of all; it is there from the first step on."""

    def advance(step: int, steps: int) -> None:
        if bar.bar is None:
            bar.begin(steps, text, "step", done=step - 1)
        bar.advance()

    return advance


def _next_number(folder: Path) -> int:
    """The first number that no image or video of ours in a folder has: nothing is overwritten."""
    names = [path.name.partition("-")[0] for path in folder.glob("*-seed*.*")]
    return max((int(name) for name in names if name.isdecimal()), default=-1) + 1


def _write(place: Path, sample: Image.Image | np.ndarray, fps: float, text: str) -> list[Path]:
    """Write an image, ``place``.png, or a video, .webp and where PyAV is here .mp4. Returns: what was written."""
    from ms_diffsynth.data.images import png_bytes
    from ms_diffsynth.data.previews import has_mp4, mp4_bytes, webp_bytes
    from ms_diffsynth.storage.files import write_file

    if isinstance(sample, Image.Image):
        files = {".png": png_bytes(sample, text={"parameters": text})}
    else:
        files = {".webp": webp_bytes(sample, fps, text)} | ({".mp4": mp4_bytes(sample, fps, text)} if has_mp4() else {})
    for suffix, content in files.items():
        write_file(place.with_name(place.name + suffix), content)
    return [place.with_name(place.name + suffix) for suffix in files]


def _parameters(args: argparse.Namespace, pipe: Any, call: dict[str, Any], image: Image.Image | np.ndarray) -> str:
    """How an image was made, in the form that web UIs and viewers read: prompt, negative prompt, one line of settings.
    Names of files without their folders, and no secret.
    """
    own, cfg_scale, is_video = pipe.sampling, call.get("cfg_scale"), not isinstance(image, Image.Image)
    height, width = image.shape[1:3] if is_video else image.size[::-1]
    values = {
        "Steps": call["num_inference_steps"] or own.num_inference_steps, "Sampler": call["sampler"] or pipe.samplers[0],
        "CFG scale": (own.cfg_scale if cfg_scale is None else cfg_scale) if args.prompt else None,
        "Seed": call["seed"], "Size": f"{width}x{height}",
        "Frames": len(image) if is_video else None, "FPS": f"{args.fps or pipe.frame_rate:g}" if is_video else None,
        "Model": Path(args.model).name,
        "Denoising strength": args.denoising_strength,
        "Edit images": "; ".join(path.name for path in call.get("edit_image", ())) or None,
        "Control images": "; ".join(path.name for path in call.get("control_image", ())) or None,
        "ControlNet": args.controlnet and Path(args.controlnet).name,
        "Control mask": call["control_mask"].name if call.get("control_mask") else None,
        "Conditioning scale": args.conditioning_scale,
        "LoRA": "; ".join(f"{path.name}:{factor:g}" for _, path, factor in args.lora) or None,
        "Weights": args.weights and args.weights.name, "8 bits": args.fp8_models,
        "Version": f"ms_diffsynth {__version__}"}
    lines = [call["prompt"]] if args.prompt else []
    lines += [f"Negative prompt: {call['negative_prompt']}"] if call.get("negative_prompt") else []
    return redact("\n".join([*lines, ", ".join(f"{n}: {value}" for n, value in values.items() if value is not None)]))


def _of_run(args: argparse.Namespace) -> dict[str, Any]:
    """The base model of a run, as arguments of `open_pipeline`; ``args`` gets what the run saved last.

    Raises: ConfigError for a folder that is not of a run, or has nothing saved; WeightError.
    """
    from ms_diffsynth.run.pipeline import controlnet_settings, model_configs, source_of

    file = args.run / "config.yaml"
    if not file.is_file():
        raise ConfigError(f"run={args.run} has no config.yaml: expected the output_path of a run.")
    config = load_config(file)
    model, saved = config.model, [(int(read_header(path)[1].get("step", -1)), path.stem.endswith("-ema"), path)
                                  for path in sorted(args.run.glob("*.safetensors"))]
    if not saved:
        raise ConfigError(f"run={args.run} has saved no weights yet: expected a file such as step-72.safetensors.")
    if model.template_model_id_or_path:
        raise ConfigError(f"run={args.run} trains a template: pack it (ms-diffsynth template pack), and sample with "
                          "--template.")
    if args.step is not None:
        steps = sorted({step for step, _, _ in saved})
        saved = [entry for entry in saved if entry[0] == args.step]
        if not saved:
            raise ConfigError(f"step={args.step}: {args.run} has saved weights of {listing(steps, 20)}. Choose one of "
                              "these steps.")
    last = max(saved)[2]  # of the last step the moving average, if there is one
    if model.trainable_models:
        args.weights = args.weights or last
    else:
        args.weights = args.weights or (Path(model.weights) if model.weights else None)
        is_sampled = model.preset_lora_path and model.preset_lora_in_samples
        preset = [(model.preset_lora_model, Path(model.preset_lora_path), 1.0)] if is_sampled else []
        args.lora = [*preset, (None, last, 1.0), *args.lora]
    args.fp8_models = args.fp8_models or model.fp8_models
    flags = {"guidance": "embedded_guidance"}  # what SAMPLE_OVERRIDES calls otherwise
    free = [name for name in SAMPLE_OVERRIDES if name != "seed" and getattr(args, flags.get(name, name)) is None]
    for name in free:  # as the sample images of the run are made; their number of steps is for a quick look
        if name != "num_inference_steps":
            setattr(args, flags.get(name, name), getattr(config.run, SAMPLE_OVERRIDES[name]) or None)
    for side in ("height", "width"):
        setattr(args, side, getattr(args, side) or getattr(config.data, side))
    if not args.prompt and config.run.sample_prompts:
        args.prompt = prompts_of(config.run.sample_prompts)
        files = _files_of_run(args, config)
        args.own = [{flags.get(name, name): value for name, value in entry.items() if name in free} | files[k]
                    if isinstance(entry, dict) else files[k] for k, entry in enumerate(config.run.sample_prompts)]
    shown = {name for given in (vars(args), *args.own) for name in ("edit_image", "control_image") if given.get(name)}
    trained = [name.strip() for name in (config.data.extra_inputs or "").split(",")]
    for name in (name for name in ("edit_image", "control_image") if name in trained and name not in shown):
        sys.stderr.write(f"{args.run} was trained with {name}, and none is given: images are made without. Give "
                         f"--{name}.\n")
    args.family, args.model = model.family, args.run
    args.num_frames = args.num_frames or max(map(int, config.data.num_frames), default=None)
    args.fps = args.fps or config.data.fps
    if args.edit_max_pixels is None and "edit_image" in shown:
        args.edit_max_pixels = config.data.edit_max_pixels
    args.edit_template = args.edit_template or config.data.edit_template
    if args.max_sequence_length is None:
        args.max_sequence_length = config.data.max_sequence_length
    hub = source_of(config)
    if args.control_mode is None and "control_image" in shown:
        args.control_mode = config.data.control_mode
    return {"models": model_configs(model.model_paths, model.model_id_with_origin_paths, hub), "hub": hub,
            **controlnet_settings(config),
            "tokenizers": {name: getattr(model, name) for name in SETTINGS if name.startswith("tokenizer")}}


def _files_of_run(args: argparse.Namespace, config: TrainConfig) -> list[dict[str, Any]]:
    """Of each prompt of a run the references, control images and masks that its sample images have and no flag says."""
    run, found = config.run, [{} for _ in config.run.sample_prompts]
    for name, given in (("edit_image", run.sample_edit_images), ("control_image", run.sample_control_images),
                        ("control_mask", run.sample_control_masks)):
        for k, files in enumerate(found if given and not getattr(args, name) else ()):
            paths = [Path(path.strip()) for path in given[0 if len(given) == 1 else k].split(";") if path.strip()]
            files[name] = paths[0] if name == "control_mask" else paths
    return found


def _family_and_model(given: list[Path]) -> tuple[str, Path]:
    """The arguments FAMILY, which may be left out, and MODEL. Raises: ConfigError when that is not what they are."""
    if len(given) > 2:
        raise ConfigError(f"{len(given)} arguments, {listing(given, 5)}: expected a model, or a family and a model. "
                          "Put quotes around a prompt, after --prompt.")
    model = bundled(given[-1]) or given[-1]
    if not model.exists() and ON_A_HUB.fullmatch(str(model)):
        model = _downloaded(str(model), str(given[0]) if len(given) == 2 else None)
    if len(given) == 2:
        return str(given[0]), model
    if not model.exists():
        if str(model) in FAMILIES:
            raise ConfigError(f"{model} is a family: expected a model too, as in: ms-diffsynth sample {model} FOLDER.")
        known = names()
        raise ConfigError(f"MODEL {model} does not exist: expected a folder, {' or '.join([*known, 'owner/name'])}."
                          f"{nearest(str(model), known)}")
    return family_of(model), model


def _downloaded(name: str, family_name: str | None) -> Path:
    """The folder of a whole model of a hub, with the files that its family reads; downloaded where they are not here.

    Raises: HubError where they cannot be had; ConfigError for a model of no family.
    """
    from ms_diffsynth import runtime
    from ms_diffsynth.hub.download import parse_path_or_model_id
    from ms_diffsynth.models import SAMPLING_FILE

    base = runtime.model_base_path()
    index = parse_path_or_model_id(f"{name}:{INDEX_FILE}")
    folder = index.resolve(base)[0].parent  # from here on its commit is the revision
    parts = read_json(folder / INDEX_FILE, ConfigError, "Download it again.")
    patterns = [f"{other}/" for other in ("scheduler", "processor") if parts.get(other)]
    for component in family(family_name or family_of(folder)).pipeline.components:
        if parts.get(component.folder):
            files = ("",) if component.is_tokenizer else ("*.json", "*.safetensors")
            patterns += [f"{component.folder}/{pattern}" for pattern in files]
    for pattern in patterns:
        replace(index, origin_file_pattern=pattern).resolve(base)
    with contextlib.suppress(HubError):  # only models of this package have one
        replace(index, origin_file_pattern=SAMPLING_FILE).resolve(base)
    return folder


def _with_prompts(args: argparse.Namespace, pipe: Any, calls: list[dict[str, Any]],
                  bar: Progress) -> Iterator[Image.Image]:
    """One image a prompt, with templates if there are any. ``calls``: the arguments of each."""
    from ms_diffsynth.data.images import read_image

    same: dict[str, Any] = {"tiled": args.tiled, "tile_size": args.tile_size, "tile_stride": args.tile_stride}
    if args.input_image:
        same["input_image"] = read_image(str(args.input_image))
        same["denoising_strength"] = 1.0 if args.denoising_strength is None else args.denoising_strength
    if any("control_image" in call for call in calls):
        same |= {name: getattr(args, name) for name in ("conditioning_scale", "control_range")}
    names = [f"{side}template_inputs" for side in ("", "negative_")]
    given = {name: text for name in names if (text := getattr(args, name)) is not None}
    generate, inputs = pipe, {}
    if args.template:
        from ms_diffsynth.template import TemplatePipeline

        hashes = args.trust_template_sha256.split(",") if args.trust_template_sha256 else None
        templates = TemplatePipeline.from_pretrained(args.template, trust_template_code=args.trust_template_code,
                                                     trust_template_sha256=hashes)
        generate = partial(templates, pipe)
        for name, text in given.items():
            try:
                inputs[name] = parse_json(text, list)
            except NotJSON:
                inputs[name] = [None]
            if not all(isinstance(entry, dict) for entry in inputs[name]):
                raise ConfigError(f"{name}={shortened(text)}: expected a JSON list of objects, such as "
                                  "[{\"scale\": 0.5}].")
    elif given:
        raise ConfigError(f"{next(iter(given))} without --template: name the template it is for.")
    for number, call in enumerate(calls, 1):
        given = {name: [read_image(str(path)) for path in call[name]] for name in ("edit_image", "control_image")
                 if name in call}
        given |= {"control_mask": read_image(str(call["control_mask"]))} if "control_mask" in call else {}
        yield generate(**call | given, on_step=_on_step(bar, f"image {number} of {len(calls)}"), **same, **inputs)


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before MindSpore is imported."""
    problems = [f"{name}={value}: {wrong}" for name, allowed in RANGES.items()
                if (value := getattr(args, name)) is not None and (wrong := out_of_range(value, allowed))]
    problems += [f"{name}={shortened(text, 80)} {wrong}" for name, texts in
                 (("prompt", args.prompt or []), ("negative_prompt", [args.negative_prompt or "x"])) for text in texts
                 if (wrong := prompt_problem(text))]
    unused = [("lora_scale", "lora")] + [(f"trust_template_{what}", "template") for what in ("code", "sha256")]
    problems += [f"{name} without --{other}: name what it is for, or remove it" for name, other in unused
                 if getattr(args, name) not in (None, False) and not getattr(args, other)]
    problems += [f"lora={path}: no such file" for _, path, _ in args.lora if not path.exists()]
    problems += [f"{name}={path}: no such file" for name in ("edit_image", "control_image")
                 for path in getattr(args, name) if not path.is_file()]
    given = {name for own in (vars(args), *args.own) for name in ("edit_image", "control_image") if own.get(name)}
    problems += [f"{name} without control_image, which it is for: name the file" for name in (*CONTROL, "controlnet")
                 if getattr(args, name) not in (None, []) and "control_image" not in given]
    if args.edit_max_pixels is not None and "edit_image" not in given:
        problems.append("edit_max_pixels without edit_image, which it makes smaller: name the file")
    allowed = SETTINGS["edit_template"].metadata["choices"]
    if args.edit_template is not None and args.edit_template not in allowed:
        problems.append(f"edit_template={args.edit_template}: expected one of {', '.join(allowed)}")
    problems += [f"{name}={path}: no such file" for name in ("weights", "input_image", "control_mask")
                 if (path := getattr(args, name)) and not path.is_file()]
    if args.denoising_strength is not None and not args.input_image:
        problems.append("denoising_strength without input_image, of which it says how much is kept: name the file")
    problems += [f"{name} without tiled: expected --tiled too" for name in ("tile_size", "tile_stride")
                 if getattr(args, name) is not None and not args.tiled]
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    check_strength(1.0 if args.denoising_strength is None else args.denoising_strength)
    Tiles.of(args.tiled, args.tile_size, args.tile_stride)
    if args.output.exists() and not args.output.is_dir():
        raise OutputError(f"output={args.output} is a file: expected a folder. Choose another one.")
