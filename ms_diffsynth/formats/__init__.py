"""Weights in files, in this project's layout and in those of others: NumPy and safetensors. Knows no MindSpore."""
