"""Standard ONNX operators (opset 21) as torch functions of static shapes.

Each takes its node's inputs in ONNX's order and its attributes by ONNX's names; rules.py says which is whose. Inputs
that say what the result looks like (shapes, axes, …) are Python values, known when a graph is lowered: nothing here
reads a value off the device, so that a CUDA graph can hold it. Attention and rotary embedding: torch_attention.py;
quantizers: torch_quant.py.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
Shape = Sequence[int]


def narrowest(x: Tensor) -> Tensor:
    """float32 of 16-bit floats; others as they are."""
    return x.float() if x.dtype in HALVES else x


# -- elementwise -----------------------------------------------------------------------------------------------------


def divide(a: Any, b: Any) -> Any:
    if isinstance(a, Tensor) and not a.is_floating_point():
        return torch.div(a, b, rounding_mode="trunc")
    return operator.truediv(a, b)


def power(a: Any, b: Any) -> Any:
    """x² as a product: exact in every type, and no call of pow()."""
    return a * a if isinstance(b, float | int) and b == 2 else operator.pow(a, b)


def modulo(a: Tensor, b: Any, *, fmod: int = 0) -> Tensor:
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


def most(*values: Tensor) -> Tensor:
    return reduce(torch.maximum, values)


def least(*values: Tensor) -> Tensor:
    return reduce(torch.minimum, values)


def total(*values: Any) -> Any:
    return reduce(operator.add, values)


def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return torch.clamp(x, low, high) if low is not None or high is not None else x


def where(condition: Tensor, a: Any, b: Any) -> Tensor:
    return torch.where(condition, a, b)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(alpha * x + beta, 0, 1)


# -- moves -----------------------------------------------------------------------------------------------------------


def reshape(x: Tensor, shape: Shape, *, allowzero: int = 0) -> Tensor:
    return x.reshape([x.shape[i] if size == 0 and not allowzero else size for i, size in enumerate(shape)])


def transpose(x: Tensor, *, perm: Shape | None = None) -> Tensor:
    return x.permute(*(perm if perm is not None else range(x.ndim - 1, -1, -1)))


def unsqueeze(x: Tensor, axes: Shape) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def squeeze(x: Tensor, axes: Shape | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def flatten(x: Tensor, *, axis: int = 1) -> Tensor:
    return x.reshape(math.prod(x.shape[: axis % (x.ndim + 1)]), -1)


def concat(*values: Tensor, axis: int) -> Tensor:
    return torch.cat(values, axis)


def split(x: Tensor, sizes: Shape | None = None, *, axis: int = 0, num_outputs: int = 0) -> tuple[Tensor, ...]:
    if sizes is None:
        size = -(-x.shape[axis] // num_outputs)
        sizes = [min(size, x.shape[axis] - size * i) for i in range(num_outputs)]
    return torch.split(x, list(sizes), axis)


def slice_(x: Tensor, starts: Shape, ends: Shape, axes: Shape | None = None, steps: Shape | None = None) -> Tensor:
    """Views; one that runs backwards is a copy."""
    for i, axis in enumerate(axes if axes is not None else range(len(starts))):
        step, size = steps[i] if steps is not None else 1, x.shape[axis]
        chosen = range(size)[slice(starts[i], ends[i], step)]
        if step > 0:
            index = [slice(None)] * (axis % x.ndim) + [slice(chosen.start, chosen.stop, step)]
            x = x[tuple(index)]
        else:
            x = x.index_select(axis, torch.arange(chosen.start, chosen.stop, step, device=x.device))
    return x


def _counted(indices: Tensor, size: int) -> Tensor:
    """Indices from the end made into those from the start."""
    return torch.remainder(indices.long(), size)


def gather(x: Tensor, indices: Any, *, axis: int = 0) -> Tensor:
    if not isinstance(indices, Tensor):
        return x.select(axis, int(indices))
    axis %= x.ndim
    chosen = x.index_select(axis, _counted(indices.reshape(-1), x.shape[axis]))
    return chosen.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def gather_elements(x: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, _counted(indices, x.shape[axis]))


def _coordinates(x: Tensor, indices: Tensor) -> tuple[Tensor, ...]:
    return tuple(_counted(one, x.shape[axis]) for axis, one in enumerate(indices.unbind(-1)))


def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    if not batch_dims:
        return x[_coordinates(x, indices)]
    flat, at = x.flatten(0, batch_dims - 1), indices.flatten(0, batch_dims - 1)
    chosen = torch.stack([one[_coordinates(one, place)] for one, place in zip(flat, at, strict=True)])
    return chosen.reshape(*x.shape[:batch_dims], *chosen.shape[1:])


def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    if reduction not in ("none", "add"):
        raise ValueError(f"reduction {reduction}")
    return x.index_put(_coordinates(x, indices), updates, accumulate=reduction == "add")


def scatter_elements(x: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none") -> Tensor:
    index = _counted(indices, x.shape[axis])
    if reduction == "none":
        return x.scatter(axis, index, updates)
    named = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[reduction]
    return x.scatter_reduce(axis, index, updates, named)


def expand(x: Tensor, shape: Shape) -> Tensor:
    return x.expand(np.broadcast_shapes(x.shape, tuple(shape)))


def tile(x: Tensor, repeats: Shape) -> Tensor:
    return x.repeat(*repeats)


def pad(
    x: Tensor, pads: Shape, value: float | None = None, axes: Shape | None = None, *, mode: str = "constant"
) -> Tensor:
    axes = [axis % x.ndim for axis in (axes if axes is not None else range(x.ndim))]
    around = {axis: (pads[i], pads[i + len(axes)]) for i, axis in enumerate(axes)}
    if mode == "constant":
        flat = [size for axis in range(x.ndim - 1, -1, -1) for size in around.get(axis, (0, 0))]
        return F.pad(x, flat, value=value or 0)
    for axis, (before, behind) in around.items():
        x = x.index_select(axis, _around(x.shape[axis], before, behind, mode, x.device))
    return x


def _around(size: int, before: int, behind: int, mode: str, device: torch.device) -> Tensor:
    """Which of `size` elements stand in their padded row."""
    places = torch.arange(-before, size + behind, device=device)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return torch.remainder(places, size)
    period = max(2 * size - 2, 1)  # reflect
    folded = torch.remainder(places, period)
    return torch.minimum(folded, period - folded)


def depth_to_space(x: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    b, c, h, w = x.shape
    if mode == "DCR":
        parts = x.reshape(b, blocksize, blocksize, -1, h, w).permute(0, 3, 4, 1, 5, 2)
    else:
        parts = x.reshape(b, -1, blocksize, blocksize, h, w).permute(0, 1, 4, 2, 5, 3)
    return parts.reshape(b, c // blocksize**2, h * blocksize, w * blocksize)


def space_to_depth(x: Tensor, *, blocksize: int) -> Tensor:
    b, c, h, w = x.shape
    parts = x.reshape(b, c, h // blocksize, blocksize, w // blocksize, blocksize).permute(0, 3, 5, 1, 2, 4)
    return parts.reshape(b, c * blocksize**2, h // blocksize, w // blocksize)


def trilu(x: Tensor, k: int | Shape | None = None, *, upper: int = 1) -> Tensor:
    diagonal = int(k[0] if isinstance(k, Sequence) else k or 0)
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


def identity(x: Tensor) -> Tensor:
    return x


def constant_of_shape(shape: Shape, *, value: Tensor | None = None) -> Tensor:
    return torch.zeros(tuple(shape)) if value is None else value.reshape(()).expand(tuple(shape)).clone()


def range_(start: float, limit: float, delta: float) -> Tensor:
    return torch.arange(start, limit, delta)


# -- reductions ------------------------------------------------------------------------------------------------------


def reduction(run: Callable[[Tensor, tuple[int, ...], bool], Tensor]) -> Callable[..., Tensor]:
    """An ONNX operator of `run`(x, axes, keep); 16-bit floats are read as float32."""

    def over(x: Tensor, axes: Shape | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
        if not axes and noop_with_empty_axes:
            return x
        return run(narrowest(x), tuple(axes) if axes else tuple(range(x.ndim)), bool(keepdims))

    over.__name__ = over.__qualname__ = f"over_{run.__name__}"
    return over


def reduce_mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.mean(x, axes, keep)


def reduce_sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sum(x, axes, keep, dtype=x.dtype)


def reduce_sum_square(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sum(x * x, axes, keep, dtype=x.dtype)


def reduce_l2(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return (x * x).sum(axes, keep).sqrt()


def reduce_l1(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.sum(x.abs(), axes, keep, dtype=x.dtype)


def reduce_max(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.amax(x, axes, keep)


def reduce_min(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return torch.amin(x, axes, keep)


def reduce_prod(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = torch.prod(x, axis, keep, dtype=x.dtype)
    return x


def cumulative(x: Tensor, axis: int, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    x = x.flip(axis) if reverse else x
    sums = torch.cumsum(x, axis, dtype=x.dtype)
    sums = sums - x if exclusive else sums
    return sums.flip(axis) if reverse else sums


def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    return torch.argmax(x, axis, bool(keepdims))


# -- products --------------------------------------------------------------------------------------------------------


def gemm(
    a: Tensor, b: Tensor, c: Tensor | None = None, *, alpha: float = 1.0, beta: float = 1.0, transA: int = 0,
    transB: int = 0,
) -> Tensor:  # fmt: skip
    a, b = a.t() if transA else a, b.t() if transB else b
    if c is None:
        return a @ b if alpha == 1 else alpha * (a @ b)
    return torch.addmm(c, a, b, beta=beta, alpha=alpha)


def conv(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, kernel_shape: Shape = (), strides: Shape | None = None,
    pads: Shape | None = None, dilations: Shape | None = None, group: int = 1, auto_pad: str = "NOTSET",
) -> Tensor:  # fmt: skip
    if auto_pad not in ("NOTSET", "VALID"):
        raise ValueError(f"auto_pad {auto_pad}")
    rank = x.ndim - 2
    pads = pads or [0] * (2 * rank)
    if list(pads[:rank]) == list(pads[rank:]):
        padding = list(pads[:rank])
    else:
        around = zip(pads[:rank], pads[rank:], strict=True)
        x, padding = F.pad(x, [size for pair in reversed(list(around)) for size in pair]), [0] * rank
    run: Callable[..., Tensor] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[rank]
    return run(x, weight, bias, tuple(strides or (1,) * rank), padding, tuple(dilations or (1,) * rank), group)


def einsum(*values: Tensor, equation: str) -> Tensor:
    found: Tensor = torch.einsum(equation, *values)
    return found


# -- norms -----------------------------------------------------------------------------------------------------------


def softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.softmax(x, axis)


def log_softmax(x: Tensor, *, axis: int = -1) -> Tensor:
    return torch.log_softmax(x, axis)


def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    over = x.shape[axis % x.ndim :]
    return F.layer_norm(x, over, weight.expand(over), None if bias is None else bias.expand(over), epsilon)


def rms_norm(x: Tensor, weight: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1) -> Tensor:
    wide = narrowest(x)
    over = tuple(range(axis % x.ndim, x.ndim))
    normed = wide * torch.rsqrt((wide * wide).mean(over, True) + epsilon)
    return normed.to(x.dtype) * weight


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: int = 1
) -> Tensor:
    return F.group_norm(x, num_groups, weight, bias, epsilon)


def instance_norm(x: Tensor, weight: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return F.instance_norm(x, weight=weight, bias=bias, eps=epsilon)
