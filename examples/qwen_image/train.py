"""Qwen-Image from Python: what is special about it. `examples/train.py` is the whole script.

    ms-diffsynth tiny qwen_image models/qwen-image-tiny
    python examples/qwen_image/train.py
"""
from ms_diffsynth import load_config, train

config = load_config(
    "examples/qwen_image/tiny_lora.yaml",
    # Prompts keep their own length, up to the family's buckets of lengths: each length used is one compilation.
    # A LoRA goes on the attention and feed-forward layers of both streams; name others by the ends of their names.
    lora_target_modules="to_q,to_k,to_v,to_out.0",
    # The network has 20 billion parameters: recomputing its blocks in backward halves the memory of a step.
    use_gradient_checkpointing=True,
    output_path="runs/qwen-python",
)

if __name__ == "__main__":
    train(config)
