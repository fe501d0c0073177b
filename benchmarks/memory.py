"""Memory of training steps at full size, on the stand-in for CANN: the table of docs/reference/memory.md.

    python benchmarks/memory.py                       # all of it: an hour and a half on one core, 6 GB of this machine
    python benchmarks/memory.py --only flux:FLUX.1-dev --sizes 1024 --json memory.jsonl

Peaks are those of MindSpore's own allocator, in GiB; weights are memory that is never written, kernels are recorded and
not computed. What is in the file of ``--json`` already is not run again.
"""
from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mindspore as ms

from ms_diffsynth.debug.skeleton import Plan, Report, measure, measure_by_depth
from ms_diffsynth.errors import UserError
from ms_diffsynth.pipeline import padded_to
from ms_diffsynth.registry import family
from ms_diffsynth.run.plan import AROUND

MODELS = ("flux:FLUX.1-dev", "flux:FLUX.1-Kontext-dev", "flux2:FLUX.2-klein-4B", "flux2:FLUX.2-klein-9B",
          "qwen_image:Qwen-Image", "qwen_image:Qwen-Image-Edit-2511", "flux2:FLUX.2-dev", "sd3:SD3-medium",
          "sd3:SD3.5-medium", "sd3:SD3.5-large", "sdxl:SDXL-base", "z_image:Z-Image", "wan:Wan2.1-T2V-1.3B",
          "wan:Wan2.1-T2V-14B")
GIB = 2**30


def row(plan: Plan, report: Report) -> str:
    recompute = "yes" if plan.recompute else "no"
    count = plan.edit_tokens // (plan.height // 16) ** 2
    model = plan.model + (", whole network" if plan.is_whole else "") + (", 8 bits" if plan.is_8bit else "")
    model += f", {count} reference{'s' if count > 1 else ''}" if count else ""
    model += (", template" if plan.template else "") + (", 2 images" if plan.batch_size == 2 else "")
    side = f"{plan.num_frames} x {plan.height} x {plan.width}" if plan.num_frames else plan.height
    return (f"| {model} | {side} | {recompute} | {report.held / GIB:.2f} | {report.peak / GIB:.2f} "
            f"| {report.kernels} | {report.casts} | {report.transposes} | {report.synchronisations} |")


def text_tokens(name: str, side: int, references: int) -> int | None:
    """Of the longest prompt, with references as large as the image where the text encoder sees them; None without."""
    pipe = family(name).pipeline(dtype=ms.bfloat16)
    pictures = pipe.picture_sides([(side, side)] * references)
    tokens = sum(rows * columns + AROUND for rows, columns in pictures)
    return padded_to(pipe.max_sequence_length + tokens, pipe) if pictures else None


def size_of(text: str) -> tuple[int, int, int]:
    """Frames, or 0 of images, height and width."""
    sides = [int(part) for part in text.split("x")]
    return tuple(sides) if len(sides) == 3 else (0, sides[0], sides[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=MODELS, default=MODELS, help="family:model")
    parser.add_argument("--sizes", nargs="+", type=size_of, default=[(0, 512, 512), (0, 1024, 1024)],
                        help="sides of the images in pixels, such as 1024, or of films, such as 17x480x832")
    parser.add_argument("--recompute", nargs="+", choices=["yes", "no"], default=["yes", "no"])
    parser.add_argument("--bits", type=int, choices=[8, 16], default=16, help="of the stored weights")
    parser.add_argument("--batch_size", type=int, choices=[1, 2], default=1, help="2: DreamBooth with a class image")
    parser.add_argument("--whole", action="store_true", help="all weights are trained, no LoRA")
    parser.add_argument("--references", type=int, default=0, metavar="N", help="each as large as the image")
    parser.add_argument("--template", default="", help="folder of a template that is trained instead of a LoRA")
    parser.add_argument("--template_inputs", type=json.loads, default={}, help="what it takes, a JSON object")
    parser.add_argument("--depth", type=int, default=0, help="build so many blocks of each kind, and one more, instead "
                        "of all: sooner; the rest is worked out from these")
    parser.add_argument("--memory", type=float, default=256, help="GiB the device has (default: 256, so that all fit)")
    parser.add_argument("--json", type=Path, help="append each result to this file, and take from it what is there")
    arguments = parser.parse_args()
    known = {}
    if arguments.json and arguments.json.is_file():
        for line in arguments.json.read_text().splitlines():
            plan, report = json.loads(line)
            known[json.dumps(plan)] = Report(**report)
    print("| model | pixels | recompute | held | peak | kernels | casts | transposes | waits |\n"
          "|---|---|---|---|---|---|---|---|---|")
    for name in arguments.only:
        for frames, size, width in arguments.sizes:
            for recompute in arguments.recompute:
                family_name, model = name.split(":")
                plan = Plan(family=family_name, model=model, height=size, width=width, num_frames=frames,
                            recompute=recompute == "yes",
                            is_8bit=arguments.bits == 8, batch_size=arguments.batch_size,
                            is_whole=arguments.whole, edit_tokens=arguments.references * (size // 16) ** 2,
                            text_tokens=text_tokens(family_name, size, arguments.references),
                            template=str(Path(arguments.template).resolve()) if arguments.template else "",
                            template_inputs=arguments.template_inputs)
                key = json.dumps(asdict(plan))
                if key not in known:
                    try:
                        known[key] = (measure_by_depth(plan, arguments.memory, arguments.depth) if arguments.depth else
                                      measure(plan, memory=arguments.memory))
                    except UserError as error:
                        print(f"{name} {size} recompute {recompute}: {error}", file=sys.stderr, flush=True)
                        continue
                    if arguments.json:
                        with arguments.json.open("a") as file:
                            file.write(json.dumps([asdict(plan), asdict(known[key])]) + "\n")
                print(row(plan, known[key]), flush=True)


if __name__ == "__main__":
    main()
