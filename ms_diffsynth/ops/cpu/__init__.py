"""The CPU kernels, by subject; `install` puts them in place. Imported on the CPU only."""
