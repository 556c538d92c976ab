"""The CUDA backend: steps as CUDA graphs over Triton kernels."""
