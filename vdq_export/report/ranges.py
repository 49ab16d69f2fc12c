"""report/ranges.json: how far the values that linears read reach at each calibrated timestep, compactly.

Legend: S slots (calibrated timestep × guidance branch, highest t first), C channels. Of a calibration record's [S, C]
minima and maxima two numbers a slot are left, before smoothing and rotation and after them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec
import numpy as np

from vdq_export.calib.ranges import exact
from vdq_export.calib.record import CalibrationRecord, Slot, ValueRecord
from vdq_export.calib.transform import Transform
from vdq_export.errors import BundleError
from vdq_export.graph import Array, release
from vdq_export.jsonfile import decode, encode
from vdq_export.plan import LayerPlan, QuantPlan

RANGES = "report/ranges.json"
DIGITS = 5  # significant ones that are kept: a picture needs no more


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class ValueRanges(_Data, frozen=True):
    """One value that `layers` read. lo, hi: as the network computes it, a number a slot.

    after_lo, after_hi: after smoothing and rotation, as the quantizers of the plan see it; () where it gets neither.
    After a rotation they are those of the rows that calibration kept.
    """

    value: str
    layers: tuple[str, ...]
    lo: tuple[float, ...]
    hi: tuple[float, ...]
    after_lo: tuple[float, ...] = ()
    after_hi: tuple[float, ...] = ()


class NetworkRanges(_Data, frozen=True):
    """One set of weights; name: "", an expert, a bin with weights of its own. t, branch: of the slots.

    calls: how often the network was run for them, 0 where nobody counted yet.
    """

    name: str
    t: tuple[float, ...]
    branch: tuple[Literal["cond", "uncond"], ...]
    values: tuple[ValueRanges, ...]
    calls: int = 0


class RangesReport(_Data, frozen=True):
    networks: tuple[NetworkRanges, ...]
    format: Literal[1] = 1

    def to_json(self) -> bytes:
        return encode(self, "ranges.json")

    @staticmethod
    def from_json(data: bytes, origin: str = RANGES) -> RangesReport:
        """Raises BundleError when `data` is not a report of this format."""
        return decode(data, RangesReport, origin, BundleError)


def measure(record: CalibrationRecord, plan: QuantPlan, name: str = "") -> NetworkRanges | None:
    """The ranges of every value that a quantized layer of `plan` reads, at the slots its bins were calibrated at.

    None for a record without data. Raises CalibrationError for NaN or Inf in the record.
    """
    slots = [index for index, slot in enumerate(record.slots) if _serves(plan, slot)]
    if not record.has_data or not slots:
        return None
    readers: dict[str, list[LayerPlan]] = {}
    for layer in plan.layers:
        if layer.quantized and layer.value in record.values:
            readers.setdefault(layer.value, []).append(layer)
    return NetworkRanges(
        name=name,
        t=tuple(record.slots[index].t for index in slots),
        branch=tuple(record.slots[index].branch for index in slots),
        values=tuple(_of_value(record.value(value), layers, slots) for value, layers in readers.items()),
        calls=record.calls,
    )


def _serves(plan: QuantPlan, slot: Slot) -> bool:
    return any(slot.t in one.steps and one.branch in ("any", slot.branch) for one in plan.bins)


def _of_value(value: ValueRecord, layers: Sequence[LayerPlan], slots: Sequence[int]) -> ValueRanges:
    names, plain = tuple(layer.name for layer in layers), exact(value, slots)
    lo, hi = _rounded(plain.lo.min(axis=1)), _rounded(plain.hi.max(axis=1))
    transform = Transform.of(layers[0])  # layers that read one value share it
    if transform.smoothing is None and transform.rotation is None:
        return ValueRanges(value=value.name, layers=names, lo=lo, hi=hi)
    # Slot by slot: the rows that a rotation needs are mapped, and a slot's at a time is enough of them.
    after = [exact(value, [index], transform) for index in slots]
    for array in value.tensors.values():
        release(array)
    return ValueRanges(
        value=value.name,
        layers=names,
        lo=lo,
        hi=hi,
        after_lo=_rounded(np.array([one.lo.min() for one in after])),
        after_hi=_rounded(np.array([one.hi.max() for one in after])),
    )


def _rounded(numbers: Array) -> tuple[float, ...]:
    return tuple(float(f"{float(number):.{DIGITS}g}") for number in numbers)
