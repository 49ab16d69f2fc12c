"""Every hand-off target and the tool that takes it: accepted or refused, and what its numbers are worth.

sample:digits, four bins, each consumer in a process of its own. dB are SQNR against the float model of the bin that
loses most: as the consumer computes it, and as onnxruntime's CPU provider does on the same graphs with nothing fused.

    python -m benchmarks.handoff [UNIT …]      units: see UNITS, and `families`; all of them by default

A unit's rows are kept in build/benchmarks/handoff until --again, so a run that was cut short goes on.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import common

MODEL, BINS = "sample:digits", 4
FOLDER = common.WORK / "handoff"
HEADS = (
    "target, recipe", "consumer", "verdict", "consumer dB", "onnxruntime dB", "clip PSNR dB", "remark",
)  # fmt: skip
# Name -> (architecture, recipe, bits of activations, calls of each bin, clips). The emulator needs a second a call.
HEXAGON: dict[str, tuple[str, str, int | str, int, int]] = {
    "hexagon-v73": ("v73", "static-asq", 16, 4, 0),
    "hexagon-v75": ("v75", "static-asq", 16, 4, 2),
    "hexagon-v79": ("v79", "static-asq", 16, 4, 1),
    "hexagon-v81": ("v81", "static-asq", 16, 4, 0),
    "hexagon-mixed": ("v75", "static-asq", "mixed", 4, 1),
    "hexagon-a8": ("v75", "static-asq", 8, 4, 1),
    "hexagon-w4": ("v75", "rtn", 16, 4, 1),
    "hexagon-w4-rotated": ("v75", "dvd-w4a8", 16, 4, 1),
    "hexagon-w4-groups": ("v75", "svdquant-gptq", 16, 4, 1),
}
Row = list[str]


def exported(target: str, **choices: Any) -> Path:
    """A bundle of MODEL, made once; calibration is shared between those of one target."""
    from vdq_export.compiler import export

    name = "-".join([target, *(str(value) for value in choices.values() if value)])
    place, record = FOLDER / "bundles" / name, FOLDER / f"{target}.safetensors"
    if not (place / "manifest.json").is_file():
        saved = {"calibration": record} if record.is_file() else {"save_calibration": record}
        export(MODEL, target=target, tsw=BINS, out=place, **choices, **saved)
    return place


def hexagon(settings: dict[str, Any]) -> dict[str, Any]:
    """Compile every bin, emulate, compare; whole clips where asked."""
    from vdq_export.bundle import Bundle
    from vdq_export.devices.verify import Choices, verify_device

    arch, recipe, bits, steps, clips = HEXAGON[settings["unit"]]
    bundle = Bundle.open(exported("qnn", recipe=recipe, activations=bits))
    report = verify_device(bundle, MODEL, Choices(arch=arch, steps=steps, clips=clips))
    device = report.device
    assert device is not None
    refused = [one.error for one in device.bins if one.error]
    left = sum(len(one.off_device) for one in device.bins)
    title = f"qnn, {recipe}, {bits} activations" if bits == "mixed" else f"qnn, {recipe}, {bits}-bit activations"
    if refused:
        return {"rows": [[title, f"{device.tool}, {arch}", "refused", "–", "–", "–", refused[0]]]}
    worst = max(device.bins, key=lambda one: one.drop_db or 0.0)
    scales = [one.scales for one in device.bins if one.scales is not None]
    wrong = sum(len(one.mismatches) + len(one.foreign) for one in scales)
    row = [
        title, f"{device.tool}, {arch} emulated", f"accepted: {len(device.bins)} graphs, {left} nodes on the CPU",
        f"{worst.device_db:.2f}", f"{worst.exact_db:.2f}", "–" if report.psnr_db is None else f"{report.psnr_db:.1f}",
        f"quantizers in its dump: {sum(one.found for one in scales)} found, {wrong} other than the bundle's; "
        f"{sum(len(one.float_tensors) for one in scales)} float tensors inside; verify: {report.verdict}",
    ]  # fmt: skip
    return {"rows": [row], "report": json.loads(report.to_json())}


def openvino(settings: dict[str, Any]) -> dict[str, Any]:
    from benchmarks import handoff_openvino

    version = handoff_openvino.openvino_runtime.version()
    rows = [
        [
            f"openvino, static-asq, {one[0]}", f"OpenVINO {version} on {one[2]}, settings: {one[3]}",
            f"accepted: {one[4]} graphs, {one[5]} linears in integers", one[6], one[7], "–",
            f"agreement {one[8]} dB, within 1 dB: {one[9]}",
        ]
        for one in handoff_openvino.rows()
    ]  # fmt: skip
    return {"rows": rows}


def tensorrt(settings: dict[str, Any]) -> dict[str, Any]:
    from benchmarks import handoff_tensorrt

    return {"rows": [list(row) for row in handoff_tensorrt.rows()]}


def aimet(settings: dict[str, Any]) -> dict[str, Any]:
    from benchmarks import handoff_aimet

    bundle = exported("qnn", recipe="static-asq", activations=16)
    return {"heads": handoff_aimet.HEADS, "rows": [list(row) for row in handoff_aimet.rows(bundle)]}


def families(settings: dict[str, Any]) -> dict[str, Any]:
    from benchmarks import handoff_families

    return {"rows": [list(row) for row in handoff_families.rows((settings["family"],))]}


UNITS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    **dict.fromkeys(HEXAGON, hexagon), "aimet": aimet, "openvino": openvino, "tensorrt": tensorrt,
}  # fmt: skip


def result(unit: str, task: str, settings: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """A unit's answer, from the last run where it has one."""
    kept = FOLDER / f"{unit}.json"
    if arguments.again or not kept.is_file():
        print(f"{unit} …", flush=True)
        answer = common.in_child("handoff", task, settings, arguments.threads)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(answer))
    found: dict[str, Any] = json.loads(kept.read_text())
    return found


