"""AIMET itself reads our encodings: every tensor, scales and offsets as written, and the same model out of them.

It lives in an environment of its own (`make aimet` builds it); tests/aimet/check.py runs there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT
from tests.qdq_graphs import small_qdq
from vdq_export.graph import Graph
from vdq_export.handoff import encodings, float_graph
from vdq_export.handoff.encodings import VERSIONS

PYTHON = ROOT / ".venv-aimet" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
pytestmark = pytest.mark.skipif(not PYTHON.is_file(), reason="no .venv-aimet: `make aimet` builds it")


def ask(cases: Mapping[str, tuple[Graph, bytes]], root: Path) -> dict[str, dict[str, Any]]:
    """What check.py says of each {case: (Q/DQ graph, encodings file)}; one process, as AIMET takes seconds to load."""
    for name, (graph, data) in cases.items():
        folder = root / name
        folder.mkdir()
        graph.save(folder / "qdq.onnx")
        float_graph.save(graph, folder / "float.onnx")
        (folder / "encodings.json").write_bytes(data)
    command = [PYTHON, ROOT / "tests/aimet/check.py", *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return dict(zip(cases, map(json.loads, lines), strict=True))


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    plain, blocks = small_qdq(), small_qdq(block=32)
    found = encodings.of_graph(plain)
    cases = {version: (plain, encodings.to_json(found, version)) for version in VERSIONS}
    cases |= {f"{v} blocks": (blocks, encodings.to_json(encodings.of_graph(blocks), v)) for v in ("1.0.0", "2.0.0")}
    fewer = json.loads(encodings.to_json([one for one in found if one.name != "shifted"], "2.0.0"))
    next(one for one in fewer["encodings"] if one["name"] == "product")["y_scale"] *= 1 + 1e-6
    next(one for one in fewer["encodings"] if one["name"] == "y")["y_scale"] *= 3
    cases["wrong"] = (plain, json.dumps(fewer).encode())
    return ask(cases, tmp_path_factory.mktemp("aimet"))


@pytest.mark.parametrize("case", [*VERSIONS, "1.0.0 blocks", "2.0.0 blocks"])
def test_aimet_loads_every_tensor_as_written(answers: dict[str, dict[str, Any]], case: str) -> None:
    """u16, u8, s16 behind u16, int8 per channel or int4 in blocks, int32 bias: scales to 1e-7, offsets exactly, nothing
    that AIMET would quantize without an encoding; the Q/DQ graph it makes of the float graph runs as ours, bit for bit.
    """
    found = answers[case]
    assert (found["tensors"], found["wrong"], found["uncovered"]) == (10, [], [])
    assert found["scale_error"] <= 1e-7
    assert found["run"] == (None if case == "1.0.0 blocks" else 0.0)


@pytest.mark.parametrize("case", ["2.0.0", "2.0.0 blocks"])
def test_aimet_reads_the_same_from_the_q_dq_nodes(answers: dict[str, dict[str, Any]], case: str) -> None:
    """Only the value behind two pairs has another name in AIMET's own reading."""
    assert answers[case]["read"] == {"shared": 9, "differing": [], "theirs_only": ["soft/DQ"]}


def test_the_check_can_fail(answers: dict[str, dict[str, Any]]) -> None:
    """A scale off by 1e-6, one three times as large and a tensor that is missing are seen."""
    found = answers["wrong"]
    assert found["read"]["differing"] == ["product", "y"] and found["uncovered"] == ["shifted"] and found["run"] > 0
