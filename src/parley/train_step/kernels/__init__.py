"""The operations of ops.Ops as Triton kernels, under the names of `parley.train_step.reference_ops`."""

from parley.train_step.kernels.attention import attention, attention_backward, sink_gradient
from parley.train_step.kernels.cross_entropy import cross_entropy
from parley.train_step.kernels.dropout import dropout
from parley.train_step.kernels.lora import add_adapter_gradients, copy_scaled, prepare_copies, run_copies
from parley.train_step.kernels.nf4 import dequantize_nf4
from parley.train_step.kernels.pointwise import glu, glu_backward, qk_norm, qk_norm_backward, rope
from parley.train_step.kernels.rms_norm import rms_norm, rms_norm_backward
from parley.train_step.kernels.scale_columns import scale_columns, scale_columns_backward

__all__ = [
    "add_adapter_gradients",
    "attention",
    "attention_backward",
    "copy_scaled",
    "cross_entropy",
    "dequantize_nf4",
    "dropout",
    "glu",
    "glu_backward",
    "prepare_copies",
    "qk_norm",
    "qk_norm_backward",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "run_copies",
    "scale_columns",
    "scale_columns_backward",
    "sink_gradient",
]
