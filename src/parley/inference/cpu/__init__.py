"""Decoding on a CPU, in PyTorch."""
