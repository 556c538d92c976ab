"""What a step of the decoder is made of on a GPU, as Triton kernels; the plain counterparts are in `forward`,
`products` and `sampling`."""
