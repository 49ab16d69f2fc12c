"""From a row of activations to the codes that a linear reads, in one pass over memory.

    v = norm(x) · weight + bias      norm: none, layer (mean and variance), rms (mean of squares); float32
    v = act(v)
    v = v · scale + shift            scale, shift[B, K]: row m belongs to sample m // (M / B)
    v = v · smooth                   [K]
    v = v · blockdiag(H, …, H)       H[n, n] orthonormal, n = hadamard; on chip (_hadamard.py)
    v = v · post                     [K]
    q = quant(v),  y = v in dtype,  low = v @ down[K, r]

Scales are static: a code needs nothing but its own value, and with norm none tiles cover a part of a row. With a norm
one program holds whole rows in registers where a power of two covers them well, else it reads them twice: part by part
for the statistics, then, from the L2 cache, for the rest. Parts are fetched ahead into shared memory.

Floor: K · (2 read + 1 written) bytes a row of bfloat16 with 8-bit codes, 2 more where y is kept too; r columns of low
cost 2·r bytes and 2 · 2·K·r operations a row. M = 32760 at 4.3 TB/s:

    K                1536     5120     8960    13824
    codes           35 µs   117 µs   205 µs   316 µs
    codes and y     59 µs   195 µs   341 µs   527 µs
    low, r = 32      8 µs    27 µs    47 µs    72 µs      of tensor cores at 800 TFLOP/s, beside the memory's time

Instructions come close: about 20 an element are what an SM issues in that time. A rotation costs more (_hadamard.py).
Vectors of channels, scale and shift come from the caches.

low: bfloat16 `down` is multiplied exactly, v as the sum of two bfloat16 numbers (2^-16 of each), which stays far below
low's rounding to dtype; other types in three products of tf32. Where a rotated tile of 16 rows is too large,
v · H · post @ down is computed as v @ (H · post · down).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from vdq_export.targets.cuda.kernels import _config, _hadamard
from vdq_export.targets.cuda.kernels._backend import blocks, power_of_two, runs_triton
from vdq_export.targets.cuda.kernels._epilogue import LEAST_RANK, activate, code_form, stored
from vdq_export.targets.cuda.kernels._quant import Quant
from vdq_export.targets.cuda.kernels._rows import row_kernel

NORMS = ("none", "layer", "rms")
Outputs = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]
_WHOLE_ROW = 16384  # elements of a tile: 32 a thread at 512 threads
_FETCHED = 4096  # elements of a tile, at most, that is fetched ahead: several of them lie in shared memory
_ROWS_OF_LOW = 16  # the fewest that tl.dot takes
_MOST_RANK = 256  # columns of `down`; their sums lie in registers


@dataclass(frozen=True)
class Steps:
    """What happens to a row, in the order of the module's docstring; keep: y is wanted, in dtype."""

    norm: str = "none"
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    epsilon: float = 1e-6
    act: str = "none"
    scale: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    smooth: torch.Tensor | None = None
    hadamard: int = 0
    post: torch.Tensor | None = None
    quant: Quant | None = None
    down: torch.Tensor | None = None
    keep: bool = True
    dtype: torch.dtype = torch.bfloat16

    @property
    def turned(self) -> bool:
        return self.hadamard > 1

    @property
    def rank(self) -> int:
        return 0 if self.down is None else self.down.shape[1]

    @property
    def samples(self) -> int:
        return max((one.shape[0] for one in (self.scale, self.shift) if one is not None), default=1)

    @property
    def plain(self) -> bool:
        """x reaches the rotation as it is."""
        changed = (self.weight, self.bias, self.scale, self.shift, self.smooth)
        return self.norm == self.act == "none" and all(one is None for one in changed)

    def modulation(self, one: torch.Tensor | None) -> torch.Tensor | None:
        """scale or shift for each sample: one of them may have a single row for all."""
        return None if one is None else one.expand(self.samples, -1).contiguous()

    def outputs(self, m: int, k: int, device: torch.device) -> Outputs:
        """(y, q, low), not yet written."""
        y = torch.empty(m, k, dtype=self.dtype, device=device) if self.keep else None
        q = torch.empty(m, k, dtype=self.quant.dtype, device=device) if self.quant is not None else None
        low = torch.empty(m, self.rank, dtype=self.dtype, device=device) if self.down is not None else None
        return y, q, low


@dataclass(frozen=True)
class Tile:
    """rows × count blocks of `shape`; resident: whole rows."""

    rows: int
    count: int
    shape: _hadamard.Shape
    resident: bool

    @property
    def size(self) -> int:
        return self.rows * self.count * self.shape.size


