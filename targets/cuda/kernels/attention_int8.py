"""Flash attention on int8 codes of q and k: int32 scores, float32 statistics, then products in 16 bits or in E4M3.

    s[i, j] = Σ_d q[i, d]·k[j, d]                        int32, exact; one static scale a head for q and one for k
    t[i, j] = s[i, j]·a + mask[i, j]·log2 e              a = q_scale·k_scale·scale·log2 e: softmax in base 2
    p[i, j] = 2^(t[i, j] − max_j t[i, j] + shift)        running maximum over blocks of keys
    y[i]    = Σ_j p[i, j]·v[j] / Σ_j p[i, j] · v_scale   v: bfloat16/float16 (shift 0), or E4M3 (shift = log2 448)

p in E4M3. Shift puts the largest p at 448, the format's end, so a weight may be 2^18.8 times smaller than its row's
largest before it rounds to zero, 2^14.8 before it loses bits; without it 2^10 and 2^6, and of 32,760 keys with small
weights a whole background would vanish. The factor is in both sums and cancels. Rounding is to nearest, at most 2^-4
of a weight: y is off by at most 2^-4·Σ p|v| / Σ p, in practice by about that over √(keys that count).

Sums of E4M3 products. Hopper's tensor cores keep about 14 bits of these sums and cut the rest off; over 32,760 keys
that shrinks y by per cents. So each block of keys starts a sum of its own, and float32 registers add them: in the one
fused multiply-add that rescales the older sum anyway.

int32 to float32 without a conversion: sums start at 0x4B400000, the bits of 1.5·2^23, so their bits are those of the
float32 1.5·2^23 + s, as |s| ≤ 2^7·2^7·256 = 2^22. The constant leaves with the maximum, in the multiply-add before 2^x.

Layouts. q, k, v as the linear layers write them, [B, S, H·D], any row stride (slices of one qkv tensor too). wgmma
wants 8-bit operands contiguous along the summed dimension: keys, for v. A kernel of its own lays E4M3 v out anew,
[B·H, blocks of keys, D, BLOCK_N]: it reads and writes S·H·D bytes once, 0.02 ms for Wan-1.3B, 0.3 % of the attention.
It also permutes keys within each 16: an accumulator has columns 2t, 2t+1, 8+2t, 8+2t+1 in the thread that as an
operand must have 4t … 4t+3. With v in that order p stays where it is, and needs no shuffle between lanes.

Floor on an H200, Wan-1.3B at 480 x 832 x 81 (S = 32,760, 12 heads of 128, 1.29e10 scores a layer), 132 SMs, 1.83 GHz:

    q·k in int8, 1,979 TOP/s  1.67 ms    p·v in 16 bits, 989 TFLOP/s  3.33 ms    p·v in E4M3  1.67 ms
    2^x, 16 a clock and SM  3.33 ms      all instructions, 128 a clock and SM: 9 to 11 a score  3.7 to 4.6 ms
    k, v from L2, 3 (E4M3: 2) bytes a score and 128 queries: 26 (18) bytes a clock and SM at 6 ms, of about 25 to 30

Tensor cores and the rest can overlap: 16 bits cannot end before 5.0 ms, E4M3 not before 3.7; one after the other they
take 9.1 and 7. bfloat16 attention needs 6.7 on the tensor cores alone, about 10 in practice.
Triton waits for scores before it goes on, so a program overlaps little: two programs of 4 warps (128 queries each,
64 keys at a time, at most 255 registers) share a multiprocessor, one in its exponentials while the other multiplies.
64 queries a program would ask L2 for twice the bytes, more than it has. With E4M3 the sums of a block take 64
registers more: 8 warps, one program. Expect 6 to 7 ms in 16 bits and 6 to 8 in E4M3.

PARTS: a program's queries in parts of BLOCK_M, one after the other against each block of keys: the product of one
part with v runs on into the scores of the next, and both read the same keys and values.
Blocks of keys that lie wholly inside jump over the masking of keys. (The last block after the loop instead, a second
copy of the code, made ptxas spill, or wait after each product.)
"""