def run(arguments: argparse.Namespace) -> None:
    from benchmarks.handoff_families import HEADS as FAMILY_HEADS
    from tests.families import FAMILIES

    if arguments.again:
        shutil.rmtree(FOLDER, ignore_errors=True)
    wanted = arguments.units or [*UNITS, "families"]
    tables: list[common.Table] = []
    names = [unit for unit in UNITS if unit in wanted]
    found = {unit: result(unit, unit, {"unit": unit}, arguments) for unit in names}
    tables.append(("Consumers", HEADS, [row for unit in names if unit != "aimet" for row in found[unit]["rows"]]))
    if "aimet" in found:
        tables.append(("Encodings", found["aimet"]["heads"], found["aimet"]["rows"]))
    if "families" in wanted:
        answers = [result(f"family-{name}", "families", {"family": name}, arguments) for name in FAMILIES]
        tables.append(
            ("Families on Hexagon v75, tiny configurations", FAMILY_HEADS, [r for a in answers for r in a["rows"]])
        )
    data = {"units": {unit: answer.get("report", answer["rows"]) for unit, answer in found.items()}}
    title = f"Hand-off: {MODEL}, {BINS} bins"
    if set(wanted) >= {*UNITS, "families"}:
        common.write("handoff", title, tables, data, NOTES, small=False)
    else:
        print("\n".join(common.markdown(*table) for table in tables))


NOTES = """
Nothing here ran on a phone or a GPU: Hexagon graphs went through Qualcomm's own compiler and its emulator of the NPU,
TensorRT graphs through onnx's checker, NVIDIA's published rules (as lint) and a reference evaluator.
"""


if __name__ == "__main__":
    made = common.parser(__doc__)
    made.add_argument("units", nargs="*", metavar="UNIT", choices=[*UNITS, "families", []])
    made.add_argument("--again", action="store_true", help="measure everything anew")
    common.main(made, run, {**UNITS, "families": families})
