"""One decode step: the logits that follow one token of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from parley.inference.cpu.attention import attend
from parley.inference.kv_cache import KVCache
from parley.inference.model import DecoderModel
from parley.inference.rotary import QkvRotary
from parley.inference.slot_state import ADAPTER, POSITION, TOKEN, SlotState
from parley.train_step.ops import AttentionShape


def decode_step(model: DecoderModel, cache: KVCache, rotary: QkvRotary, state: SlotState) -> Tensor:
    """fp32 logits (B, V) after each row's token, whose keys and values are written to the cache.

    `state` is on the host; the model and the cache may be on a GPU.
    """
    weights, device = model.weights, model.weights.device
    position_B = state.ints(POSITION).long().to(device)
    row_B = torch.arange(len(position_B), device=device)
    # Attention reads the cache up to the longest row; a mask hides the rest from shorter ones.
    length = int(state.ints(POSITION).max()) + 1
    rotary_at_positions = rotary.gather(position_B)
    masks = [_mask(position_B, length, shape, weights.dtype) for shape, _ in rotary.kinds]

    def attention(index: int, qkv_BC: Tensor) -> Tensor:
        layer, shape, cached_B2GLE = weights.layers[index], weights.layers[index].shape, cache.layers[index]
        if layer.qk_norm is not None:
            model.ops.qk_norm(qkv_BC, layer.qk_norm, shape, qkv_BC)
        x_BHE = rotary.rotate(index, qkv_BC, rotary_at_positions)
        kv_B2GE = x_BHE[:, shape.heads :].unflatten(1, (2, shape.kv_heads))
        if len(row_B) == 1:  # a copy costs less than a scatter
            cached_B2GLE[0, :, :, length - 1].copy_(kv_B2GE[0])
        else:
            cached_B2GLE[row_B, :, :, position_B] = kv_B2GE
        # Query heads that share a key head are queries of one head (B, G, H / G, E), so that no key is repeated.
        q_BGHE = x_BHE[:, : shape.heads].unflatten(1, (shape.kv_heads, -1))
        k_BGLE, v_BGLE = cached_B2GLE[: len(row_B), :, :, :length].unbind(1)
        out_BGHE = attend(q_BGHE, k_BGLE, v_BGLE, shape, masks[rotary.kind_of_layer[index]])
        return out_BGHE.reshape(len(row_B), -1)

    h_BD = model.embed(state.ints(TOKEN).to(device))
    model.forward(h_BD, adapter_rows(state.floats(ADAPTER)[:, None].to(device, h_BD.dtype)), attention)
    return model.logits(h_BD)


def adapter_rows(adapter_T1: Tensor) -> Tensor | None:
    """None where no row uses the adapter, so that its products are skipped."""
    return adapter_T1 if bool(adapter_T1.any()) else None


def _mask(position_B: Tensor, length: int, shape: AttentionShape, dtype: torch.dtype) -> Tensor | None:
    """Minus infinity where a row's query does not see a cached position, (B, 1, 1, L); None where all see all."""
    if len(position_B) == 1 and shape.window is None:
        return None
    index_L = torch.arange(length, device=position_B.device)
    hidden_BL = index_L > position_B[:, None]
    if shape.window is not None:
        hidden_BL |= index_L <= position_B[:, None] - shape.window
    return torch.zeros_like(hidden_BL, dtype=dtype).masked_fill_(hidden_BL, -torch.inf)[:, None, None]
