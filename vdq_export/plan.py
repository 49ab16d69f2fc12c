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
IntType = Literal["int4", "uint4", "int8", "uint8", "int16", "uint16"]
INT_RANGE: dict[str, tuple[int, int]] = {
    "int4": (-8, 7), "uint4": (0, 15),
    "int8": (-128, 127), "uint8": (0, 255),
    "int16": (-32768, 32767), "uint16": (0, 65535),
}  # fmt: skip


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


class WeightPlan(_Data, frozen=True):
    """Symmetric grid per output channel: scale[N]; `qmax` below the type's own for kernels that would saturate.

    The values are those of the weight *after* smoothing: q[k,n] = clip(round(s[k]·W[k,n] / scale[n]), -qmax, qmax).
    """

    dtype: IntType
    qmax: Annotated[int, Meta(gt=0)]
    scale: tuple[float, ...]
    why: str


class LayerPlan(_Data, frozen=True):
    """One linear. `value` is the graph value it reads; `keep_float` (a reason) excludes every quantization field."""

    name: str
    value: str
    rows: int
    shape: tuple[int, int]  # K, N
    keep_float: str = ""
    smoothing: Smoothing | None = None
    weight: WeightPlan | None = None
    activation_dtype: IntType = "uint8"
    activation: tuple[Range, ...] = ()  # one per bin
    smoothing_why: str = ""  # of a quantized layer: why smoothed so, or why not

    @property
    def quantized(self) -> bool:
        return not self.keep_float


class QuantPlan(_Data, frozen=True):
    """Everything a set of passes carries out. `graph_hash` ties it to the float graph it was made for."""

    model: str
    graph_hash: str
    target: str
    recipe: Recipe
    bins: tuple[Bin, ...]
    layers: tuple[LayerPlan, ...]
    bins_why: str
    format: Literal[1] = 1

    def __post_init__(self) -> None:
        names = [layer.name for layer in self.layers]
        doubled = sorted({n for n in names if names.count(n) > 1})
        if doubled:
            raise PlanError(f"plan names a layer twice: {', '.join(doubled)}")
        for layer in self.layers:
            _check_layer(layer, len(self.bins))

    def to_json(self) -> bytes:
        """Raises BundleError for a number that JSON does not have."""
        return encode(self, "plan.json")

    @staticmethod
    def from_json(data: bytes, origin: str = "plan") -> QuantPlan:
        """Raises PlanError when `data` is not a plan of this format."""
        return decode(data, QuantPlan, origin, PlanError)


def _check_layer(layer: LayerPlan, bins: int) -> None:
    if layer.keep_float:
        if layer.weight or layer.activation or layer.smoothing:
            raise PlanError(f"layer {layer.name}: kept in float and quantized at once")
        return
    if layer.weight is None or len(layer.activation) != bins:
        raise PlanError(f"layer {layer.name}: needs a weight plan and {bins} activation ranges, one a bin")
    if len(layer.weight.scale) != layer.shape[1]:
        raise PlanError(f"layer {layer.name}: {len(layer.weight.scale)} weight scales for {layer.shape[1]} channels")
    if layer.smoothing and len(layer.smoothing.scale) != layer.shape[0]:
        raise PlanError(
            f"layer {layer.name}: {len(layer.smoothing.scale)} smoothing scales for {layer.shape[0]} channels"
        )
    low, high = INT_RANGE[layer.activation_dtype]
    for index, one in enumerate(layer.activation):
        if not low <= one.zero_point <= high:
            raise PlanError(
                f"layer {layer.name}, bin {index}: zero_point {one.zero_point} outside {layer.activation_dtype}"
            )
