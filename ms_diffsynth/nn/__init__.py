"""Cells and operations on cells: LoRA, reading and writing weights."""
