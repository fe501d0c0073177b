"""FLUX.1 from Python: what is special about it. `examples/train.py` is the whole script.

    ms-diffsynth tiny flux models/flux-tiny
    python examples/flux/train.py
"""
from ms_diffsynth import load_config, train

config = load_config(
    "examples/flux/tiny_dreambooth.yaml",
    # DreamBooth: three words stand for the character, and class images keep the meaning of "cat".
    task="dreambooth", with_prior_preservation=True,
    # FLUX.1-dev gets a guidance scale. DreamBooth trains at 3.5, at which it is sampled; task sft trains at 1.
    guidance_scale=3.5,
    # T5's text length: its tokens pass through the network beside those of the image, so a short one is faster.
    max_sequence_length=16,
    # The VAE may run inside the compiled step, as in TrainStepForFluxDevDB; by default each image is encoded once.
    fuse=["encode_image"],
    output_path="runs/flux-python",
)

if __name__ == "__main__":
    train(config)
