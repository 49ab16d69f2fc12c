"""What the report page shows: everything a bundle says of itself, and clips where somebody made them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeVar

import msgspec
from numpy.typing import NDArray

from vdq_export.bundle import Bundle
from vdq_export.drawing.pixels import Pixels, pixels
from vdq_export.errors import BundleError
from vdq_export.jsonfile import decode
from vdq_export.metrics import bounded, psnr_db
from vdq_export.report import costs
from vdq_export.report.costs import GraphCost, Storage
from vdq_export.report.data import VerifyReport
from vdq_export.report.hoisting import HOISTING, HoistingReport
from vdq_export.report.passes import PASSES, PassesReport
from vdq_export.report.ranges import RANGES, RangesReport

DEVICE = "report/device.json"

T = TypeVar("T", bound=msgspec.Struct)


@dataclass(frozen=True)
class ClipPair:
    """The same case by the float model and by the bundle, uint8 [F, H, W, 3] each.

    psnr_db: of the clips before they became bytes.
    """

    name: str
    reference: Pixels
    quantized: Pixels
    psnr_db: float

    @staticmethod
    def of(name: str, reference: NDArray[Any], quantized: NDArray[Any]) -> ClipPair:
        """From clips [C, F, H, W] in [0, 1]."""
        return ClipPair(name, pixels(reference), pixels(quantized), bounded(psnr_db(reference, quantized)))


@dataclass(frozen=True)
class Content:
    """One bundle; `against`: another one that it is compared with. What the bundle does not have is None or empty.

    device: what `verify --device --save` left.
    """

    bundle: Bundle
    verify: VerifyReport | None
    clips: tuple[ClipPair, ...]
    passes: PassesReport | None
    ranges: RangesReport | None
    hoisting: HoistingReport | None
    graphs: tuple[GraphCost, ...] = ()
    storage: Storage = field(default_factory=lambda: Storage(parts=()))
    device: VerifyReport | None = None
    against: Content | None = None


def gather(bundle: Bundle) -> Content:
    """What `bundle` has. Raises BundleError for a report in it that is damaged or of another format."""
    graphs, storage = costs.measure(bundle)
    return Content(
        bundle=bundle,
        verify=bundle.report,
        clips=(),
        passes=_read(bundle, PASSES, PassesReport),
        ranges=_read(bundle, RANGES, RangesReport),
        hoisting=_read(bundle, HOISTING, HoistingReport),
        graphs=graphs,
        storage=storage,
        device=_read(bundle, DEVICE, VerifyReport),
    )


def _read(bundle: Bundle, path: str, kind: type[T]) -> T | None:
    if bundle.manifest.file(path) is None:
        return None
    place = bundle.path / path
    try:
        data = place.read_bytes()
    except OSError as error:
        raise BundleError(f"cannot read {place}: {error.strerror or error}") from error
    return decode(data, kind, str(place), BundleError)
