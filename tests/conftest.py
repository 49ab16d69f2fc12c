"""Fixtures several test files share. Tracing costs seconds, so it is done once a worker; take copies before editing."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny matrices, and one worker a core
os.environ.setdefault("TRITON_INTERPRET", "1")  # before triton: kernels are read when their files are imported

import pytest
from hypothesis import settings

from tests import tiny_model
from tests.commands import MODEL, command
from vdq_export.graph import Array, Graph
from vdq_export.model import Model
from vdq_export.trace import trace

# The same examples on every run: a red run is one that anybody can repeat. HYPOTHESIS_PROFILE=default explores.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def tiny() -> Model:
    return tiny_model.build()


@pytest.fixture(scope="session")
def traced(tiny: Model) -> Graph:
    """The tiny model's graph as trace leaves it. Shared: never edit it, take traced.copy()."""
    return trace(tiny)


@pytest.fixture(scope="session")
def tiny_feeds(tiny: Model) -> Mapping[str, Array]:
    return {name: tensor.numpy() for name, tensor in tiny_model.inputs(11, 345.0).items()}


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a bundle and its calibration record, written by the real command."""
    folder = tmp_path_factory.mktemp("made")
    code, out, err = command(
        MODEL, "--tsw", "2", "--out", "bundle", "--save-calibration", "record.safetensors", "--json", cwd=folder
    )
    assert (code, err) == (0, ""), "nothing on stderr when it is no terminal"
    (folder / "export.json").write_text(out, encoding="utf-8")
    return folder
