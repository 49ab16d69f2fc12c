"""Pipelines of HunyuanVideo, Mochi and LTX: their folders are exported, and the bundles stand in for their networks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vdq_export
from tests import pipelines
from tests.pipeline_cases_joint import CASES
from vdq_export.metrics import sqnr_db
from vdq_export.model import Model, first_tensor
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
        actual = np.stack([network(**inputs, return_dict=False)[0].numpy() for inputs in steps])
        assert sqnr_db(expected, actual) >= 30
        pipelines.swap(pipe, network)
        assert float_video.sqnr_db(pipelines.play(pipe, case)) >= 25  # steps and guidance add up what a call loses


def same_as_diffusers(network: Any, model: Model, steps: list[dict[str, torch.Tensor]]) -> Any:
    """The network's outputs, which the folder's model has too."""
    fixed = model.module.forward.keywords if hasattr(model.module.forward, "keywords") else {}
    with torch.no_grad():
        expected = np.stack([first_tensor(network(**inputs, **fixed)).numpy() for inputs in steps])
    actual = np.stack([model(**inputs).numpy() for inputs in steps])
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=1e-4)
    return expected
