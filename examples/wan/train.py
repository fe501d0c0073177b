"""Wan from Python: what is special about it. `examples/train.py` is the whole script.

    ms-diffsynth tiny wan models/wan-tiny
    python examples/moving_emoji/make.py data/moving_emoji
    python examples/wan/train.py
"""
from ms_diffsynth import load_config, train

config = load_config(
    "examples/wan/tiny_lora.yaml",
    # Two lengths of films, each of them one compilation; a film is trained at the longest that it has.
    num_frames=("5", "9"),
    output_path="runs/wan-python",
)

if __name__ == "__main__":
    train(config)
