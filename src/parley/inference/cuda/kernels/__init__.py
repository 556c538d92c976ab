"""The Triton kernels of a decode step. Their references in PyTorch are `cpu.step`, `linear` and `sampling`."""