def normalize(
    x: torch.Tensor,
    *,
    norm: str = "none",
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    epsilon: float = 1e-6,
    act: str = "none",
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    smooth: torch.Tensor | None = None,
    hadamard: int = 0,
    post: torch.Tensor | None = None,
    quant: Quant | None = None,
    down: torch.Tensor | None = None,
    keep: bool = True,
    dtype: torch.dtype = torch.bfloat16,
) -> Outputs:
    """(y[M, K] or None, q[M, K] or None, low[M, r] or None) of x[M, K]; see above. y is wanted where keep is.

    weight, bias, smooth, post [K]; scale, shift [B, K]; down [K, r]. Raises ValueError for other shapes, and
    for blocks that do not divide K.
    """
    steps = Steps(
        norm, weight, bias, epsilon, act, scale, shift, smooth, hadamard, post, quant, down, keep, dtype
    )  # fmt: skip
    _check(x, steps)
    fits = steps.rank <= _MOST_RANK and (not steps.turned or _hadamard.fits(hadamard))
    return launch(x, steps) if fits and runs_triton(x) else reference(x, steps)


def _check(x: torch.Tensor, steps: Steps) -> None:
    """Shapes: a kernel would read beside a tensor that is too small."""
    m, k = x.shape
    if steps.turned and k % steps.hadamard:
        raise ValueError(f"blocks of {steps.hadamard} do not divide {k} channels")
    expected: dict[str, set[tuple[int, ...]]] = {name: {(k,)} for name in ("weight", "bias", "smooth", "post")}
    expected["scale"] = expected["shift"] = {(1, k), (steps.samples, k)}
    expected["down"] = {(k, steps.rank)}
    for name, shapes in expected.items():
        given = getattr(steps, name)
        if given is not None and tuple(given.shape) not in shapes:
            raise ValueError(f"{name} is {list(given.shape)}, not {list(max(shapes))}")
    if m % steps.samples:
        raise ValueError(f"{m} rows are not {steps.samples} samples of equal length")


def reference(x: torch.Tensor, steps: Steps) -> Outputs:
    """The same in plain torch, float32."""
    v = _normed(x.float(), steps)
    if steps.weight is not None:
        v = v * steps.weight.float()
    if steps.bias is not None:
        v = v + steps.bias.float()
    v = activate(v, steps.act)
    if steps.scale is not None:
        v = v * _rows(steps.scale, len(x))
    if steps.shift is not None:
        v = v + _rows(steps.shift, len(x))
    if steps.smooth is not None:
        v = v * steps.smooth.float()
    if steps.turned:
        v = _hadamard.reference(v, steps.hadamard)
    if steps.post is not None:
        v = v * steps.post.float()
    return (
        v.to(steps.dtype) if steps.keep else None,
        None if steps.quant is None else steps.quant.codes(v),
        None if steps.down is None else (v @ steps.down.float()).to(steps.dtype),
    )


def _normed(v: torch.Tensor, steps: Steps) -> torch.Tensor:
    if steps.norm == "layer":
        v = v - v.mean(1, keepdim=True)
    if steps.norm != "none":
        v = v / (v.square().mean(1, keepdim=True) + steps.epsilon).sqrt()
    return v


