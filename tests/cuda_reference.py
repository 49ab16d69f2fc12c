"""The operators of vdq.cuda in numpy, from their definitions (targets/cuda/ops.py), for onnx's reference evaluator.

Everything float is float64 inside and float32 between nodes. Shares nothing with what lowers or computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import erf
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from vdq_export.graph import Array
from vdq_export.hadamard import matrix
from vdq_export.targets.cuda.ops import DOMAIN, OUTPUTS

Attrs = Mapping[str, Any]
_ABSENT = "absent."
_ERF = np.vectorize(erf, otypes=[np.float64])


def run(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """{graph output: value}"""
    names = [output.name for output in model.graph.output]
    named = onnx.ModelProto()
    named.CopyFrom(model)
    for number, node in enumerate(named.graph.node):  # the evaluator would take an absent result for absent operands
        node.output[:] = [one or f"{_ABSENT}{number}.{place}" for place, one in enumerate(node.output)]
    evaluator = ReferenceEvaluator(named, new_ops=list(_OPERATORS))
    return dict(zip(names, evaluator.run(names, dict(feeds)), strict=True))


def _wide(x: Array | None) -> Array:
    wide: Array = np.asarray(x, np.float32).astype(np.float64)
    return wide


def _rows(x: Array, like: Array) -> Array:
    """[B, C] of anything broadcast over the tokens of a sample, repeated to the rows of `like`[..., C]."""
    rows, count = _wide(x).reshape(-1, x.shape[-1]), like.size // like.shape[-1]
    repeated: Array = np.repeat(rows, count // len(rows), axis=0)
    return repeated.reshape(like.shape)


def _activation(x: Array, kind: str) -> Array:
    made: Array = x
    if kind == "gelu_tanh":
        made = x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    elif kind == "gelu_erf":
        made = x / 2 * (1 + _ERF(x / np.sqrt(2)))
    elif kind == "silu":
        made = x / (1 + np.exp(-x))
    return made


def _quantize(x: Array, scale: Array, zero: Array | None, attrs: Attrs) -> Array:
    codes: Array
    if attrs["out_type"] == "float8e4m3fn":
        codes = np.clip((x / _wide(scale)).astype(np.float32), -448, 448).astype(ml_dtypes.float8_e4m3fn)
        return codes
    codes = np.rint(x.astype(np.float32) / np.asarray(scale)) + (0 if zero is None else np.asarray(zero))
    codes = np.clip(codes, attrs["low_level"], attrs["high_level"]).astype(np.int8)
    return codes


def linear(
    x: Array, weight: Array, weight_scale: Array, x_scale: Any = None, x_zero: Any = None, bias: Any = None,
    low: Any = None, up: Any = None, gate: Any = None, residual: Any = None, post: Any = None, out_scale: Any = None,
    out_zero: Any = None, *, attrs: Attrs,
) -> tuple[Array | None, ...]:  # fmt: skip
    assert (x_scale is None) == (x.dtype == np.float32), "codes have a scale, floats have none"
    assert attrs["weight_type"] == np.dtype(weight.dtype).name.replace("float8_", "float8"), weight.dtype
    group = attrs.get("group", 0)
    wide = _wide(weight) * (np.repeat(_wide(weight_scale), group, axis=0) if group else _wide(weight_scale))
    value = _wide(x) if x_scale is None else (_wide(x) - (0 if x_zero is None else _wide(x_zero))) * _wide(x_scale)
    y = value @ wide
    y = y if bias is None else y + _wide(bias)
    y = y if low is None else y + (_wide(low) @ _wide(up)).reshape(y.shape)
    y = _activation(y, attrs.get("act", "none"))
    y = y if gate is None else y * _rows(gate, y)
    y = y if residual is None else y + _wide(residual).reshape(y.shape)
    y = y if post is None else y * _wide(post)
    return y.astype(np.float32), None if out_scale is None else _quantize(y, out_scale, out_zero, attrs)


def _norm(x: Array, kind: str, epsilon: float) -> Array:
    if kind == "none":
        return x
    centred = x - x.mean(-1, keepdims=True) if kind == "layer" else x
    found: Array = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return found


def normalize(
    x: Array, weight: Any = None, bias: Any = None, scale: Any = None, shift: Any = None, smooth: Any = None,
    post: Any = None, out_scale: Any = None, out_zero: Any = None, down: Any = None, *, attrs: Attrs,
) -> tuple[Array | None, ...]:  # fmt: skip
    v = _norm(_wide(x), attrs["norm"], attrs.get("epsilon", 0.0))
    v = v if weight is None else v * _wide(weight)
    v = v if bias is None else v + _wide(bias)
    v = _activation(v, attrs.get("act", "none"))
    v = v if scale is None else v * _rows(scale, v)
    v = v if shift is None else v + _rows(shift, v)
    v = v if smooth is None else v * _wide(smooth)
    if block := attrs.get("hadamard", 0):
        v = (v.reshape(-1, block) @ _wide(matrix(block))).reshape(v.shape)
    v = v if post is None else v * _wide(post)
    low = None if down is None else (v @ _wide(down)).astype(np.float32)
    return v.astype(np.float32), None if out_scale is None else _quantize(v, out_scale, out_zero, attrs), low


def rope(
    x: Array,
    weight: Any = None,
    cos: Any = None,
    sin: Any = None,
    out_scale: Any = None,
    bias: Any = None,
    *,
    attrs: Attrs,
) -> tuple[Array | None, ...]:
    heads, kind = attrs["heads"], attrs["norm"]
    apart = (*x.shape[:2], heads, x.shape[2] // heads)
    v = _wide(x).reshape(apart) if kind.endswith("_head") else _wide(x)
    v = _norm(v, kind.removesuffix("_head"), attrs.get("epsilon", 0.0))
    v = v if weight is None else v * _wide(weight)
    v = (v if bias is None else v + _wide(bias)).reshape(apart)
    if cos is not None:
        half, v = cos.shape[-1], v.copy()
        a, b = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if attrs.get("interleaved") else (
            slice(0, half), slice(half, 2 * half)
        )  # fmt: skip
        c, s = _wide(cos)[None, :, None], _wide(sin)[None, :, None]
        v[..., a], v[..., b] = v[..., a] * c - v[..., b] * s, v[..., a] * s + v[..., b] * c
    if out_scale is None:
        return (v.reshape(x.shape).astype(np.float32),)
    levels = {"low_level": -128, "high_level": 127, **attrs}
    return (_quantize(v, np.asarray(out_scale)[:, None], None, levels).reshape(x.shape),)


def attention(
    q: Array, k: Array, v: Array, mask: Any = None, q_scale: Any = None, k_scale: Any = None, v_scale: Any = None,
    out_scale: Any = None, out_zero: Any = None, *, attrs: Attrs,
) -> tuple[Array | None, ...]:  # fmt: skip
    def apart(x: Array, scale: Any) -> Array:
        split = _wide(x).reshape(*x.shape[:2], attrs["heads"], -1).transpose(0, 2, 1, 3)
        return split if scale is None else split * _wide(scale)[:, None, None]

    scores = apart(q, q_scale) @ apart(k, k_scale).transpose(0, 1, 3, 2) * attrs["scale"]
    scores = scores if mask is None else scores + _wide(mask)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    y = (weights / weights.sum(-1, keepdims=True) @ apart(v, v_scale)).transpose(0, 2, 1, 3).reshape(*q.shape[:2], -1)
    return y.astype(np.float32), None if out_scale is None else _quantize(y, out_scale, out_zero, attrs)


def _operator(name: str, compute: Any) -> type[OpRun]:
    """A class of onnx's reference evaluator for one operator; it gives the results that the node has."""

    def _run(self: Any, *inputs: Any, **_: Any) -> tuple[Any, ...]:
        given = {a.name: onnx.helper.get_attribute_value(a) for a in self.onnx_node.attribute}
        attrs = {key: value.decode() if isinstance(value, bytes) else value for key, value in given.items()}
        found = compute(*inputs, attrs=attrs)
        wanted = self.onnx_node.output
        pairs = list(zip(found, wanted, strict=False))
        assert not any(value is None and not one.startswith(_ABSENT) for value, one in pairs), (name, wanted)
        return tuple(np.zeros(0) if value is None else value for value, _ in pairs)

    return type(name, (OpRun,), {"op_domain": DOMAIN, "_run": _run})


def _row(bins: Array, index: Array, *, attrs: Attrs) -> tuple[Array]:
    return (bins[int(index[0])],)


def _pick(row: Array, *, attrs: Attrs) -> tuple[Array]:
    shape = attrs.get("shape", ())
    size = int(np.prod(shape))
    return (row[attrs["offset"] : attrs["offset"] + size].reshape(shape),)


_COMPUTE = {
    "Row": _row, "Pick": _pick, "Linear": linear, "Normalize": normalize, "Rope": rope, "Attention": attention,
}  # fmt: skip
assert _COMPUTE.keys() == OUTPUTS.keys()
_OPERATORS = [_operator(name, compute) for name, compute in _COMPUTE.items()]
