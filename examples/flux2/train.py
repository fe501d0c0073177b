"""FLUX.2 from Python: what is special about it. `examples/train.py` is the whole script.

    ms-diffsynth tiny flux2 models/flux2-tiny
    python examples/flux2/train.py
"""
from ms_diffsynth import load_config, train

config = load_config(
    "examples/flux2/tiny_lora.yaml",
    # One language model reads the prompt; klein takes layers 9, 18 and 27 of it. Prompts are padded to this length.
    max_sequence_length=64,
    # An edit model: add a column `edit_image` to the metadata and name it here; a template adds `template_inputs`.
    extra_inputs=None,
    # klein is distilled and has no guidance embedding; FLUX.2-dev gets 4.0 when it is sampled.
    guidance_scale=1.0,
    output_path="runs/flux2-python",
)

if __name__ == "__main__":
    train(config)
