"""Time and memory of ``ms-diffsynth convert`` of a file of 24 GB: FLUX.1-dev's names and shapes, all zeros, sparse.

    python tests/formats/originals/measure_convert.py FOLDER          (48 GB of it are needed for a while)
"""
from __future__ import annotations

import json
import os
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


def convert(source: Path, output: Path, to: str) -> None:
    """The command in a process of its own, and what it took."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "ms_diffsynth", "convert", source, output, "--to", to,
                                "--family", "flux"])
    _, status, used = os.wait4(process.pid, 0)
    print(f"--to {to}: exit {os.waitstatus_to_exitcode(status)}, {time.monotonic() - start:.0f} s, of them computing "
          f"{used.ru_utime + used.ru_stime:.0f} s, peak memory {used.ru_maxrss / 1e6:.2f} GB", flush=True)


if __name__ == "__main__":
    with TemporaryDirectory(dir=sys.argv[1]) as place:
        file, folder, back = (Path(place) / name for name in ("flux1-dev.safetensors", "folder", "back.safetensors"))
        write_sparse(file)
        convert(file, folder, "diffusers")
        print(*(f"{path.stat().st_size / 1e9:.2f} GB {path.name}" for path in sorted(folder.iterdir())), sep="\n")
        convert(folder, back, "original")
        assert open_checkpoint(back).shapes == open_checkpoint(file).shapes
