"""The step's operations as Triton kernels; the same names as `parley.engine.reference`."""

from parley.engine.kernels.adapters import add_adapter_gradients, copy_all, copy_scaled, copy_table
from parley.engine.kernels.attention import attention, attention_backward
from parley.engine.kernels.loss import cross_entropy
from parley.engine.kernels.nf4 import write_nf4
from parley.engine.kernels.norm import rms_norm, rms_norm_backward
from parley.engine.kernels.pointwise import rope, swiglu, swiglu_backward

__all__ = [
    "add_adapter_gradients",
    "attention",
    "attention_backward",
    "copy_all",
    "copy_scaled",
    "copy_table",
    "cross_entropy",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "swiglu",
    "swiglu_backward",
    "write_nf4",
]
