"""The script of DiffSynth-Studio's commands for this family, at the path that they name, with their flags.

It is `examples/train.py` with `--family qwen_image`: copy that one to change it.
"""
import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.argv[1:1] = ["--family", "qwen_image"]
    runpy.run_path(str(Path(__file__).parents[3] / "examples/train.py"), run_name="__main__")
