"""Does the ControlNet of edges.yaml draw after edges: python evaluate_edges.py IMAGES RUN OUT

Every eighth emoji of IMAGES at a place and in a size that are in no training, drawn without the edges and with them.
Writes edges.png and numbers.json to the folder OUT, and prints the numbers:

    distance    of the answer to the image that the edges are of, root mean square of 0 to 1
    overlap     of what is not white in the two: intersection over union
"""
from __future__ import annotations

import csv
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from evaluate import distance
from make_edges import STYLES, edges, moved
from PIL import Image

from ms_diffsynth import runtime
from ms_diffsynth.data.previews import grid
from ms_diffsynth.pipelines.flux import FluxImagePipeline

WHITE = 230  # of 255: brighter in all colours is not drawn
SHOWN = 8


def drawn(image: Image.Image) -> np.ndarray:
    return (np.asarray(image.convert("RGB")) < WHITE).any(2)


def judge(answers: Sequence[Image.Image], wanted: Sequence[Image.Image]) -> dict[str, float]:
    pairs = [(drawn(one), drawn(other)) for one, other in zip(answers, wanted)]
    return {"distance": float(np.mean([distance(*pair) for pair in zip(answers, wanted)])),
            "overlap": float(np.mean([(a & b).sum() / (a | b).sum() for a, b in pairs]))}


def main(source: Path, run: Path, out: Path) -> None:
    with (source / "metadata.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))[::8]
    wanted = [moved(Image.open(source / row["image"]), f"{row['image']} held out") for row in rows]
    prompts = [row["prompt"] for row in rows]
    for theirs, ours in STYLES.items():
        prompts = [prompt.replace(theirs, ours) for prompt in prompts]
    controls = [edges(image) for image in wanted]
    runtime.configure("graph")
    pipe = FluxImagePipeline.from_pretrained(str(run / "model"))
    without = [pipe(prompt=prompt, seed=k) for k, prompt in enumerate(prompts)]
    with_edges = [pipe(prompt=prompt, seed=k, control_image=control)
                  for k, (prompt, control) in enumerate(zip(prompts, controls))]
    found = {"without edges": judge(without, wanted), "with edges": judge(with_edges, wanted)}
    out.mkdir(parents=True, exist_ok=True)
    columns = {"edges": controls, "without them": without, "with them": with_edges, "wanted": wanted}
    grid([[image.convert("RGB") for image in images[::max(1, len(images) // SHOWN)][:SHOWN]]
          for images in columns.values()], captions=list(columns)).save(out / "edges.png", optimize=True)
    (out / "numbers.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:4]))