def _rows(per_sample: torch.Tensor, m: int) -> torch.Tensor:
    """[M, K] of [B, K]."""
    return per_sample.float().repeat_interleave(m // len(per_sample), 0)


def launch(x: torch.Tensor, steps: Steps, *, config: _config.Config | None = None) -> Outputs:
    """The same in Triton.

    config: BLOCK_M · BLOCK_K elements of a tile, BLOCK_K channels of a row at most where a row is cut; num_warps,
    num_stages, TERMS (bfloat16 numbers that a float32 one is split into for a product).
    """
    (m, k), turned = x.shape, steps.hadamard if steps.turned else 0
    if not m or not k:
        return _empty(steps.outputs(m, k, x.device))
    if config is None:
        config = _config.config(
            "normalize", lambda one: launch(x, steps, config=one),
            m=m, n=steps.rank, k=k, norm=steps.norm, hadamard=turned,
        )  # fmt: skip
    if turned and steps.rank and _ROWS_OF_LOW * _hadamard.shape(turned).size > _WHOLE_ROW:
        return _apart(x, steps)
    return _run(x, steps, tile(k, steps, config), config)


def _empty(outputs: Outputs) -> Outputs:
    """No rows, or rows of nothing: an empty sum is zero."""
    if outputs[2] is not None:
        outputs[2].zero_()
    return outputs


def _apart(x: torch.Tensor, steps: Steps) -> Outputs:
    """Too large a rotation for 16 rows: the low-rank product is taken in front of it, by a `down` rotated instead."""
    assert steps.down is not None
    down = steps.down.float() if steps.post is None else steps.down.float() * steps.post.float()[:, None]
    down = _hadamard.transform(down.T.contiguous(), steps.hadamard, transpose=True, dtype=torch.float32).T.contiguous()
    y, q, low = None, None, launch(x, replace(steps, hadamard=0, post=None, quant=None, down=down, keep=False))[2]
    if steps.keep or steps.quant is not None:
        y, q, _ = launch(x, replace(steps, down=None))
    return y, q, low


def tile(k: int, steps: Steps, config: _config.Config) -> Tile:
    """What one program holds at a time."""
    across = config["BLOCK_K"]
    elements = config["BLOCK_M"] * across
    if not steps.turned:
        held = power_of_two(k, _hadamard.LEAST)
        resident = held <= across
        width = held if resident else across
        if not resident and not steps.rank:
            width = _part(k, across)
        shape, count, rows = _hadamard.Shape(1, width, 1, 1, 1, width), 1, elements // width
    else:
        shape = _hadamard.shape(steps.hadamard)
        held = power_of_two(blocks(k, shape.width))
        resident = steps.norm != "none" and not steps.rank and held * shape.size <= _WHOLE_ROW
        rows, count = _hadamard.tile(shape, k, elements, max(1, across // shape.size))
        if resident:
            rows, count = max(elements // (held * shape.size), blocks(shape.least, held)), held
        resident = resident or blocks(k, shape.width) <= count
    rows = power_of_two(rows, _ROWS_OF_LOW if steps.rank else 1)
    return Tile(rows, count, shape, resident)


def _part(k: int, across: int) -> int:
    """Channels of a tile: fewer than `across`, but 128, where that leaves fewer places empty, unless those are few."""
    parts = [part for part in (across, across // 2, across // 4) if part >= 128] or [across]
    return next((part for part in parts if 8 * (part * blocks(k, part) - k) <= k), parts[-1])


def _run(x: torch.Tensor, steps: Steps, one: Tile, config: _config.Config) -> Outputs:
    (m, k), shape = x.shape, one.shape
    y, q, low = outputs = steps.outputs(m, k, x.device)
    x = x if x.stride(1) == 1 else x.contiguous()
    a, b, c = _hadamard.constants(shape.order, x.device) if steps.turned else (None, None, None)
    chunks = blocks(k, one.count * shape.width)
    loops = not one.resident and (steps.norm != "none" or steps.rank > 0)
    stages = config["num_stages"] if loops and one.size <= _FETCHED and not steps.turned else 1
    per_sample = m // steps.samples
    terms = config.get("TERMS", _hadamard.terms(steps.dtype))
    form = code_form(steps.quant)
    row_kernel[blocks(m, one.rows), 1 if loops else chunks](
        x, m, k, x.stride(0), chunks, per_sample, steps.epsilon, shape.order**-0.5,
        a=a, b=b, c=c, y=y, q=stored(q, form), low=low,
        **_arguments(steps), FP8=form,
        ONE_SAMPLE=steps.samples == 1 or per_sample % one.rows == 0,
        BLOCK_M=one.rows, COUNT=one.count, WIDTH=shape.width, LEFT=shape.left, A=shape.a, B=shape.b, C=shape.c,
        TERMS=terms, FIRST=1 if steps.plain and x.dtype == torch.bfloat16 else terms,
        RESIDENT=one.resident, LOOPS=loops, STAGES=stages,
        num_warps=_hadamard.warps(shape, one.size) if steps.turned else config["num_warps"],
        enable_fp_fusion=True,
    )  # fmt: skip
    return outputs


def _arguments(steps: Steps) -> dict[str, object]:
    """What the kernel takes from the steps alone, by name."""
    quant = steps.quant
    return {
        "weight": _flat(steps.weight), "bias": _flat(steps.bias), "smooth": _flat(steps.smooth),
        "scale": steps.modulation(steps.scale), "shift": steps.modulation(steps.shift),
        "post": _flat(steps.post), "down": _flat(steps.down),
        "out_scale": None if quant is None else quant.scale, "out_zero": None if quant is None else quant.zero,
        "NORM": steps.norm, "ACT": steps.act, "TURNED": steps.turned,
        "LOW": 0 if quant is None else quant.low, "HIGH": 0 if quant is None else quant.high,
        "RANK": steps.rank, "RANK_BLOCK": power_of_two(steps.rank, LEAST_RANK),
    }  # fmt: skip


def _flat(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.contiguous()
