"""Pipelines of HunyuanVideo, Mochi and LTX: their folders are exported, and the bundles stand in for their networks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vdq_export
from tests import pipelines
from tests.pipeline_cases_joint import CASES
from vdq_export.metrics import sqnr_db
from vdq_export.model import Model
from vdq_export.sources import resolve
from vdq_export.trace import float_error, trace
from vdq_export.verify import count_kernels


@pytest.mark.parametrize("name", CASES)
def test_a_bundle_stands_in_for_the_network(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipe = pipelines.build(case)
    folder = pipelines.save(pipe, case, tmp_path / "model")
    float_video = pipelines.play(pipe, case)
    model = resolve(case.spec(folder))
    steps = [step["inputs"] for one in model.iter_trajectories() for step in one]
    expected = same_as_diffusers(pipe.transformer, model, steps)
    assert float_error(trace(model, tolerance=1e-4), model) <= 1e-4
    bundle = vdq_export.export(model, target="ort-int8", tsw=1, out=tmp_path / "bundle")
    kernels, failures = count_kernels(bundle)
    assert kernels.planned == kernels.executed > 10
    assert failures == []
    with vdq_export.load(tmp_path / "bundle") as network:
        actual = np.stack([row(network(**inputs, return_dict=False)) for inputs in steps])
        assert sqnr_db(expected, actual) >= 30
        pipelines.swap(pipe, network)
        assert float_video.sqnr_db(pipelines.play(pipe, case)) >= 25  # steps and guidance add up what a call loses
        assert network.statistics.step_runs == 0 < network.statistics.table_hits  # the pipeline's timesteps are ours


def same_as_diffusers(network: Any, model: Model, steps: list[dict[str, torch.Tensor]]) -> Any:
    """The network's outputs as rows, which the folder's model has too."""
    fixed = getattr(model.module.forward, "keywords", {})
    repeats = model.metadata["config"].get("repeats", {})
    expected, actual = [], []
    for inputs in steps:
        with torch.no_grad():
            given = {**inputs, **fixed, **{name: inputs[other] for name, other in repeats.items()}}
            expected.append(row(network(**given, return_dict=False)))
        actual.append(row([model(**inputs)]))
    np.testing.assert_allclose(np.stack(actual), np.stack(expected), atol=1e-5, rtol=1e-4)
    return np.stack(expected)


def row(outputs: Iterable[torch.Tensor]) -> Any:
    """One output after the other."""
    return torch.cat([one.flatten() for one in outputs]).numpy()
