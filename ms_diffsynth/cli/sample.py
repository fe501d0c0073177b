"""``ms-diffsynth sample``: pictures from a model, with or without a LoRA."""
from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from ms_diffsynth.cli.template import add_trust_flags
from ms_diffsynth.errors import ConfigError, OutputError
from ms_diffsynth.registry import FAMILIES, family


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Model, prompts, and how to sample."""
    parser.add_argument("family", metavar="FAMILY", help=f"one of {', '.join(sorted(FAMILIES))}")
    parser.add_argument("model", type=Path, metavar="MODEL", help="folder of a diffusers-format model")
    parser.add_argument("--prompt", required=True, action="append", help="may be given several times")
    parser.add_argument("--negative_prompt", default="", help="what cfg_scale leads away from")
    parser.add_argument("--lora", type=Path, help="LoRA file to fuse into the transformer")
    parser.add_argument("--lora_scale", type=float, default=1.0, help="factor on the LoRA (default: 1)")
    parser.add_argument("--template", action="append", default=[],
                        help="folder of a template, or owner/name: on a hub; several times for several")
    parser.add_argument("--template_inputs", metavar="JSON",
                        help='JSON list of template inputs, e.g. [{"scale": 0.5}]; "model_id" counts the templates')
    parser.add_argument("--negative_template_inputs", metavar="JSON", help="the same, for the negative prompt")
    add_trust_flags(parser)
    parser.add_argument("--height", type=int, default=1024, help="pixels (default: 1024)")
    parser.add_argument("--width", type=int, default=1024, help="pixels (default: 1024)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next ones add 1 (default: 0)")
    parser.add_argument("--num_inference_steps", type=int, default=30, help="sampling steps (default: 30)")
    parser.add_argument("--cfg_scale", type=float, help="two-branch guidance, 1 is off (default: the family's)")
    parser.add_argument("--embedded_guidance", type=float, default=3.5,
                        help="told to guidance-distilled models (default: 3.5)")
    parser.add_argument("--max_sequence_length", type=int, help="text tokens a prompt is padded or cut to")
    parser.add_argument("--mode", default="graph", help="graph or pynative (default: graph)")
    parser.add_argument("--device", help="CPU or Ascend (default: what is there)")
    parser.add_argument("--output", type=Path, default=Path("samples"), help="folder (default: samples)")


def execute(args: argparse.Namespace) -> int:
    """Generate one picture a prompt."""
    _check(args)
    from ms_diffsynth import runtime
    from ms_diffsynth.io.files import write_file

    runtime.configure(args.mode, args.device)
    pipe = family(args.family).pipeline.from_pretrained(str(args.model), device=args.device)
    if args.max_sequence_length:
        if not hasattr(pipe, "max_sequence_length"):
            raise ConfigError(f"max_sequence_length={args.max_sequence_length}: prompts of the family {args.family} "
                              "have one fixed length. Remove it.")
        pipe.max_sequence_length = args.max_sequence_length
    if args.lora:
        fused = pipe.load_lora(pipe.dit, args.lora, args.lora_scale)
        sys.stderr.write(f"{args.lora}: fused into {fused} layers\n")
    generate, inputs = _with_templates(args, pipe)
    for k, prompt in enumerate(args.prompt):
        image = generate(prompt=prompt, negative_prompt=args.negative_prompt, cfg_scale=args.cfg_scale,
                         height=args.height, width=args.width, seed=args.seed + k,
                         num_inference_steps=args.num_inference_steps, embedded_guidance=args.embedded_guidance,
                         **inputs)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        path = args.output / f"{k:03d}-seed{args.seed + k}.png"
        write_file(path, buffer.getvalue())
        sys.stdout.write(f"{path}\n")
    return 0


def _with_templates(args: argparse.Namespace, pipe: Any) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What to call for a picture, and the arguments templates add."""
    names = ("template_inputs", "negative_template_inputs")
    if not args.template:
        given = [name for name in names if getattr(args, name)]
        if given:
            raise ConfigError(f"{given[0]} without --template: name the template it is for.")
        return pipe, {}
    from ms_diffsynth.template import TemplatePipeline

    hashes = args.trust_template_sha256.split(",") if args.trust_template_sha256 else None
    templates = TemplatePipeline.from_pretrained(args.template, trust_template_code=args.trust_template_code,
                                                 trust_template_sha256=hashes)
    inputs = {name: _entries(name, getattr(args, name)) for name in names if getattr(args, name)}
    return partial(templates, pipe), inputs


def _entries(name: str, text: str) -> list[dict[str, Any]]:
    try:
        entries = json.loads(text)
    except ValueError:
        entries = None
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"{name}={text}: expected a JSON list of objects, such as [{{\"scale\": 0.5}}].")
    return entries


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before MindSpore is imported."""
    problems = [f"{name}={getattr(args, name)}: expected at least {least}"
                for name, least in (("num_inference_steps", 1), ("height", 1), ("width", 1), ("seed", 0),
                                    ("max_sequence_length", 1))
                if getattr(args, name) is not None and getattr(args, name) < least]
    if args.lora and not args.lora.is_file():
        problems.append(f"lora={args.lora}: no such file")
    if problems:
        raise ConfigError("; ".join(problems) + ".")
    if args.output.exists() and not args.output.is_dir():
        raise OutputError(f"output={args.output} is a file: expected a folder. Choose another one.")
