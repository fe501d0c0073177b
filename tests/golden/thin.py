"""Keep every fourth row of the gradients and trained weights of a reference case, so that all cases fit in here.

    python tests/golden/thin.py CASE OUTPUT

``ms-diffsynth parity`` compares the rows that are there; run it on the whole case to compare all of them.
"""
from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from ms_diffsynth.formats.weights import load_state_dict, save_state_dict

STRIDE = 4


def thin(case: Path, output: Path) -> None:
    """Copy a case; matrices named ``grad.*`` and ``train.*`` lose three rows of four."""
    shutil.copytree(case, output)
    info = json.loads((case / "case.json").read_text()) | {"row_stride": STRIDE}
    (output / "case.json").write_text(json.dumps(info, indent=1, sort_keys=True) + "\n")
    kept = {}
    for name, array in load_state_dict(case / "expected.safetensors").items():
        is_long = name.startswith(("grad.", "train.")) and array.ndim > 1 and ".lora_" not in name
        kept[name] = array[::STRIDE].copy() if is_long else array
    (output / "expected.safetensors").unlink()
    save_state_dict(output / "expected.safetensors", kept)


if __name__ == "__main__":
    thin(Path(sys.argv[1]), Path(sys.argv[2]))
