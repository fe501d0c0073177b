"""The memory in which a file of 24 GB is converted: FLUX.1-dev's names and shapes, all zeros, sparse.

    python tests/formats/originals/measure_convert.py FOLDER

Every byte of what ``ms-diffsynth convert`` writes is made, in both directions, and thrown away: no disk is needed.
"""
from __future__ import annotations

import json
import resource
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from ms_diffsynth.formats.originals import in_one_file, in_our_names
from ms_diffsynth.formats.weights import open_checkpoint, serialize
from ms_diffsynth.registry import interchange

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
    table = interchange("flux")
    with TemporaryDirectory(dir=sys.argv[1]) as folder:
        write_sparse(file := Path(folder) / "flux1-dev.safetensors")
        ours = in_our_names(open_checkpoint(file), table.models["dit"])
        theirs = in_one_file({"dit": ours}, table)
        assert theirs.shapes == open_checkpoint(file).shapes
        for name, checkpoint in (("diffusers", ours), ("original", theirs)):  # in this order: the peak is of both
            stream = serialize(checkpoint)
            made = sum(len(piece) for piece in stream.pieces())
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
            print(f"--to {name}: {made / 1e9:.1f} GB, peak memory of the process so far {peak:.2f} GB", flush=True)
            assert made == stream.nbytes
