"""The operations of a step besides matrix products, as one protocol with two implementations.

`reference_ops` writes each in plain PyTorch, `kernels` in Triton. The step does not know which it runs on, and tests
compare them.

Shape suffixes (legend in docs/design.md): T tokens, D hidden, K input features, N output features, P LoRA columns,
R rank, F feed-forward, H query heads, G key-value heads, E head size, L positions, V vocabulary, S supervised rows,
C = (H + 2 G) E columns of queries, keys and values side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from parley.train_step.packed_batch import DeviceBatch


@dataclass(frozen=True)
class AttentionShape:
    """The heads of one attention layer.

    `window`: how many tokens a query sees, itself included; None for all. `softcap`: c where a score s becomes
    c tanh(s / c) before the softmax.
    """

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None
    softcap: float | None = None

    @property
    def columns(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.head_dim

    def split_qkv(self, x_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of the queries (T, H, E), keys (T, G, E) and values (T, G, E) that lie side by side in `x_TC`."""
        sizes = [self.heads * self.head_dim, self.kv_heads * self.head_dim, self.kv_heads * self.head_dim]
        q, k, v = x_TC[:, : self.columns].split(sizes, dim=1)
        return tuple(part.unflatten(1, (-1, self.head_dim)) for part in (q, k, v))


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines by position, with the scaling that the model's own module applies.

    They have half as many columns as a head has rotated elements, which are its first; the others stay as they are.
    """

    cos_LE: Tensor
    sin_LE: Tensor


@dataclass(frozen=True)
class RmsNorm:
    """A frozen norm. A weight in fp32 beside 16-bit activations multiplies before the product is rounded."""

    weight_D: Tensor
    eps: float


@dataclass(frozen=True)
class QkNorm:
    """RMS norms of queries and keys before rotation: of each head, or of all heads of a token together.

    A weight has the elements that are normalised together: E, or H E for queries and G E for keys.
    """

    q: Tensor
    k: Tensor
    eps: float

    def per_head(self, shape: AttentionShape) -> bool:
        return len(self.q) == len(self.k) == shape.head_dim


@dataclass(frozen=True)
class LogitTransform:
    """From the head's products z to logits: scale z, then c tanh(scale z / c) with a soft cap c."""

    scale: float = 1.0
    softcap: float | None = None


@dataclass(frozen=True)
class Magnitude:
    """DoRA's magnitude of each output feature and its gradient, views of the flat buffers, fp32."""

    m_N: Tensor
    dm_N: Tensor


@dataclass(frozen=True)
class Adapter:
    """Views of one projection's LoRA weights and gradients in the flat buffers, fp32.

    `trainable`: whether A, B or the magnitude is. The gradient of another, if it is frozen, is computed and never read.
    `dropout`: probability that an element of the adapter's input is zeroed.
    """

    a_RK: Tensor
    b_NR: Tensor
    da_RK: Tensor
    db_NR: Tensor
    scale: float
    trainable: bool = True
    magnitude: Magnitude | None = None
    dropout: float = 0.0


@dataclass(frozen=True)
class AdapterSlice:
    """The part of a fused matrix that belongs to one adapter: its rows of y and its columns among the P."""

    adapter: Adapter
    rows: slice
    columns: slice


ScaledCopy = tuple[Tensor, Tensor, float]  # source, out, scale


