"""May it ship? The recipe's thresholds, what was measured of each, and what that comes to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from vdq_export.graph import OUTPUT as MEASURED_OUTPUT
from vdq_export.metrics import db_text
from vdq_export.report.cells import OUTPUT
from vdq_export.report.content import Content
from vdq_export.report.data import LayerQuality, VerifyReport

State = Literal["holds", "missed", "open", "none"]
ON_DEVICE = {"qnn": "htp-emulator", "cuda": "cuda"}  # targets whose graphs `verify --device` runs where they will run


@dataclass(frozen=True)
class Check:
    """One threshold: what is asked, what was measured. state: "open" where nothing was, "none" where nothing can be."""

    name: str
    asked: str
    measured: str
    state: State


def headline(content: Content) -> tuple[str, str]:
    """(how it is coloured: "pass", "fail" or "open"; the verdict in words)"""
    if content.verify is None and content.device is None:
        return "open", "Not measured"
    rows = checks(content)
    said = {one.verdict for one in (content.verify, content.device) if one is not None}
    if "fail" in said or any(one.state == "missed" for one in rows):
        return "fail", "Fails"
    if missing := [one.name for one in rows if one.state == "open"]:
        return "open", f"Passes what was measured; open: {'; '.join(missing)}"
    return "pass", "May ship: every threshold holds"


def checks(content: Content) -> list[Check]:
    """The recipe's thresholds in the order in which people ask for them."""
    wanted, found = content.bundle.plans[0].recipe.verify, content.verify
    lowest = weakest(content)
    rows = [
        Check(
            "clips against float, PSNR",
            f"≥ {wanted.min_psnr_db:g} dB",
            _clips(found, wanted.min_psnr_db),
            _least(found.psnr_db if found else None, wanted.min_psnr_db),
        ),
        Check(
            "weakest layer, SQNR",
            f"≥ {wanted.min_layer_sqnr_db:g} dB",
            named(lowest, wanted.min_layer_sqnr_db),
            _least(lowest.sqnr_db if lowest else None, wanted.min_layer_sqnr_db),
        ),
        _kernels(content, wanted.min_integer_coverage),
        *judged(found, wanted.max_judge_drop),
    ]
    return rows + _device(content)


def _clips(found: VerifyReport | None, wanted: float) -> str:
    if found is None or found.psnr_db is None:
        return "not measured"
    text = db_text(found.psnr_db, wanted)
    if found.clips == 0:  # an earlier version did not count them
        return text
    worst = "" if found.worst_psnr_db is None else f", worst {db_text(found.worst_psnr_db)}"
    return f"{text}, one clip" if found.clips == 1 else f"{text}, mean of {found.clips} clips{worst}"


def _kernels(content: Content, wanted: float) -> Check:
    name, asked = "planned linears on integer kernels", f"≥ {wanted:.0%}"
    found = content.verify.integer_kernels if content.verify else None
    if every_operator(content):
        return Check(name, asked, f"not applicable to {content.bundle.manifest.target}: its device decides", "none")
    if found is None:
        return Check(name, asked, "not measured", "open")
    if not found.planned:
        return Check(name, asked, "none planned", "none")
    holds: State = "holds" if found.executed / found.planned >= wanted else "missed"
    return Check(name, asked, f"{found.executed} of {found.planned}", holds if wanted > 0 else "none")


def every_operator(content: Content) -> bool:
    """Whether the bundle is for a target that leaves no operator in float: no kernel of the CPU's runtime counts."""
    return any(plan.values for plan in content.bundle.plans)


def judged(found: VerifyReport | None, allowed: float) -> list[Check]:
    """A row for each measure of the model's own judge."""
    if found is None or found.judge is None:
        return []
    before, after = found.judge.float_, found.judge.quantized
    count = f" of {found.clips} clip{'s' if found.clips > 1 else ''}" if found.clips else ""
    rows = []
    for name in before:
        holds = before[name] - after[name] <= allowed + 1e-9
        state: State = "none" if allowed >= 1 else "holds" if holds else "missed"
        told = _shares(before[name], after[name], allowed) + count
        rows.append(Check(f"judge: {name}", f"falls by ≤ {allowed:g}", told, state))
    return rows


def _shares(before: float, after: float, allowed: float) -> str:
    """Both in percent, with as many digits as tell which side of `allowed` the fall is on."""
    text = ""
    for digits in range(4):
        text = f"{before:.{digits}%} → {after:.{digits}%}"
        fall = round(before, digits + 2) - round(after, digits + 2)
        if (fall <= allowed + 1e-9) == (before - after <= allowed + 1e-9):
            break
    return text


def _device(content: Content) -> list[Check]:
    """What `verify --device` found; of targets with a device that nobody asked, that it is open."""
    told, target = content.device, content.bundle.manifest.target
    device = told.device if told else None
    if told is None or device is None:
        asked = "the graphs' own result"
        return [Check(f"on {ON_DEVICE[target]}", asked, "not measured", "open")] if target in ON_DEVICE else []
    drops = [one.drop_db for one in device.bins if one.drop_db is not None]
    off = len({name for one in device.bins for name in one.off_device})
    text = [
        f"{len(drops)} of {len(device.bins)} bins run",
        f"at most {max(drops):.2f} dB lost" if drops else "",
        f"{off} nodes not on the device" if off else "",
        "" if told.psnr_db is None else f"clips {db_text(told.psnr_db)}",
    ]
    state: State = "holds" if told.verdict == "pass" else "missed"
    name = " ".join(filter(None, ("on", device.device, device.arch)))
    return [Check(name, "the graphs' own result", ", ".join(filter(None, text)), state)]


def failures(content: Content) -> list[str]:
    """One line for each thing that is wrong, here and on the device."""
    on_device = content.device.failures if content.device else ()
    return [*(content.verify.failures if content.verify else ()), *(f"on the device: {line}" for line in on_device)]


def weakest(content: Content) -> LayerQuality | None:
    """The layer and bin with the lowest SQNR; None where nothing was measured."""
    return min(measured(content), key=lambda one: one.sqnr_db, default=None)


def measured(content: Content) -> Sequence[LayerQuality]:
    """What verify measured, layers of an expert by its name too; the network's output is called so."""
    experts = {one.index: plan.expert for plan in content.bundle.plans for one in plan.bins}

    def name(one: LayerQuality) -> str:
        layer = OUTPUT if one.layer == MEASURED_OUTPUT else one.layer
        return ": ".join(filter(None, (experts.get(one.bin, ""), layer)))

    found = content.verify.layers if content.verify else ()
    return [msgspec.structs.replace(one, layer=name(one)) for one in found]


def named(found: LayerQuality | None, wanted: float | None = None) -> str:
    """The decibels of a layer, and which it is."""
    return "not measured" if found is None else f"{db_text(found.sqnr_db, wanted)}: {found.layer}, bin{found.bin:02d}"


def _least(found: float | None, wanted: float) -> State:
    return "open" if found is None else "holds" if found >= wanted else "missed"
