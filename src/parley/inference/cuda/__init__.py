"""Decoding on a GPU: CUDA graphs over Triton kernels."""
