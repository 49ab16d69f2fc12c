"""report.json: what `verify` measured, as plain data. The keys are fixed: other people's tools read them."""

from __future__ import annotations

from typing import Literal

import msgspec

from vdq_export.errors import BundleError
from vdq_export.jsonfile import decode, encode
from vdq_export.report.device import DeviceReport


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class JudgeScores(_Data, frozen=True):
    """{measure: fraction right} of clips made by the float model and by the bundle."""

    float_: dict[str, float] = msgspec.field(name="float")
    quantized: dict[str, float]


class KernelCount(_Data, frozen=True):
    """Linears planned as integer over all bins, and those the runtime's optimised graphs really execute so.

    floating: the others, "LAYER in BIN" each.
    """

    planned: int
    executed: int
    floating: tuple[str, ...] = ()


class LayerQuality(_Data, frozen=True):
    """SQNR (dB) of one layer's output in one bin against float; `worst_step` is the timestep where it is lowest."""

    layer: str
    bin: int
    sqnr_db: float
    worst_step: float


class StepError(_Data, frozen=True):
    """SQNR (dB), mean over clips, of the latents that the step at t is given: made by the bundle, against the float
    model's own.
    """

    t: float
    sqnr_db: float


class VerifyReport(_Data, frozen=True):
    """The verdict, its measurements, and one line for each threshold missed. psnr_db: final clip against float, mean.

    clips: whole clips behind psnr_db and judge, 0: none, or nobody counted yet. worst_psnr_db: of one of them.
    device: what was measured there with `verify --device`; clips, judge, layers and kernels are then the device's too.
    machine: what it was measured on. growth: how the error grows along the clips' trajectories, without the first step,
    which both start from.
    """

    verdict: Literal["pass", "fail"]
    bundle_bytes: int
    integer_kernels: KernelCount
    psnr_db: float | None = None
    worst_psnr_db: float | None = None
    clips: int = 0
    judge: JudgeScores | None = None
    layers: tuple[LayerQuality, ...] = ()
    failures: tuple[str, ...] = ()
    device: DeviceReport | None = None
    growth: tuple[StepError, ...] = ()
    machine: str = ""
    format: Literal[1] = 1

    def to_json(self) -> bytes:
        """Raises BundleError for an infinite or NaN number: JSON has none."""
        return encode(self, "report.json")

    @staticmethod
    def from_json(data: bytes, origin: str = "report.json") -> VerifyReport:
        """Raises BundleError when `data` is not a report of this format."""
        return decode(data, VerifyReport, origin, BundleError)
