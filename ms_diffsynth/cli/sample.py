"""``ms-diffsynth sample``: pictures from a model, with or without a LoRA."""
from __future__ import annotations

import argparse
import io
import sys
from pathlib import Path
from typing import Any

from ms_diffsynth import runtime
from ms_diffsynth.errors import ConfigError
from ms_diffsynth.io.files import write_file
from ms_diffsynth.registry import FAMILIES, family


def add_parser(commands: Any) -> None:
    """Register the subcommand."""
    parser = commands.add_parser("sample", allow_abbrev=False, help="generate pictures")
    parser.add_argument("family", choices=sorted(FAMILIES))
    parser.add_argument("model", type=Path, help="folder of a diffusers-format model")
    parser.add_argument("--prompt", required=True, action="append", help="may be given several times")
    parser.add_argument("--negative_prompt", default="")
    parser.add_argument("--lora", type=Path, help="LoRA file to fuse into the transformer")
    parser.add_argument("--lora_scale", type=float, default=1.0)
    parser.add_argument("--height", type=int, default=1024, help="pixels (default: 1024)")
    parser.add_argument("--width", type=int, default=1024, help="pixels (default: 1024)")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; each further one adds 1")
    parser.add_argument("--num_inference_steps", type=int, default=30)
    parser.add_argument("--cfg_scale", type=float, default=1.0, help="two-branch guidance (default: 1, off)")
    parser.add_argument("--embedded_guidance", type=float, default=3.5, help="of guidance-distilled models")
    parser.add_argument("--max_sequence_length", type=int, help="text tokens a prompt is padded to")
    parser.add_argument("--mode", choices=runtime.MODES, default="graph")
    parser.add_argument("--device", help="CPU or Ascend (default: what is there)")
    parser.add_argument("--output", type=Path, default=Path("samples"), help="folder for the pictures")
    parser.set_defaults(execute=execute)


def execute(args: argparse.Namespace) -> int:
    """Generate one picture a prompt."""
    if args.num_inference_steps < 1:
        raise ConfigError(f"num_inference_steps={args.num_inference_steps}: expected at least 1.")
    runtime.configure(args.mode, args.device)
    pipe = family(args.family).pipeline.from_pretrained(str(args.model), device=args.device)
    if args.max_sequence_length and hasattr(pipe, "max_sequence_length"):
        pipe.max_sequence_length = args.max_sequence_length
    if args.lora:
        fused = pipe.load_lora(pipe.dit, args.lora, args.lora_scale)
        sys.stderr.write(f"{args.lora}: fused into {fused} layers\n")
    args.output.mkdir(parents=True, exist_ok=True)
    for k, prompt in enumerate(args.prompt):
        image = pipe(prompt=prompt, negative_prompt=args.negative_prompt, cfg_scale=args.cfg_scale, height=args.height,
                     width=args.width, seed=args.seed + k, num_inference_steps=args.num_inference_steps,
                     embedded_guidance=args.embedded_guidance)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG")
        path = args.output / f"{k:03d}-seed{args.seed + k}.png"
        write_file(path, buffer.getvalue())
        sys.stdout.write(f"{path}\n")
    return 0
