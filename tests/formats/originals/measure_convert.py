"""The memory of ``ms-diffsynth convert`` with a file of 24 GB: FLUX.1-dev's names and shapes, all zeros, sparse.

    python tests/formats/originals/measure_convert.py FOLDER        (48 GB of disk, removed at the end)
"""
from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from ms_diffsynth.formats.weights import open_checkpoint

D = 3072


def shapes() -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        found.update({f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)})

    for k in range(19):
        for side in ("img", "txt"):
            block = f"double_blocks.{k}.{side}"
            linear(f"{block}_attn.qkv", 3 * D, D)
            linear(f"{block}_attn.proj", D, D)
            linear(f"{block}_mlp.0", 4 * D, D)
            linear(f"{block}_mlp.2", D, 4 * D)
            linear(f"{block}_mod.lin", 6 * D, D)
            found.update({f"{block}_attn.norm.{part}_norm.scale": (128,) for part in ("query", "key")})
    for k in range(38):
        linear(f"single_blocks.{k}.linear1", 7 * D, D)
        linear(f"single_blocks.{k}.linear2", D, 5 * D)
        linear(f"single_blocks.{k}.modulation.lin", 3 * D, D)
        found.update({f"single_blocks.{k}.norm.{part}_norm.scale": (128,) for part in ("query", "key")})
    for name, width in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        linear(f"{name}.in_layer", D, width)
        linear(f"{name}.out_layer", D, D)
    linear("img_in", D, 64)
    linear("txt_in", D, 4096)
    linear("final_layer.linear", 64, D)
    linear("final_layer.adaLN_modulation.1", 2 * D, D)
    return found


def write_sparse(file: Path) -> None:
    header, start = {}, 0
    for name, shape in shapes().items():
        end = start + 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    with open(file, "wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(8 + len(text) + start)


if __name__ == "__main__":
    with TemporaryDirectory(dir=sys.argv[1]) as folder:
        one, there, back = (Path(folder) / name for name in ("dev.safetensors", "transformer", "back.safetensors"))
        write_sparse(one)
        print(f"{one.name}: {one.stat().st_size / 1e9:.1f} GB")
        for source, output, to in ((one, there, "diffusers"), (there, back, "original")):
            began = time.monotonic()
            subprocess.run([sys.executable, "-m", "ms_diffsynth", "convert", source, output, "--to", to], check=True)
            peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6  # the larger of both, so far
            print(f"--to {to}: peak memory of the process {peak:.2f} GB, {time.monotonic() - began:.0f} s", flush=True)
        print(f"{len(list(there.glob('*.safetensors')))} shards of at most "
              f"{max(path.stat().st_size for path in there.glob('*.safetensors')) / 1e9:.2f} GB; the same names and "
              f"shapes: {open_checkpoint(one).shapes == open_checkpoint(back).shapes}")
