"""Stable Diffusion 3 from Python: what is special about it. `examples/train.py` is the whole script.

    ms-diffsynth tiny sd3 models/sd3-tiny
    python examples/sd3/train.py
"""
from ms_diffsynth import load_config, train

config = load_config(
    "examples/sd3/tiny_lora.yaml",
    # Three text encoders read each prompt: two CLIPs and T5. Their embeddings are prepared once for each image.
    # It was trained with logit_normal noise levels and equal weights; task sft weighs them as DiffSynth-Studio does.
    weighting_scheme="logit_normal",
    output_path="runs/sd3-python",
)

if __name__ == "__main__":
    train(config)
