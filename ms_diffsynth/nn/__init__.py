"""Cells and operations on cells: adapters, reading and writing weights."""
