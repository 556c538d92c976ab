"""The operations a step is made of besides matrix products, and who carries them out.

`reference` writes each in plain PyTorch; `kernels` in Triton. Both keep to the one protocol below, so that a test
can set them side by side and the step does not know which it runs on.

Shape suffixes: T tokens, D hidden, K columns in (in attention: key-value heads), N columns out, P spare columns,
R rank, F feed-forward, H heads, E head size, V vocabulary,
C = (H + 2K) E columns of queries, keys and values side by side, S supervised tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from parley.train_step.packed_batch import Rows


@dataclass(frozen=True)
class AttentionShape:
    """Heads of one attention layer. `window`: how many tokens back a query sees, None for all."""

    heads: int
    kv_heads: int
    size: int
    scale: float
    window: int | None = None

    @property
    def columns(self) -> int:
        return (self.heads + 2 * self.kv_heads) * self.size

    def parts(self, x_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (T, H, E), keys (T, K, E) and values (T, K, E) of rows that hold them side by side."""
        sizes = [self.heads * self.size, self.kv_heads * self.size, self.kv_heads * self.size]
        q, k, v = x_TC[:, : self.columns].split(sizes, dim=1)
        return tuple(part.unflatten(1, (-1, self.size)) for part in (q, k, v))


@dataclass(frozen=True)
class Rope:
    """Cosines and sines by position, for half a head, with the scaling the model's own module gives them."""

    cos_PE: Tensor
    sin_PE: Tensor


@dataclass(frozen=True)
class HeadNorms:
    """RMS norms of each query and key head before rotation (Qwen3)."""

    q_E: Tensor
    k_E: Tensor
    eps: float


@dataclass(frozen=True)
class Adapter:
    """Views of one projection's LoRA weights and gradients in the flat buffers, fp32."""

    a_RK: Tensor
    b_NR: Tensor
    da_RK: Tensor
    db_NR: Tensor
    scale: float


@dataclass(frozen=True)
class Slot:
    """Where one adapter sits: its rows of y and its columns among the P."""

    adapter: Adapter
    rows: slice
    columns: slice


Copy = tuple[Tensor, Tensor, float]  # source, out, scale


class Ops(Protocol):
    def copy_scaled(self, source: Tensor, out: Tensor, scale: float) -> None:
        """out = scale * source, in out's dtype; both strided matrices of one shape."""

    def copy_table(self, copies: list[Copy]) -> Any:
        """Prepare `copies` (one or more, sources contiguous) for `copy_all`; the tensors may change, not move."""

    def copy_all(self, table: Any) -> None:
        """`copy_scaled` for every copy of the table."""

    def add_adapter_gradients(
        self, dy_TNP: Tensor, x_TKP: Tensor, slots: list[Slot], columns_out: int, columns_in: int
    ) -> None:
        """Add v^T x to each adapter's dA and s dy^T u to its dB, in fp32.

        The columns of `dy_TNP` from `columns_out` on hold v = s dy B, those of `x_TKP` from `columns_in` on u = x A^T.
        """

    def write_nf4(self, packed: Tensor, absmax: Tensor, code: Tensor, block: int, out_NK: Tensor) -> None:
        """Write the NF4 weight that `packed` holds (two to a byte, row by row) into the strided `out_NK`."""

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

    def rope(self, x_TC: Tensor, rows: Rows, rope: Rope, shape: AttentionShape, *, inverse: bool = False) -> None:
        """Rotate the queries and keys in `x_TC` in place; `inverse` rotates back, which is the gradient."""

    def swiglu(self, x_T2F: Tensor, out_TF: Tensor) -> None:
        """Write silu(gate) * up into the strided `out_TF`; `x_T2F` holds gate and up side by side."""

    def swiglu_backward(self, dout_TF: Tensor, x_T2F: Tensor, dx_T2F: Tensor) -> None:
        """Write the gradients of gate and up side by side into the strided `dx_T2F`, which may be `x_T2F` itself."""

    def attention(self, x_TC: Tensor, rows: Rows, shape: AttentionShape, out_TD: Tensor) -> Any:
        """Causal attention inside each document, into the strided `out_TD`; returns what the backward pass needs."""

    def attention_backward(
        self,
        dout_TD: Tensor,
        x_TC: Tensor,
        out_TD: Tensor,
        saved: Any,
        rows: Rows,
        shape: AttentionShape,
        dx_TC: Tensor,
    ) -> None:
        """Write the gradients of queries, keys and values side by side into the strided `dx_TC`."""

    def cross_entropy(self, logits_SV: Tensor, target_S: Tensor, scale: Tensor, figures_3: Tensor) -> None:
        """Turn the logits into the gradient of `scale` times the summed loss, in place.

        Adds to the fp32 `figures_3` the summed loss, the count of tokens that were the most likely, and the summed
        entropy. Rows whose target is -100 count for nothing.
        """
