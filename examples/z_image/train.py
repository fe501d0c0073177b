"""Z-Image from Python: what is special about it. `examples/train.py` is the whole script.

    ms-diffsynth tiny z_image models/z-image-tiny
    python examples/z_image/train.py
"""
from ms_diffsynth import load_config, train

config = load_config(
    "examples/z_image/tiny_lora.yaml",
    # Batches of prompts of different lengths give what each prompt gives alone: texts are filled up to a multiple of
    # 32 tokens with a learned one, and padded beyond it under a mask. At most so many tokens of a prompt are read.
    max_sequence_length=512,
    output_path="runs/z-image-python",
)

if __name__ == "__main__":
    train(config)
