"""GGUF, the file format of llama.cpp: container and constants by the `gguf` package, conversion by Parley.

The format is documented in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""
