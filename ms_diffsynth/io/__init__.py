"""The commit protocol, weights, LoRA files, model hubs: NumPy and safetensors only, nothing here knows MindSpore."""