class Ops(Protocol):
    """Every `out` may be strided unless said otherwise; nothing but `out` and what is named as updated is written."""

    def copy_scaled(self, source: Tensor, out: Tensor, scale: float) -> None:
        """out = scale * source, in out's dtype; both strided matrices of one shape."""

    def prepare_copies(self, copies: list[ScaledCopy]) -> Any:
        """Prepare `copies` (at least one, sources contiguous) for `run_copies`. Only values may change later."""

    def run_copies(self, prepared: Any) -> None:
        """`copy_scaled` for each of the prepared copies."""

    def add_adapter_gradients(
        self, dy_TNP: Tensor, x_TKP: Tensor, adapter_slices: list[AdapterSlice], out_features: int, in_features: int
    ) -> None:
        """Add v^T x to each adapter's dA and s dy^T u to its dB, in fp32.

        Columns of `dy_TNP` from `out_features` on hold v = s dy B, those of `x_TKP` from `in_features` on u = x A^T.
        """

    def scale_columns(self, x_TN: Tensor, scale_N: Tensor, bias_N: Tensor | None) -> None:
        """x = scale x + bias in place; `scale_N` in fp32."""

    def scale_columns_backward(
        self, dy_TN: Tensor, y_TN: Tensor, scale_N: Tensor, bias_N: Tensor | None, dot_N: Tensor
    ) -> None:
        """Write the sum over tokens of dy (y - bias) into the fp32 `dot_N`, then dy = scale dy in place."""

    def dropout(
        self,
        x_TK: Tensor,
        out_TK: Tensor,
        seed: Tensor,
        stream: int,
        p: float,
        first_row: int = 0,
        *,
        add: bool = False,
    ) -> None:
        """out = x with each element zeroed with probability p, the others divided by 1 - p; `add`: out += that.

        Which are zeroed is a function of the 0-dim int32 `seed`, `stream`, row and column alone; rows count from
        `first_row`. Both matrices may be strided.
        """

    def dequantize_nf4(self, packed: Tensor, absmax: Tensor, code: Tensor, block: int, out_NK: Tensor) -> None:
        """Write the NF4 weight of `packed` (two values to a byte, row-major) into the strided `out_NK`.

        `absmax` scales each run of `block` values; `code` holds the 16 values before scaling.
        """

    def rms_norm(
        self,
        x_TD: Tensor,
        delta_TD: Tensor | None,
        weight_D: Tensor,
        eps: float,
        out_TD: Tensor,
        total_TD: Tensor | None = None,
    ) -> Tensor:
        """Write norm(x + delta) into the strided `out_TD`; return x + delta, in `total_TD` where it is given.

        Without a delta that is `x_TD` itself, and nothing is written to `total_TD`.
        """

    def rms_norm_backward(self, dout_TD: Tensor, x_TD: Tensor, weight_D: Tensor, eps: float, dx_TD: Tensor) -> None:
        """Add the gradient of norm(x) with respect to x to the strided `dx_TD`."""

    def rope(
        self, x_TC: Tensor, batch: DeviceBatch, rope: RopeTable, shape: AttentionShape, *, inverse: bool = False
    ) -> None:
        """Rotate the queries and keys in `x_TC` in place; `inverse` rotates back, which is the gradient."""

    def qk_norm(self, x_TC: Tensor, norms: QkNorm, shape: AttentionShape, out_TC: Tensor) -> None:
        """Write the normalised queries and keys of `x_TC`, and its values as they are, into `out_TC`."""

    def qk_norm_backward(self, dx_TC: Tensor, x_TC: Tensor, norms: QkNorm, shape: AttentionShape) -> None:
        """Turn the gradient of the normalised queries and keys in `dx_TC` into that of `x_TC`, in place."""

    def glu(self, x_T2F: Tensor, out_TF: Tensor, activation: str) -> None:
        """Write activation(gate) * up into the strided `out_TF`; `x_T2F` holds gate and up side by side.

        `activation`: "silu" or "gelu_pytorch_tanh".
        """

    def glu_backward(self, dout_TF: Tensor, x_T2F: Tensor, dx_T2F: Tensor, activation: str) -> None:
        """Write the gradients of gate and up side by side into the strided `dx_T2F`, which may be `x_T2F` itself."""

    def attention(
        self, x_TC: Tensor, batch: DeviceBatch, shape: AttentionShape, out_TD: Tensor, sinks_H: Tensor | None = None
    ) -> Any:
        """Causal attention inside each document, into the strided `out_TD`; returns what the backward pass needs.

        `sinks_H`: a score of each head that takes its share of the softmax and has no value (arXiv 2309.17453).
        """

    def attention_backward(
        self,
        dout_TD: Tensor,
        x_TC: Tensor,
        out_TD: Tensor,
        saved: Any,
        batch: DeviceBatch,
        shape: AttentionShape,
        dx_TC: Tensor,
    ) -> None:
        """Write the gradients of queries, keys and values side by side into the strided `dx_TC`."""

    def sink_gradient(
        self,
        dout_TD: Tensor,
        out_TD: Tensor,
        saved: Any,
        sinks_H: Tensor,
        batch: DeviceBatch,
        shape: AttentionShape,
    ) -> Tensor:
        """The gradient of the sinks that `attention` was given, (H,) in fp32."""

    def cross_entropy(
        self, logits_SV: Tensor, target_S: Tensor, scale: Tensor, metrics_3: Tensor, transform: LogitTransform
    ) -> Tensor:
        """Replace the head's products by the gradient of `scale` times the summed loss, in place.

        Adds to the fp32 `metrics_3` the summed loss, the number of targets that were the most likely token, and the
        summed entropy. Rows whose target is -100 are ignored. Returns each row's loss in fp32, (S,).
        """
