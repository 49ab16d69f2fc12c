"""Fixtures several test files share. Tracing costs seconds, so it is done once a worker; take copies before editing."""

from __future__ import annotations

import os
from collections.abc import Mapping

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: tiny matrices, and one worker a core

import pytest

from tests import tiny_model
from vdq_export.graph import Array, Graph
from vdq_export.model import Model
from vdq_export.trace import trace


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
