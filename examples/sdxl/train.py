"""Stable Diffusion XL from Python: what is special about it. `examples/train.py` is the whole script.

    ms-diffsynth tiny sdxl models/sdxl-tiny
    python examples/sdxl/train.py
"""
from ms_diffsynth import load_config, train

config = load_config(
    "examples/sdxl/tiny_lora.yaml",
    # SDXL is trained by denoising diffusion: the network learns to give the noise (epsilon). With these two settings it
    # learns v on a schedule whose last timestep is noise alone, as some finetunes do.
    prediction_type="v_prediction",
    zero_terminal_snr=True,
    # The UNet alone gets a LoRA; the prompts are then encoded once.
    lora_base_model="unet",
    output_path="runs/sdxl-python",
)

if __name__ == "__main__":
    train(config)