# mypy: disable-error-code="assignment"
# In a kernel tuples grow: Triton unrolls its loops, mypy does not.

from __future__ import annotations

from math import log2

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from vdq_export.targets.cuda.kernels import _config
from vdq_export.targets.cuda.kernels._backend import blocks, power_of_two
from vdq_export.targets.cuda.kernels._config import Config
from vdq_export.targets.cuda.kernels._epilogue import code_form, quantize, stored
from vdq_export.targets.cuda.kernels._numbers import float_dot, narrow, to_float8
from vdq_export.targets.cuda.kernels._quant import FLOAT8, Quant

WIDEST = 256  # channels of a head: beyond, |s| could pass 2^22
LEAST_WIDTH = 32  # summed codes of one wgmma
LEAST_KEYS = 32  # of p·v in E4M3
ALIGNMENT = 16  # bytes: the copy engine's starts and strides
LOG2_E = 1.4426950408889634

_LOG2_E = tl.constexpr(LOG2_E)
_MAGIC_BITS = tl.constexpr(0x4B400000)  # 1.5 · 2^23 as float32
_MAGIC = tl.constexpr(12582912.0)
_SHIFT = tl.constexpr(log2(448.0))
_LEAST = tl.constexpr(-2.0e38)  # a finite mask stays finite in base 2: float32's least value is no infinity


@triton.jit
def _lay_out(v, tiles, batch_stride, row_stride, sk, HEADS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
             BLOCK_N: tl.constexpr):  # fmt: skip
    """One block of keys of one head: bytes v[key, d] to tiles[d, place], zero where there is no key or channel."""
    block, sample, head = tl.program_id(0), tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    place = tl.arange(0, BLOCK_N)
    # place 16i + 4t + 2j + b holds the key of column 16i + 8j + 2t + b
    column = place // 16 * 16 + place // 2 % 2 * 8 + place // 4 % 4 * 2 + place % 2
    keys = block * BLOCK_N + column
    d = tl.arange(0, BLOCK_D)
    start = v + sample.to(tl.int64) * batch_stride + head * D
    inside = (keys[:, None] < sk) & (d[None, :] < D)
    codes = tl.load(start + keys[:, None].to(tl.int64) * row_stride + d[None, :], mask=inside, other=0)
    tile = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + block
    tl.store(tiles + tile * BLOCK_D * BLOCK_N + d[:, None] * BLOCK_N + place[None, :], codes.T)


@triton.jit
def _load_rows(x, sample, head, start, stop, batch_stride, ROW: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
               BLOCK_N: tl.constexpr, TMA: tl.constexpr):  # fmt: skip
    """Rows start … start + BLOCK_N of one head, [BLOCK_N, BLOCK_D]; zero from `stop` on.

    Channels behind D are zero, or under TMA the next head's; then q comes by pointers, with zeros there.
    """
    if TMA:
        rows = x.load([sample, start, head * D]).reshape(BLOCK_N, BLOCK_D)
    else:
        n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        first = x + sample.to(tl.int64) * batch_stride + head * D + tl.cast(start, tl.int64) * ROW
        at = first + n[:, None] * ROW + d[None, :]
        rows = tl.load(at, mask=(n < stop - start)[:, None] & (d < D)[None, :], other=0.0)
    return rows


@triton.jit
def _load_tile(tiles, tile, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, TMA: tl.constexpr):
    """One block of keys of v, [BLOCK_N, BLOCK_D]."""
    if TMA:
        rows = tiles.load([tile * BLOCK_D, 0])
    else:
        d, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
        rows = tl.load(tiles + tile.to(tl.int64) * (BLOCK_D * BLOCK_N) + d[:, None] * BLOCK_N + n[None, :])
    return rows.T


