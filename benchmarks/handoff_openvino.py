"""OpenVINO takes bundles: which graphs, in how many integer kernels, how far from onnxruntime on the same graphs.

With the settings of the hand-off and without, on this processor and limited to AVX2 (no VNNI). dB are SQNR against the
float model over the calls of one trajectory, of the worst bin. Rows of `python -m benchmarks.handoff`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from vdq_export.bundle import Bundle
from vdq_export.compiler import export
from vdq_export.devices import openvino_runtime
from vdq_export.devices.verify_openvino import MAX_DROP_DB, BinResult, compare

MODEL, BINS, CALLS = "sample:digits", 4, 4
KINDS = {"--isa avx2": ("avx2", "static-asq"), "--isa avx512_vnni": ("avx512_vnni", "static-asq")}
ISAS = {"this machine": "", "AVX2 only": "AVX2"}
SETTINGS = {"hand-off": openvino_runtime.SETTINGS, "OpenVINO's own": {}}


def rows() -> list[tuple[str, ...]]:
    """One a bundle, processor and settings. Without the hand-off's settings only on this machine."""
    made = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, (isa, recipe) in KINDS.items():
            place = Path(folder) / isa
            export(MODEL, target="openvino", isa=isa, recipe=recipe, tsw=BINS, out=place)
            for processor, limit in ISAS.items():
                for settings in SETTINGS if not limit else ("hand-off",):
                    made.append(_row(kind, processor, settings, _measure(place, limit, settings)))
    return made


def _row(kind: str, processor: str, settings: str, results: list[BinResult]) -> tuple[str, ...]:
    worst = max(results, key=lambda one: one.drop_db)
    planned, in_float = sum(one.planned for one in results), sum(len(one.in_float) for one in results)
    bound = "±63" if KINDS[kind][0] == "avx2" else "±127"
    return (
        kind, bound, processor, settings, str(len(results)), f"{planned - in_float} of {planned}",
        f"{worst.openvino_db:.2f}", f"{worst.onnxruntime_db:.2f}", f"{worst.agreement_db:.2f}",
        "yes" if worst.drop_db <= MAX_DROP_DB else f"**no** ({worst.drop_db:.2f})",
    )  # fmt: skip


def _measure(bundle: Path, limit: str, settings: str) -> list[BinResult]:
    """In a process of its own: oneDNN reads its limit once. onnxruntime runs unlimited, the reference."""
    environment = {**os.environ, **({"ONEDNN_MAX_CPU_ISA": limit} if limit else {})}
    command = [sys.executable, "-m", "benchmarks.handoff_openvino", str(bundle), settings]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [BinResult(**one) for one in json.loads(done.stdout.splitlines()[-1])]


def main() -> None:
    """One measurement, for _measure(): a bundle and the name of its settings."""
    found = compare(Bundle.open(sys.argv[1]), calls=CALLS, settings=SETTINGS[sys.argv[2]])
    print(json.dumps([asdict(one) for one in found]))


if __name__ == "__main__":
    main()
