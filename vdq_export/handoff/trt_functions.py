"""TensorRT's block-scaled operators as ONNX model-local functions: name, attributes, outputs and numbers of each.

TensorRT's ONNX parser knows these names itself and looks there before it looks at a model's functions (onnx-tensorrt,
ModelImporter.cpp: `opImporters` first, `localFunctions` second). Everybody else runs the bodies, in standard operators:
onnxruntime, the reference evaluator, shape inference. One file serves both.

Legend: K channels, the last axis; b of a block (16 or 32). x[..., K] float32, float16 or bfloat16.

    TRT_FP4DynamicQuantize(x, unit) -> q[..., K], s[..., K / b]
        s = e4m3(max|x| / (6 · unit)), q = e2m1(x / (s · unit))
    TRT_MXFP8DynamicQuantize(x) -> q[..., K], s[..., K / b]         uint8 s = 127 + ⌈log2(max|x| / 448)⌉,
        q = e4m3(x / 2^(s − 127))
    TRT_MXFP8DequantizeLinear(q, s) -> q · 2^(s − 127)

onnxruntime's CPU provider has no kernel for FLOAT4E2M1, whose numbers all are FLOAT8E4M3FN numbers too: q is of that
type unless `four_bits` is asked for, which is what the graphs handed to TensorRT have. TensorRT documents the formats,
not how its kernels round E8M0 scales; upwards is what Model Optimizer does for weights.
"""

from __future__ import annotations

import onnx
from onnx import FunctionProto, TensorProto

DOMAIN = "trt"
FP4, MXFP8, MXFP8_DEQUANTIZE = "TRT_FP4DynamicQuantize", "TRT_MXFP8DynamicQuantize", "TRT_MXFP8DequantizeLinear"
_LOWEST = -126  # exponent of the smallest normal float32
_POWERS = ", ".join(repr(2.0**e) for e in range(_LOWEST, 128))
_BIASED = ", ".join(repr(2.0 ** (code - 127)) for code in range(255)) + ", nan"


def functions(opset: int = 21, *, four_bits: bool = False) -> dict[str, FunctionProto]:
    """The three by name, in the model's opset. four_bits: the numbers of TRT_FP4DynamicQuantize are FLOAT4E2M1 (23)."""
    head = f'<opset_import: ["" : {opset}], domain: "{DOMAIN}">'
    texts = {FP4: _fp4(four_bits), MXFP8: _mxfp8(), MXFP8_DEQUANTIZE: _mxfp8_dequantize()}
    return {name: onnx.parser.parse_function(head + text) for name, text in texts.items()}


def _split(block: int) -> str:
    """x[..., K] as float32 `blocks` [..., K / b, b] with the largest magnitude `peak` of each."""
    return f"""
    wide = Cast <to: int = {TensorProto.FLOAT}> (x)
    whole = Shape (x)
    leading = Shape <end: int = -1> (x)
    split = Constant <value_ints: ints = [-1, {block}]> ()
    shape = Concat <axis: int = 0> (leading, split)
    blocks = Reshape (wide, shape)
    last = Constant <value_ints: ints = [-1]> ()
    size = Abs (blocks)
    peak = ReduceMax <keepdims: int = 1> (size, last)
    """


def _fp4(four_bits: bool) -> str:
    kind = TensorProto.FLOAT4E2M1 if four_bits else TensorProto.FLOAT8E4M3FN
    return f"""
{FP4} <axis, block_size, scale_type> (x, unit) => (q, s)
{{{_split(16)}
    six = Constant <value_float: float = 6.0> ()
    most = Mul (six, unit)
    ideal = Div (peak, most)
    scales = Cast <to: int = {TensorProto.FLOAT8E4M3FN}> (ideal)
    flat = Squeeze (ideal, last)
    s = Cast <to: int = {TensorProto.FLOAT8E4M3FN}> (flat)
    restored = Cast <to: int = {TensorProto.FLOAT}> (scales)
    scale = Mul (restored, unit)
    zero = Constant <value_float: float = 0.0> ()
    one = Constant <value_float: float = 1.0> ()
    two = Constant <value_float: float = 2.0> ()
    four = Constant <value_float: float = 4.0> ()
    half = Constant <value_float: float = 0.5> ()
    lowest = Constant <value_float: float = -6.0> ()
    empty = Equal (scale, zero)
    divisor = Where (empty, one, scale)
    ratio = Div (blocks, divisor)
    v = Where (empty, zero, ratio)
    height = Abs (v)
    coarse = Less (height, four)
    fine = Less (height, two)
    upper = Where (coarse, one, two)
    step = Where (fine, half, upper)
    quotient = Div (v, step)
    level = Round (quotient)
    number = Mul (level, step)
    clipped = Clip (number, lowest, six)
    narrow = Cast <to: int = {kind}> (clipped)
    q = Reshape (narrow, whole)
}}"""


def _mxfp8() -> str:
    return f"""
{MXFP8} <axis, block_size, output_dtype> (x) => (q, s)
{{{_split(32)}
    powers = Constant <value = float[{128 - _LOWEST}] {{{_POWERS}}}> ()
    peak_of_type = Constant <value_float: float = 448.0> ()
    tiny = Constant <value_float: float = {2.0**_LOWEST!r}> ()
    zero = Constant <value_int: int = 0> ()
    one = Constant <value_int: int = 1> ()
    highest = Constant <value_int: int = {127 - _LOWEST}> ()
    base = Constant <value_int: int = {-_LOWEST}> ()
    ratio = Div (peak, peak_of_type)
    live = Max (ratio, tiny)
    logarithm = Log (live)
    of_two = Constant <value_float: float = 0.6931471805599453> ()
    exponent = Div (logarithm, of_two)
    guess = Floor (exponent)
    whole_guess = Cast <to: int = {TensorProto.INT64}> (guess)
    shifted = Add (whole_guess, base)
    index = Clip (shifted, zero, highest)
    power = Gather (powers, index)
    short = Less (power, live)
    step = Where (short, one, zero)
    second = Add (index, step)
    second_index = Clip (second, zero, highest)
    second_power = Gather (powers, second_index)
    still_short = Less (second_power, live)
    second_step = Where (still_short, one, zero)
    third = Add (second_index, second_step)
    place = Clip (third, zero, highest)
    scale = Gather (powers, place)
    v = Div (blocks, scale)
    narrow = Cast <to: int = {TensorProto.FLOAT8E4M3FN}> (v)
    q = Reshape (narrow, whole)
    biased = Add (place, one)
    code = Cast <to: int = {TensorProto.UINT8}> (biased)
    s = Squeeze (code, last)
}}"""


def _mxfp8_dequantize() -> str:
    return f"""
{MXFP8_DEQUANTIZE} <axis, block_size, output_dtype> (q, s) => (x)
{{
    powers = Constant <value = float[256] {{{_BIASED}}}> ()
    index = Cast <to: int = {TensorProto.INT64}> (s)
    scale = Gather (powers, index)
    wide = DequantizeLinear <axis: int = @axis, block_size: int = @block_size> (q, scale)
    x = Cast <to: int = @output_dtype> (wide)
}}"""
