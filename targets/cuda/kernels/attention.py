"""Attention: int8 codes of q and k through our own kernel, floats through torch's best; then codes for what follows.

    y = softmax(q·kᵀ·scale + mask)·v      per head; q, k: floats, or codes times one static scale a head
    codes = quant(y)

q[B, Sq, H·D], k, v[B, Sk, H·D], as linear layers write them. A row whose mask is −inf for every key is zero, and so is
all of y without keys. What the int8 kernel does, and what it costs: attention_int8.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from vdq_export.targets.cuda.kernels import attention_int8
from vdq_export.targets.cuda.kernels._backend import runs_triton
from vdq_export.targets.cuda.kernels._quant import FLOAT8, Quant
from vdq_export.targets.cuda.kernels.normalize import normalize

Result = tuple[torch.Tensor | None, torch.Tensor | None]


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, heads: int, scale: float,
    q_scale: torch.Tensor | None = None, k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None,
    mask: torch.Tensor | None = None, quant: Quant | None = None, keep: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Result:  # fmt: skip
    """(y in `dtype` if `keep`, codes if `quant`).

    q_scale, k_scale[H]: q and k are int8 codes, symmetric. v: floats, or float8e4m3fn with v_scale[H].
    mask: floats to add, broadcastable to [B, H, Sq, Sk].
    """
    known = q.numel() > 0 and k.shape[1] > 0 and q.shape[2] // heads <= attention_int8.WIDEST and scale > 0
    if q_scale is not None and k_scale is not None and known and runs_triton(q):
        return attention_int8.launch(
            q, k, v, heads=heads, scale=scale, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, mask=mask,
            quant=quant, keep=keep, dtype=dtype,
        )  # fmt: skip
    if q_scale is not None or v.dtype == FLOAT8:
        return reference(
            q, k, v, heads=heads, scale=scale, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale, mask=mask,
            quant=quant, keep=keep, dtype=dtype,
        )  # fmt: skip
    return _finish(_softmax(q, k, v, heads, scale, mask), quant, keep, dtype)


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, heads: int, scale: float,
    q_scale: torch.Tensor | None = None, k_scale: torch.Tensor | None = None, v_scale: torch.Tensor | None = None,
    mask: torch.Tensor | None = None, quant: Quant | None = None, keep: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Result:  # fmt: skip
    """The same of any q, k, v in float32. Products of codes are exact there: 127²·D < 2^24."""
    q, k, v = _values(q, q_scale), _values(k, k_scale), _values(v, v_scale)
    y = _softmax(q, k, v, heads, scale, mask)
    return y.to(dtype) if keep else None, None if quant is None else quant.codes(y)


def _values(codes: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    """What the codes of [B, S, H·D] stand for, one scale a head."""
    if scale is None:
        return codes.float()
    values: torch.Tensor = codes.float().unflatten(2, (scale.numel(), -1)) * scale.reshape(-1, 1)
    return values.flatten(2)


def _softmax(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, scale: float, mask: torch.Tensor | None
) -> torch.Tensor:
    """softmax(q·kᵀ·scale + mask)·v of floats."""
    if not q.numel() or not k.shape[1]:
        return torch.zeros_like(q)
    q, k, v = (rows.unflatten(2, (heads, -1)).transpose(1, 2) for rows in (q, k, v))
    if mask is None:
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=_narrowed(mask, q.dtype), scale=scale)
    lost = torch.isneginf(mask).all(-1, keepdim=True)  # torch's ways differ on these rows
    return torch.where(lost, 0, y).transpose(1, 2).flatten(2)


def _narrowed(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Finite numbers stay finite: the lowest of float32 in a whole row is no row without keys."""
    limits = torch.finfo(dtype)
    return torch.where(mask.isinf(), mask, mask.clamp(limits.min, limits.max)).to(dtype)


def _finish(y: torch.Tensor, quant: Quant | None, keep: bool, dtype: torch.dtype) -> Result:
    """y as floats and as codes; on the device the codes are one kernel that reads y once."""
    codes = None
    if quant is not None and runs_triton(y) and y.numel():
        codes = normalize(y.reshape(-1, y.shape[2]), norm="none", quant=quant, keep=False)[1]
        codes = None if codes is None else codes.reshape(y.shape)
    elif quant is not None:
        codes = quant.codes(y)
    return y.to(dtype) if keep else None, codes
