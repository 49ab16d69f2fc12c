"""The QuantPlan: every number the passes need, per layer and bin, each with its reason. Plain data.

Legend: K input channels, N output channels, B bins. A *layer* is one linear of the model, named by its module path; a
*bin* is a range of timesteps (of one guidance branch, or any) that shares one set of activation parameters.
A uniform quantizer is q = clip(round(x / scale) + zero_point, qmin, qmax), x̂ = scale · (q − zero_point).
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from vdq_export.errors import PlanError
from vdq_export.jsonfile import decode, encode
from vdq_export.recipe import Recipe

Branch = Literal["cond", "uncond", "any"]
Precision = Literal["", "low", "high"]
Grid = Literal["int", "e2m1", "e4m3"]
HoistedPart = Literal["prompt", "step", "mixed"]
ScaleType = Literal["float", "e8m0", "e4m3"]
TensorKind = Literal["codes", "scale", "down", "up"]
IntType = Literal["int4", "uint4", "int8", "uint8", "int16", "uint16"]
Float8 = Literal["float8e4m3fn"]
WeightType = IntType | Float8
ActivationType = IntType | Float8 | Literal["float"]
MX_BLOCK, NVFP4_BLOCK = 32, 16  # channels that share a scale in MXFP4 and MXFP8 (OCP Microscaling 1.0); in NVFP4
INT_RANGE: dict[str, tuple[int, int]] = {
    "int4": (-8, 7), "uint4": (0, 15),
    "int8": (-128, 127), "uint8": (0, 255),
    "int16": (-32768, 32767), "uint16": (0, 65535),
}  # fmt: skip
WIDEST = 16  # bits: a quantizer of so many has all the levels of its type
E4M3_MAX = 448  # the largest float8e4m3fn number


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Bin(_Data, frozen=True):
    """Timesteps lo <= t < hi (the highest bin: lo <= t <= hi) of `branch`. `steps`: the calibrated t, descending."""

    index: Annotated[int, Meta(ge=0)]
    t: tuple[float, float]
    steps: tuple[float, ...]
    branch: Branch = "any"
    expert: str = ""

    @property
    def name(self) -> str:
        return f"bin{self.index:02d}"


class Range(_Data, frozen=True):
    """One per-tensor quantizer: what `lo`, `hi` (in the tensor's own units, after smoothing) became, and why."""

    lo: float
    hi: float
    scale: Annotated[float, Meta(gt=0.0)]
    zero_point: int
    why: str


class Smoothing(_Data, frozen=True):
    """Divide input channel k by scale[k], multiply row k of the weight by it. Layers that read one value share it."""

    alpha: float
    scale: tuple[float, ...]
    why: str


class Rotation(_Data, frozen=True):
    """x·H / scale after smoothing, scale·Hᵀ into the weight; H block-diagonal, orthonormal Hadamard blocks of `block`.

    `scale` (K numbers, or none) is a channel scale taken after the rotation. Layers that read one value share it.
    """

    block: Annotated[int, Meta(gt=0)]
    why: str
    scale: tuple[float, ...] = ()


class LowRank(_Data, frozen=True):
    """A branch kept in float beside the quantized residual: y += (x · down[K, r]) · up[r, N].

    down and up are in the plan's tensors. error: ‖W − down·up‖ / ‖W‖ (Frobenius) of the smoothed, rotated weight.
    """

    rank: Annotated[int, Meta(gt=0)]
    error: float
    why: str


class WeightPlan(_Data, frozen=True):
    """Symmetric grid per output channel, or per `group` input channels of one (0: all of them).

    scale: [N], or none where the plan's tensors hold them as [K / group, N]. q = clip(round(W / scale), -qmax, qmax) of
    the smoothed, rotated weight less its low-rank branch; `qmax` is below the type's own for kernels that would
    saturate. grid "e2m1": q is twice a number of {0, ½, 1, 1½, 2, 3, 4, 6}; "e4m3": q is a float8e4m3fn number.
    scales "e8m0": powers of two (MXFP4, MXFP8); "e4m3" (NVFP4): float8e4m3fn numbers times `unit`, one number for the
    whole weight (with e2m1 that is half of what stands beside the elements themselves).
    codes: q is not nearest rounding and stands in the plan's tensors.
    """

    dtype: WeightType
    qmax: Annotated[int, Meta(gt=0)]
    why: str
    scale: tuple[float, ...] = ()
    bits: int = 8
    group: Annotated[int, Meta(ge=0)] = 0
    grid: Grid = "int"
    scales: ScaleType = "float"
    unit: Annotated[float, Meta(ge=0.0)] = 0.0
    codes: bool = False


class Dynamic(_Data, frozen=True):
    """Activation parameters computed at run time, for targets that can: per `token` row, per `channel` over the tokens
    of a sample, or per token and block: `mx` and `mxfp8`, of 32 channels, a power of two (E8M0) for E2M1 and E4M3
    numbers; `nvfp4`, of 16 channels, an E4M3 number times `unit` for E2M1 numbers.

    ratio: share of the observed extremes that is covered. offset: added to the exponent (mx). unit: static (nvfp4).
    """

    kind: Literal["token", "channel", "mx", "mxfp8", "nvfp4"]
    why: str
    ratio: float = 1.0
    offset: int = 0
    unit: Annotated[float, Meta(ge=0.0)] = 0.0


class LayerPlan(_Data, frozen=True):
    """One linear. `value` is the graph value it reads; `keep_float` (a reason) excludes every quantization field.

    activation_dtype "float": only the weight is quantized, there are no ranges. hoisted: the graph it is in if not in
    those of the bins (docs/hoisting.md). float_in: for each bin why it is in float there, or ""; (): it is in none.
    """

    name: str
    value: str
    rows: int
    shape: tuple[int, int]  # K, N
    keep_float: str = ""
    hoisted: HoistedPart | Literal[""] = ""
    smoothing: Smoothing | None = None
    rotation: Rotation | None = None
    low_rank: LowRank | None = None
    weight: WeightPlan | None = None
    activation_dtype: ActivationType = "uint8"
    activation_bits: int = 8  # below the type's own: levels qmin … qmin + 2^bits − 1 of it
    activation: tuple[Range, ...] = ()  # one per bin …
    dynamic: tuple[Dynamic, ...] = ()  # … or, computed at run time, this one per bin
    smoothing_why: str = ""  # of a quantized layer: why smoothed so, or why not
    rotation_why: str = ""
    bits_why: str = ""  # why other bits than the recipe's
    float_in: tuple[str, ...] = ()

    @property
    def quantized(self) -> bool:
        return not self.keep_float

    def in_bin(self, place: int) -> LayerPlan:
        """The layer as the bin at `place` has it: in float where float_in says so."""
        why = self.float_in[place] if self.float_in else ""
        if not why:
            return self
        return LayerPlan(name=self.name, value=self.value, rows=self.rows, shape=self.shape, keep_float=why)


class Conversion(_Data, frozen=True):
    """A second quantizer behind a value's own, for the `readers` (node names) that take another type or range."""

    dtype: IntType
    ranges: tuple[Range, ...]  # one per bin
    readers: tuple[str, ...]
    why: str


class ValuePlan(_Data, frozen=True):
    """A float value of a graph in which every operator is quantized: its type, and one range a bin."""

    name: str
    dtype: IntType
    ranges: tuple[Range, ...]
    why: str
    conversions: tuple[Conversion, ...] = ()


class ConstantPlan(_Data, frozen=True):
    """A float constant as the `readers` (node names) take it; weights of linears are in WeightPlan.

    scale: one number, or one per index along `axis`; none for an int32 bias, whose scale is the bin's input scale times
    that of the weight it is added beside.
    """

    name: str
    dtype: IntType | Literal["int32"]
    readers: tuple[str, ...]
    why: str
    scale: tuple[float, ...] = ()
    zero_point: int = 0
    axis: int | None = None


class HeadScales(_Data, frozen=True):
    """One bin's symmetric quantizers of an attention operand, one a head."""

    scale: tuple[Annotated[float, Meta(gt=0.0)], ...]
    why: str


class AttentionOperand(_Data, frozen=True):
    """q, k or v of an attention as the canonical MatMul reads it: q̂ = clip(round(x / scale[head])), `channels` a head.

    factor: product of the constants on its way there: a kernel that reads the value in front of them (one fused node)
    takes |scale / factor|.
    """

    value: str
    dtype: Literal["int8", "float8e4m3fn"]
    channels: Annotated[int, Meta(gt=0)]
    bins: tuple[HeadScales, ...]  # one per bin
    factor: float = 1.0


class AttentionPlan(_Data, frozen=True):
    """One attention, named by the node of its scores; product: the node of its values. keep_float: a reason.

    q and k are both there or both not; scores_why, values_why: why they, or v, are not.
    """

    name: str
    product: str
    heads: Annotated[int, Meta(ge=0)]
    keep_float: str = ""
    q: AttentionOperand | None = None
    k: AttentionOperand | None = None
    v: AttentionOperand | None = None
    scores_why: str = ""
    values_why: str = ""

    @property
    def operands(self) -> dict[str, AttentionOperand]:
        """Those that are quantized, by letter."""
        return {name: one for name, one in (("q", self.q), ("k", self.k), ("v", self.v)) if one is not None}


class QuantPlan(_Data, frozen=True):
    """Everything a set of passes carries out. `graph_hash` ties it to the float graph it was made for.

    A plan is one set of weights. A model with two experts has one each, and so has each precision that a schedule
    switches between, and each bin when bins have weights of their own; bins are numbered over all of them.
    Arrays too large for JSON (GPTQ's integers, group scales, low-rank factors) are its *tensors*, named by
    tensor_name() and carried beside it.
    """

    model: str
    graph_hash: str
    target: str
    recipe: Recipe
    bins: tuple[Bin, ...]
    layers: tuple[LayerPlan, ...]
    bins_why: str
    expert: str = ""
    precision: Precision = ""
    draft: bool = False  # smoothing, rotation and bins are chosen, quantizers are not
    values: tuple[ValuePlan, ...] = ()  # of targets that quantize every operator
    constants: tuple[ConstantPlan, ...] = ()
    attentions: tuple[AttentionPlan, ...] = ()
    format: Literal[1] = 1

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        doubled = sorted({n for n in names if names.count(n) > 1})
        if doubled:
            raise PlanError(f"plan names a layer twice: {', '.join(doubled)}")
        for layer in self.layers if not self.draft else ():
            _check_layer(layer, len(self.bins))
        for place, attention in enumerate(self.attentions):
            if any(attention.name == other.name for other in self.attentions[:place]):
                raise PlanError(f"plan names an attention twice: {attention.name}")
            _check_attention(attention, len(self.bins))

    @property
    def name(self) -> str:
        """What tells it from the other plans of its bundle: "", "high" (expert), "high.low" (expert.precision) …"""
        return ".".join(part for part in (self.expert, self.precision) if part)

    def of_bins(self) -> QuantPlan:
        """The plan without the layers that are in none of the bins' graphs."""
        return msgspec.structs.replace(self, layers=tuple(one for one in self.layers if not one.hoisted))

    def of_bin(self, one: Bin) -> QuantPlan:
        """The plan as the graph of `one` has it: of_bins(), with those layers kept in float that are so in this bin."""
        place = self.place(one)
        return msgspec.structs.replace(self, layers=tuple(x.in_bin(place) for x in self.of_bins().layers))

    def place(self, one: Bin) -> int:
        """Where `one` stands among this plan's bins: the index of its ranges. Raises PlanError for a foreign bin."""
        for place, mine in enumerate(self.bins):
            if mine.index == one.index:
                return place
        raise PlanError(f"{one.name} is no bin of this plan ({', '.join(b.name for b in self.bins)})")

    def to_json(self) -> bytes:
        """Raises BundleError for a number that JSON does not have."""
        return encode(self, "plan.json")

    @staticmethod
    def from_json(data: bytes, origin: str = "plan") -> QuantPlan:
        """Raises PlanError when `data` is not a plan of this format."""
        return decode(data, QuantPlan, origin, PlanError)


def bounds(dtype: str, bits: int) -> tuple[int, int]:
    """(lowest, highest) level of a quantizer of `bits` bits in `dtype`."""
    if dtype == "float8e4m3fn":
        return -E4M3_MAX, E4M3_MAX
    low, high = INT_RANGE[dtype]
    return low, min(high, low + 2**bits - 1)


def tensor_name(layer: str, what: TensorKind) -> str:
    """Name of one of the plan's tensors: codes [K, N], scale float32 [K / group, N], down [K, r], up [r, N]."""
    return f"{layer}#{what}"


def _check_layer(layer: LayerPlan, bins: int) -> None:
    if layer.float_in and (layer.keep_float or layer.hoisted or len(layer.float_in) != bins):
        raise PlanError(f"layer {layer.name}: float_in is for quantized layers of the bins' graphs, {bins} entries")
    if layer.keep_float:
        if layer.weight or layer.activation or layer.dynamic or layer.smoothing or layer.rotation or layer.low_rank:
            raise PlanError(f"layer {layer.name}: kept in float and quantized at once")
        return
    if layer.hoisted and layer.activation_dtype != "float":
        raise PlanError(f"layer {layer.name}: is in the {layer.hoisted} graph and has quantizers of bins")
    wanted = 0 if layer.activation_dtype == "float" else bins
    if layer.weight is None or len(layer.activation) + len(layer.dynamic) != wanted:
        raise PlanError(f"layer {layer.name}: needs a weight plan and {wanted} activation ranges, one a bin")
    if layer.activation and layer.dynamic:
        raise PlanError(f"layer {layer.name}: static and dynamic ranges at once")
    k, n = layer.shape
    _check_count(layer.name, "weight scales", layer.weight.scale, 0 if layer.weight.group else n)
    _check_count(layer.name, "smoothing scales", layer.smoothing.scale if layer.smoothing else (), k)
    _check_count(layer.name, "rotation scales", layer.rotation.scale if layer.rotation else (), k)
    if layer.weight.group and k % layer.weight.group:
        raise PlanError(f"layer {layer.name}: {k} channels in groups of {layer.weight.group}")
    if layer.rotation and k % layer.rotation.block:
        raise PlanError(f"layer {layer.name}: {k} channels in rotation blocks of {layer.rotation.block}")
    low, high = bounds(layer.activation_dtype, layer.activation_bits) if layer.activation else (0, 0)
    for index, one in enumerate(layer.activation):
        if not low <= one.zero_point <= high:
            raise PlanError(
                f"layer {layer.name}, bin {index}: zero_point {one.zero_point} outside {layer.activation_bits} bits of "
                f"{layer.activation_dtype}"
            )


def _check_attention(attention: AttentionPlan, bins: int) -> None:
    where = f"attention {attention.name}"
    if bool(attention.keep_float) == bool(attention.operands):
        raise PlanError(f"{where}: needs a reason to keep it in float, or operands to quantize, and not both")
    if (attention.q is None) != (attention.k is None):
        raise PlanError(f"{where}: q and k are quantized together")
    for name, one in attention.operands.items():
        if len(one.bins) != bins or any(len(scales.scale) != attention.heads for scales in one.bins):
            raise PlanError(f"{where}: {name} needs {attention.heads} scales, one a head, for each of {bins} bins")
        if not one.factor or (one.dtype == "int8") != (name != "v"):
            raise PlanError(f"{where}: {name} is {one.dtype} behind a factor of {one.factor:g}")


def _check_count(layer: str, what: str, numbers: tuple[float, ...], wanted: int) -> None:
    if len(numbers) != wanted and (numbers or what == "weight scales"):
        raise PlanError(f"layer {layer}: {len(numbers)} {what} for {wanted} channels")
