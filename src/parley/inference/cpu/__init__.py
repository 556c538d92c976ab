"""Decoding in plain PyTorch: the backend of CPUs, and on a GPU the reference for CUDA graphs."""
