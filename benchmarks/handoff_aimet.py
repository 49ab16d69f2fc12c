"""AIMET reads a bundle's encodings: how many tensors, with which scales, and whether they are the graph again.

It runs in .venv-aimet (`make aimet`), through tests/aimet/check.py.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import ROOT
from vdq_export.bundle import Bundle
from vdq_export.graph import Graph
from vdq_export.handoff import encodings, float_graph

PYTHON = ROOT / ".venv-aimet/bin/python"
HEADS = (
    "encodings", "consumer", "bins", "tensors of a bin", "loaded as written", "largest scale error",
    "asked for and missing", "largest output difference of AIMET's Q/DQ graph",
)  # fmt: skip


def rows(bundle: Path) -> list[tuple[str, ...]]:
    """One a version of the file. Raises FileNotFoundError without .venv-aimet."""
    found = verdicts(Bundle.open(bundle))
    return [_row(version, [one for one in found if one["version"] == version]) for version in encodings.VERSIONS]


def verdicts(bundle: Bundle) -> list[dict[str, Any]]:
    """What check.py says of each bin and version, over the one float graph that is handed out for all bins."""
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        cases = []
        float_graph.save(Graph.load(bundle.graph_path(0)), root / "float.onnx")
        for one in bundle.schedule.bins:
            graph = Graph.load(bundle.path / one.graph)
            for version in encodings.VERSIONS:
                name = encodings.file_name(Path(one.graph).stem, version)
                cases.append(root / name.removesuffix(".json"))
                cases[-1].mkdir()
                graph.save(cases[-1] / "qdq.onnx")
                shutil.copy(bundle.path / encodings.FOLDER / name, cases[-1] / "encodings.json")
                for file in ("float.onnx", "float.data"):
                    shutil.copy(root / file, cases[-1] / file)
        command = [PYTHON, ROOT / "tests/aimet/check.py", *cases]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def _row(version: str, found: list[dict[str, Any]]) -> tuple[str, ...]:
    tensors = {one["tensors"] for one in found}
    right = sum(one["tensors"] - len(one["wrong"]) for one in found)
    return (
        f"AIMET JSON {version}",
        f"aimet-onnx {found[0]['aimet']}",
        str(len(found)),
        ", ".join(map(str, sorted(tensors))),
        f"{right} of {sum(one['tensors'] for one in found)}",
        f"{max(one['scale_error'] for one in found):.1g}",
        str(sum(len(one["uncovered"]) for one in found)),
        f"{max(one['run'] for one in found):.1g} ({sum(one['run'] == 0.0 for one in found)} bins bit for bit)",
    )
