"""The hyperbolic tangent for kernels: Triton has none that its interpreter knows, too."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    # Near zero 1 - 2 / (e^2x + 1) loses digits to cancellation: there the Taylor series to x^9, below 1e-7 at 0.3.
    square = x * x
    series = x * (1.0 + square * (-1.0 / 3 + square * (2.0 / 15 + square * (-17.0 / 315 + square * (62.0 / 2835)))))
    return tl.where(square < 0.09, series, 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0))