@triton.jit
def _weights(s, bias, start, sk, a, offset, SHIFT: tl.constexpr, BLOCK_N: tl.constexpr):
    """Weights p of a block of scores, the new offset of each row, and what the older sums are to be multiplied by.

    Offsets are what is added to scores before 2^x: shift − maximum, with masks; without, − 1.5·2^23·a as well.
    """
    f = (s + _MAGIC_BITS).to(tl.float32, bitcast=True)
    if start + BLOCK_N > sk:  # a branch of the whole program: other blocks jump over it
        known = tl.arange(0, BLOCK_N) < sk - start
        f = tl.where(known[None, :], f, float("-inf"))
    if bias is not None:
        t = (f - _MAGIC) * a + bias
        lower = tl.minimum(offset, -tl.max(t, 1) + SHIFT)
        added = tl.where(lower == float("inf"), 0.0, lower)  # no key seen yet: −inf + 0, not −inf + inf
        p = tl.math.exp2(t + added[:, None])
    else:
        lower = tl.minimum(offset, -tl.max(f, 1) * a + SHIFT)
        added = lower
        p = tl.math.exp2(tl.fma(f, a, lower[:, None]))
    return p, lower, tl.math.exp2(added - offset)


@triton.jit
def _as_operand(p, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """p in E4M3, keys in the order of _lay_out: a renaming of registers."""
    p8 = to_float8(p).reshape(BLOCK_M, BLOCK_N // 16, 2, 4, 2)
    return p8.permute(0, 1, 3, 2, 4).reshape(BLOCK_M, BLOCK_N)


@triton.jit
def _load_bias(mask, sample, head, row, sq, start, sk, mask_sample, mask_head, mask_row, mask_key,
               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):  # fmt: skip
    """The mask of a block of scores, in base 2; −inf stays, other values stay finite."""
    m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    corner = mask + sample.to(tl.int64) * mask_sample + head.to(tl.int64) * mask_head + row.to(tl.int64) * mask_row
    at = corner + tl.cast(start, tl.int64) * mask_key + m[:, None] * mask_row + n[None, :] * mask_key
    bias = tl.load(at, mask=(m < sq - row)[:, None] & (n < sk - start)[None, :], other=0.0).to(tl.float32)
    return tl.where(bias == float("-inf"), bias, tl.maximum(bias, _LEAST) * _LOG2_E)


@triton.jit
def _block(
    q, keys, values, mask, sample, head, row, sq, start, sk, a, offset, total, sums,
    mask_sample, mask_head, mask_row, mask_key,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, FP8_V: tl.constexpr,
):  # fmt: skip
    """Rows of queries against one block of keys: their offsets, sums of weights and weighted sums of v after it."""
    s = tl.dot(q, keys.T)
    bias = None
    if mask is not None:
        bias = _load_bias(mask, sample, head, row, sq, start, sk, mask_sample, mask_head, mask_row, mask_key,
                          BLOCK_M, BLOCK_N)  # fmt: skip
    p, offset, rescale = _weights(s, bias, start, sk, a, offset, _SHIFT if FP8_V else 0.0, BLOCK_N)
    total = total * rescale + tl.sum(p, 1)
    if FP8_V:
        sums = tl.fma(sums, rescale[:, None], float_dot(_as_operand(p, BLOCK_M, BLOCK_N), values, None))
    else:
        sums = float_dot(narrow(p, values.dtype), values, sums * rescale[:, None])
    return offset, total, sums


@triton.jit
def _store(part, sample, head, row, sq, y, out, out_scale, out_zero, HEADS: tl.constexpr, D: tl.constexpr,
           BLOCK_D: tl.constexpr, LOW: tl.constexpr, HIGH: tl.constexpr, FP8: tl.constexpr):  # fmt: skip
    """A tile of y, as floats, as codes or both; [B, Sq, H·D], contiguous."""
    m, d = tl.arange(0, part.shape[0]), tl.arange(0, BLOCK_D)
    inside = (m < sq - row)[:, None] & (d < D)[None, :]
    corner = (sample.to(tl.int64) * sq + row) * (HEADS * D) + head * D
    at = m[:, None] * (HEADS * D) + d[None, :]
    if y is not None:
        tl.store(y + corner + at, narrow(part, y.dtype.element_ty), mask=inside)
    if out is not None:
        tl.store(out + corner + at, quantize(part, out_scale, out_zero, LOW, HIGH, FP8), mask=inside)


@triton.jit(do_not_specialize_on_alignment=["q_scale", "k_scale", "v_scale", "out_scale", "out_zero"])
def _kernel(
    q, k, v, mask, q_scale, k_scale, v_scale, out_scale, out_zero, y, out, scale, sq, sk,
    q_batch, k_batch, v_batch, mask_sample, mask_head, mask_row, mask_key,
    HEADS: tl.constexpr, Q_ROW: tl.constexpr, K_ROW: tl.constexpr, V_ROW: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, FP8_V: tl.constexpr,
    LOW: tl.constexpr, HIGH: tl.constexpr, FP8: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """PARTS · BLOCK_M queries of one head of one sample. q, k, v: descriptors (TMA) or pointers; E4M3 v laid out."""
    sample, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    row = tl.program_id(0) * (BLOCK_M * PARTS)
    a = tl.load(q_scale + head) * tl.load(k_scale + head) * scale * _LOG2_E
    queries, offsets, totals, sums = (), (), (), ()
    for part in tl.static_range(PARTS):
        at = row + part * BLOCK_M
        rows = _load_rows(q, sample, head, at, sq, q_batch, Q_ROW, D, BLOCK_D, BLOCK_M, TMA and D == BLOCK_D)
        queries = queries + (rows,)  # noqa: RUF005 (Triton has no *)
        offsets = offsets + (tl.full((BLOCK_M,), float("inf"), tl.float32),)  # noqa: RUF005
        totals = totals + (tl.zeros((BLOCK_M,), tl.float32),)  # noqa: RUF005
        sums = sums + (tl.zeros((BLOCK_M, BLOCK_D), tl.float32),)  # noqa: RUF005
    for start in tl.range(0, sk, BLOCK_N):
        keys = _load_rows(k, sample, head, start, sk, k_batch, K_ROW, D, BLOCK_D, BLOCK_N, TMA)
        if FP8_V:
            tile = (sample * HEADS + head) * tl.cdiv(sk, BLOCK_N) + start // BLOCK_N
            values = _load_tile(v, tile, BLOCK_D, BLOCK_N, TMA)
        else:
            values = _load_rows(v, sample, head, start, sk, v_batch, V_ROW, D, BLOCK_D, BLOCK_N, TMA)
        new_offsets, new_totals, new_sums = (), (), ()
        for part in tl.static_range(PARTS):
            offset, total, summed = _block(
                queries[part], keys, values, mask, sample, head, row + part * BLOCK_M, sq, start, sk, a, offsets[part],
                totals[part], sums[part], mask_sample, mask_head, mask_row, mask_key, BLOCK_M, BLOCK_N, FP8_V,
            )  # fmt: skip
            new_offsets = new_offsets + (offset,)  # noqa: RUF005
            new_totals = new_totals + (total,)  # noqa: RUF005
            new_sums = new_sums + (summed,)  # noqa: RUF005
        offsets, totals, sums = new_offsets, new_totals, new_sums
    for part in tl.static_range(PARTS):
        total = totals[part]
        share = 1.0 / tl.where(total > 0.0, total, float("inf"))  # a row whose mask shuts out every key is zero
        if v_scale is not None:
            share *= tl.load(v_scale + head)
        _store(sums[part] * share[:, None], sample, head, row + part * BLOCK_M, sq, y, out, out_scale, out_zero,
               HEADS, D, BLOCK_D, LOW, HIGH, FP8)  # fmt: skip


def tiles_of(v: torch.Tensor, heads: int, block_d: int, block_n: int) -> torch.Tensor:
    """E4M3 v[B, Sk, H·D] as the kernel multiplies it: [B·H·blocks·block_d, block_n], 16 keys at a time permuted."""
    samples, sk, width = v.shape
    count = blocks(sk, block_n)
    tiles = torch.empty(samples * heads * count * block_d, block_n, dtype=torch.uint8, device=v.device)
    _lay_out[(count, samples * heads)](
        v.view(torch.uint8), tiles, v.stride(0), v.stride(1), sk, heads, width // heads, block_d, block_n,
        num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return tiles.view(FLOAT8)


def launch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, heads: int, scale: float, q_scale: torch.Tensor,
    k_scale: torch.Tensor, v_scale: torch.Tensor | None = None, mask: torch.Tensor | None = None,
    quant: Quant | None = None, keep: bool = True, dtype: torch.dtype = torch.bfloat16, config: Config | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:  # fmt: skip
    """(y, codes), either None; see attention.attention. At least one query and one key, heads up to WIDEST channels."""
    samples, sq, width = q.shape
    sk, d = k.shape[1], width // heads
    if v.dtype == FLOAT8 and _config.capability() < (8, 9):  # no such type there; float16 holds each of its numbers
        v = v.to(torch.float16)
    eight = v.dtype == FLOAT8
    q, k, v = (rows if rows.stride(2) == 1 else rows.contiguous() for rows in (q, k, v))
    if config is None:

        def run(one: Config) -> object:
            return launch(q, k, v, heads=heads, scale=scale, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale,
                          mask=mask, quant=quant, keep=keep, dtype=dtype, config=one)  # fmt: skip

        config = _config.config("attention", run, m=sq, n=sk, k=d, v="fp8" if eight else "float",
                                masked=mask is not None)  # fmt: skip
    block_m, parts, block_d = config["BLOCK_M"], config["PARTS"], power_of_two(d, LEAST_WIDTH)
    block_n = max(config["BLOCK_N"], LEAST_KEYS) if eight else config["BLOCK_N"]
    values = tiles_of(v, heads, block_d, block_n) if eight else v
    tma = (
        bool(config["TMA"])
        and width >= block_d
        and all(_copyable(rows, d) for rows in ((q, k) if eight else (q, k, v)))
    )
    y = torch.empty(samples, sq, width, dtype=dtype, device=q.device) if keep else None
    codes = None if quant is None else torch.empty(samples, sq, width, dtype=quant.dtype, device=q.device)
    form = code_form(quant)
    where = (0, 0, 0, 0) if mask is None else mask.expand(samples, heads, sq, sk).stride()
    _kernel[(blocks(sq, block_m * parts), samples * heads)](
        _rows(q, block_m, block_d) if tma and d == block_d else q, _rows(k, block_n, block_d) if tma else k,
        values if not tma else _tiles(values, block_d, block_n) if eight else _rows(v, block_n, block_d),
        mask, q_scale, k_scale, v_scale, None if quant is None else quant.scale, None if quant is None else quant.zero,
        y, stored(codes, form), scale, sq, sk, q.stride(0), k.stride(0), v.stride(0), *where,
        HEADS=heads, Q_ROW=q.stride(1), K_ROW=k.stride(1), V_ROW=v.stride(1), D=d, BLOCK_D=block_d, FP8_V=eight,
        LOW=-128 if quant is None else quant.low, HIGH=127 if quant is None else quant.high, FP8=form,
        BLOCK_M=block_m, BLOCK_N=block_n, PARTS=parts, TMA=tma,
        num_warps=config["num_warps"], num_stages=config["num_stages"], enable_fp_fusion=True,
    )  # fmt: skip
    return y, codes


def _copyable(x: torch.Tensor, d: int) -> bool:
    """Whether the copy engine reads it: all that a head's block can start at is a whole 16 bytes."""
    steps = (d, x.stride(1), x.stride(0) if x.shape[0] > 1 else 0)
    return all(at % ALIGNMENT == 0 for at in (x.data_ptr(), *(step * x.element_size() for step in steps)))


def _rows(x: torch.Tensor, block_n: int, block_d: int) -> TensorDescriptor:
    """Blocks of rows of x[B, S, H·D]; zero outside a sample's rows."""
    samples = x.shape[0]
    strides = [x.stride(0) if samples > 1 else x.shape[1] * x.stride(1), x.stride(1), 1]
    return TensorDescriptor(x, list(x.shape), strides, [1, block_n, block_d])


def _tiles(tiles: torch.Tensor, width: int, block_n: int) -> TensorDescriptor:
    return TensorDescriptor(tiles, list(tiles.shape), [block_n, 1], [width, block_n])
