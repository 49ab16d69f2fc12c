"""Attention and rotary embedding where no kernel of ours replaces them: torch's scaled dot product attention.

Legend: B batch, S queries, T keys, H heads, D channels a head, R ≤ D channels that rotate.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from vdq_export.errors import CompileError


def heads_apart(x: Tensor, heads: int) -> Tensor:
    """[B, S, H·D] -> [B, H, S, D], a view; four axes stay."""
    return x if x.ndim == 4 else x.view(*x.shape[:-1], heads, -1).transpose(1, 2)


def multi_head(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None, key_padding_mask: None = None,
    attention_bias: Tensor | None = None, *, num_heads: int, scale: float | None = None, mask_filter_value: float = 0,
    unidirectional: int = 0,
) -> Tensor:  # fmt: skip
    """com.microsoft.MultiHeadAttention: query[B, S, H·D], key and value [B, T, H·D] or [B, H, T, D] -> [B, S, H·D]."""
    if bias is not None:
        width = query.shape[-1]
        parts = torch.split(bias, [width, width, bias.numel() - 2 * width])
        query, key, value = query + parts[0], key + parts[1], value + parts[2]
    q, k, v = (heads_apart(one, num_heads) for one in (query, key, value))
    mask = None if attention_bias is None else attention_bias.to(q.dtype)
    found = F.scaled_dot_product_attention(q, k, v, mask, is_causal=bool(unidirectional), scale=scale or None)
    return found.transpose(1, 2).flatten(2)


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, *, q_num_heads: int = 0,
    kv_num_heads: int = 0, scale: float | None = None, is_causal: int = 0, softcap: float = 0,
    softmax_precision: int = 0, qk_matmul_output_mode: int = 0,
) -> Tensor:  # fmt: skip
    """ONNX's Attention (opset 23), heads apart or merged."""
    if softcap:
        raise CompileError("Attention with softcap")
    q, k, v = heads_apart(query, q_num_heads), heads_apart(key, kv_num_heads), heads_apart(value, kv_num_heads)
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype)
    found = F.scaled_dot_product_attention(
        q, k, v, mask, is_causal=bool(is_causal), scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return found if query.ndim == 4 else found.transpose(1, 2).flatten(2)


def rotary(
    x: Tensor, positions: Tensor | int, cos: Tensor, sin: Tensor, *, interleaved: int = 0, num_heads: int = 0,
    rotary_embedding_dim: int = 0, scale: float = 1.0, is_packed_batching: int = 0,
) -> Tensor:  # fmt: skip
    """com.microsoft.RotaryEmbedding: x[B, S, H·D] or [B, H, S, D]; cos, sin [positions, R/2], float32, as the result.

    positions: of the first token, for all samples, or of every token, int64[B, S].
    """
    merged = x.ndim == 3
    if merged:
        width = x.shape[-1] // num_heads if num_heads else 2 * cos.shape[-1]
        x = x.view(*x.shape[:-1], -1, width).transpose(1, 2)
    tokens = x.shape[2]
    if isinstance(positions, Tensor) and positions.numel() == x.shape[0] * tokens and positions.ndim == 2:
        cos, sin = (table[positions].unsqueeze(1) for table in (cos, sin))
    elif isinstance(positions, Tensor):
        at = positions.reshape(-1, 1) + torch.arange(tokens, device=x.device)
        cos, sin = (table[at].unsqueeze(1) for table in (cos, sin))
    else:
        cos, sin = (table[positions : positions + tokens] for table in (cos, sin))
    turned = rotated(x, cos, sin, bool(interleaved))
    return turned.transpose(1, 2).flatten(2) if merged else turned


def rotary_standard(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | int | None = None, *, interleaved: int = 0,
    num_heads: int = 0, rotary_embedding_dim: int = 0,
) -> Tensor:  # fmt: skip
    """ONNX's RotaryEmbedding (opset 23): the tables are of each sample and token where there are no positions."""
    if positions is not None:
        return rotary(x, positions, cos, sin, interleaved=interleaved, num_heads=num_heads)
    merged = x.ndim == 3
    x = heads_apart(x, num_heads)
    turned = rotated(x, cos.unsqueeze(1), sin.unsqueeze(1), bool(interleaved))
    return turned.transpose(1, 2).flatten(2) if merged else turned


def rotated(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """x[B, H, S, D]; cos, sin broadcast to [B, H, S, R/2]: the first R channels rotate, the others stay."""
    half = cos.shape[-1]
    turning, rest = x[..., : 2 * half], x[..., 2 * half :]
    a, b = (turning[..., 0::2], turning[..., 1::2]) if interleaved else (turning[..., :half], turning[..., half:])
    parts = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(parts, -1).flatten(-2) if interleaved else torch.cat(parts, -1)
    return torch.cat([turned, rest.to(turned.dtype)], -1) if rest.shape[-1] else turned
