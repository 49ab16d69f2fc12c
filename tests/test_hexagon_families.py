"""Every family of video DiTs, tiny: all of it runs on the HTP, and computes what its graph says.

Several seconds a family: each is traced, calibrated, compiled and emulated as a user's model would be.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.handoff_families import measure
from tests.families import FAMILIES
from vdq_export.devices.qnn_provider import available

pytestmark = pytest.mark.skipif(not available(), reason="onnxruntime-qnn is not installed")
APART_DB = 1.0  # between emulator and exact evaluation, each against the float model
LEAST_DB = 35.0  # Mochi has 37 on either side, the others 44 to 48; a value without resolution costs 10 and more

# One form a family: benchmarks/handoff_families.py compiles all of them, also the one that leaves two operators to the
# CPU (HunyuanVideo-1.5-image: it looks whether its image is all zeros, which has no form in floats).
FORMS = (
    "Wan", "SkyReelsV2", "HunyuanVideo", "HunyuanVideo-1.5", "CogVideoX", "CogVideoX-rotary", "LTX-Video", "Latte",
    "Mochi", "Allegro", "Cosmos",
)  # fmt: skip


@pytest.mark.parametrize("family", FORMS)
def test_the_whole_model_runs_on_the_htp_and_is_right(family: str, tmp_path: Path) -> None:
    found = measure(FAMILIES[family](), tmp_path / "bundle")
    assert found.cpu_nodes == ()
    assert found.contexts == 1
    assert found.lint_errors == ()
    assert abs(found.emulated_db - found.ort_db) < APART_DB
    assert found.emulated_db > LEAST_DB
