"""What every `verify --device` has in common: which calls each bin is measured on, sums of errors, and the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from vdq_export.bundle import Bundle
from vdq_export.devices.first_difference import MARGIN_DB
from vdq_export.errors import ModelError
from vdq_export.graph import Array
from vdq_export.metrics import LIMIT_DB, bounded, bounded_sqnr_db, decibels
from vdq_export.model import Model, Step
from vdq_export.report.data import KernelCount, LayerQuality, VerifyReport
from vdq_export.report.device import DeviceBin, DeviceReport
from vdq_export.verify import Clips, judge_clips

# Device and exact evaluator agree to a thousandth of the output: no bin fails by what is left, even where quantization
# costs next to nothing. Below 51 dB against float the margin alone decides.
NEGLIGIBLE_DB = 60.0


@dataclass
class Noise:
    """Sums of squares over the calls of one bin: of the float result and of three differences."""

    signal: float = 0.0
    exact: float = 0.0
    device: float = 0.0
    between: float = 0.0
    worst: tuple[float, float] = (LIMIT_DB, 0.0)  # (SQNR of the device, t) of the worst call
    seconds: list[float] = field(default_factory=list)

    def add(self, reference: Array, exact: Array, device: Array, t: float) -> None:
        self.signal += _energy(reference)
        self.exact += _energy(reference - exact)
        self.device += _energy(reference - device)
        self.between += _energy(exact - device)
        self.worst = min(self.worst, (bounded_sqnr_db(reference, device), t))

    def figures(self) -> dict[str, Any]:
        """Fields of DeviceBin."""
        exact, device = bounded_db(self.signal, self.exact), bounded_db(self.signal, self.device)
        return {
            "exact_db": exact,
            "device_db": device,
            "drop_db": exact - device,
            "agreement_db": bounded_db(self.signal, self.between),
            "run_seconds": float(np.mean(self.seconds)),
        }


def calls_by_bin(bundle: Bundle, model: Model, count: int) -> dict[int, list[Step]]:
    """Up to `count` calls of each bin, spread over its steps in the float model's first trajectory.

    Raises ModelError when a bin has none.
    """
    first = next(iter(model.iter_trajectories()), None)
    if first is None:
        raise ModelError(f"{model.name} brings no trajectories", hint="verify needs at least one recorded trajectory")
    steps: dict[int, list[Step]] = {one.index: [] for plan in bundle.plans for one in plan.bins}
    for step in first:
        for precision in {plan.precision for plan in bundle.plans}:
            steps[bundle.schedule.select(step["t"], step["branch"], precision=precision)].append(step)
    for index, mine in steps.items():
        if not mine:
            raise ModelError(f"no step of {model.name}'s first trajectory is bin{index:02d}'s")
    spread = {index: np.linspace(0, len(mine) - 1, min(count, len(mine))).round() for index, mine in steps.items()}
    return {index: [steps[index][int(place)] for place in places] for index, places in spread.items()}


def inputs_of(bundle: Bundle, call: Step) -> dict[str, Array]:
    return {one.name: call["inputs"][one.name].numpy() for one in bundle.manifest.signature.inputs}


def bin_failures(one: DeviceBin) -> list[str]:
    """What is wrong with a bin, one line each."""
    name = f"bin{one.bin:02d}"
    if one.error:
        return [f"{name}: does not compile: {one.error}"]
    found = []
    agrees = one.agreement_db is None or one.agreement_db > NEGLIGIBLE_DB
    if one.drop_db is not None and one.drop_db > MARGIN_DB and not agrees:
        found.append(
            f"{name}: {one.device_db:.2f} dB on the device, {one.exact_db:.2f} by the exact evaluator: "
            f"more than {MARGIN_DB:g} dB lost"
        )
    if one.off_device:
        found.append(f"{name}: {len(one.off_device)} nodes do not run on the device: {', '.join(one.off_device[:5])}")
    if one.scales is not None and (wrong := (*one.scales.mismatches, *one.scales.foreign)):
        found.append(f"{name}: {len(wrong)} quantizers differ in the compiled graph: {', '.join(wrong[:5])}")
    return found


def verdict(
    bundle: Bundle,
    model: Model,
    device: DeviceReport,
    kernels: KernelCount,
    layers: Sequence[LayerQuality],
    made: Clips,
) -> VerifyReport:
    """The report of what was measured, with a line for each thing that is wrong."""
    thresholds = bundle.plans[0].recipe.verify
    failures = [line for one in device.bins for line in bin_failures(one)]
    psnr, scores, worse = judge_clips(model, made, thresholds, layers, "clips on the device")
    failures += worse
    return VerifyReport(
        verdict="fail" if failures else "pass",
        bundle_bytes=bundle.size,
        integer_kernels=kernels,
        psnr_db=psnr,
        judge=scores,
        layers=tuple(layers),
        failures=tuple(failures),
        device=device,
        **made.figures(),
    )


def _energy(values: Array) -> float:
    return float(np.sum(np.square(values, dtype=np.float64)))


def bounded_db(signal: float, noise: float) -> float:
    return bounded(decibels(signal, noise))
