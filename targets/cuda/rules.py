"""Which torch function stands for which ONNX operator, and what type of float it wants and gives.

ELEMENTWISE  of one type all over
MOVE         moves values: the result has the operands' type
REDUCE       statistics: float32, whatever they are of
MATRIX       runs on tensor cores: operands and result have the compute type
NORM         float32 inside; parameters and result have the operand's type
WIDE         float32 parameters, and a float32 result that is then cast
OTHER        the result is no float
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
import torch.nn.functional as F

from vdq_export.targets.cuda import torch_attention as att
from vdq_export.targets.cuda import torch_ops as ops
from vdq_export.targets.cuda import torch_quant as quant


class Kind(Enum):
    ELEMENTWISE = auto()
    MOVE = auto()
    REDUCE = auto()
    MATRIX = auto()
    NORM = auto()
    WIDE = auto()
    OTHER = auto()


@dataclass(frozen=True)
class Rule:
    """static: positions of inputs that `run` takes as Python values. scalars: of those whose constants of no axes it
    takes as numbers. exact: what it is given in less than float32 would be useless (angles)."""

    run: Callable[..., Any]
    kind: Kind
    static: tuple[int, ...] = ()
    scalars: tuple[int, ...] = ()
    exact: bool = False


def _all(
    kind: Kind, scalars: tuple[int, ...] = (), static: tuple[int, ...] = (), **functions: Callable[..., Any]
) -> dict[str, Rule]:
    return {name: Rule(run, kind, static, scalars) for name, run in functions.items()}


_AXES = {
    f"Reduce{name}": Rule(ops.reduction(run), Kind.REDUCE, static=(1,))
    for name, run in {
        "Mean": ops.reduce_mean, "Sum": ops.reduce_sum, "SumSquare": ops.reduce_sum_square, "L1": ops.reduce_l1,
        "L2": ops.reduce_l2, "Max": ops.reduce_max, "Min": ops.reduce_min, "Prod": ops.reduce_prod,
    }.items()
}  # fmt: skip
RULES: dict[str, Rule] = {
    **_all(Kind.ELEMENTWISE, (0, 1), Add=operator.add, Sub=operator.sub, Mul=operator.mul, Div=ops.divide,
           Pow=ops.power, Mod=ops.modulo),
    **_all(Kind.ELEMENTWISE, Abs=torch.abs, Ceil=torch.ceil, Elu=ops.elu, Erf=torch.erf, Exp=torch.exp,
           Floor=torch.floor, Gelu=ops.gelu, HardSigmoid=ops.hard_sigmoid, HardSwish=F.hardswish,
           LeakyRelu=ops.leaky_relu, Log=torch.log, Max=ops.most, Min=ops.least, Neg=operator.neg,
           Reciprocal=torch.reciprocal, Relu=torch.relu, Round=torch.round, Sigmoid=torch.sigmoid, Sign=torch.sign,
           Softplus=F.softplus, Sqrt=torch.sqrt, Sum=ops.total, Swish=ops.swish, Tanh=torch.tanh, Clip=ops.clip),
    "Sin": Rule(torch.sin, Kind.ELEMENTWISE, exact=True),
    "Cos": Rule(torch.cos, Kind.ELEMENTWISE, exact=True),
    "Where": Rule(ops.where, Kind.ELEMENTWISE, scalars=(1, 2)),
    **_all(Kind.OTHER, (1,), Equal=operator.eq, Greater=operator.gt, GreaterOrEqual=operator.ge, Less=operator.lt,
           LessOrEqual=operator.le),
    **_all(Kind.OTHER, And=torch.logical_and, Or=torch.logical_or, Xor=torch.logical_xor, Not=torch.logical_not,
           IsNaN=torch.isnan, IsInf=torch.isinf, ArgMax=ops.arg_max),
    **_all(Kind.MOVE, Concat=ops.concat, DepthToSpace=ops.depth_to_space, Flatten=ops.flatten,
           GatherElements=ops.gather_elements, GatherND=ops.gather_nd, ScatterElements=ops.scatter_elements,
           ScatterND=ops.scatter_nd, SpaceToDepth=ops.space_to_depth, Transpose=ops.transpose, Identity=ops.identity),
    "Gather": Rule(ops.gather, Kind.MOVE, scalars=(1,)),
    **_all(Kind.MOVE, static=(1,), Reshape=ops.reshape, Unsqueeze=ops.unsqueeze, Squeeze=ops.squeeze, Split=ops.split,
           Expand=ops.expand, Tile=ops.tile, Trilu=ops.trilu),
    "Slice": Rule(ops.slice_, Kind.MOVE, static=(1, 2, 3, 4)),
    "Pad": Rule(ops.pad, Kind.MOVE, static=(1, 2, 3)),
    "ConstantOfShape": Rule(ops.constant_of_shape, Kind.MOVE, static=(0,)),
    "Range": Rule(ops.range_, Kind.MOVE, static=(0, 1, 2)),
    **_AXES,
    "CumSum": Rule(ops.cumulative, Kind.REDUCE, static=(1,)),
    **_all(Kind.MATRIX, MatMul=torch.matmul, Gemm=ops.gemm, Conv=ops.conv, Einsum=ops.einsum,
           Attention=att.attention),
    "com.microsoft.MultiHeadAttention": Rule(att.multi_head, Kind.MATRIX),
    **_all(Kind.NORM, Softmax=ops.softmax, LogSoftmax=ops.log_softmax, LayerNormalization=ops.layer_norm,
           RMSNormalization=ops.rms_norm, SimplifiedLayerNormalization=ops.rms_norm,
           GroupNormalization=ops.group_norm, InstanceNormalization=ops.instance_norm),
    "RotaryEmbedding": Rule(att.rotary_standard, Kind.WIDE, scalars=(3,)),
    "com.microsoft.RotaryEmbedding": Rule(att.rotary, Kind.WIDE, scalars=(1,)),
    "DequantizeLinear": Rule(quant.dequantize, Kind.WIDE),
    "QuantizeLinear": Rule(quant.quantize, Kind.OTHER),
}  # fmt: skip
RULES["com.microsoft.QuantizeLinear"] = RULES["QuantizeLinear"]
RULES["com.microsoft.DequantizeLinear"] = RULES["DequantizeLinear"]
