"""Folders of Wan, SkyReels-V2, CogVideoX, Latte, Allegro and Cosmos are exported; the bundles run in their pipelines.

benchmarks/support_matrix.py shows every case; here are those that differ in how the network is called.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vdq_export
from tests import pipelines
from tests.pipeline_cases import CASES
from vdq_export.errors import BundleError
from vdq_export.sources import resolve
from vdq_export.trace import float_error, trace
from vdq_export.verify import count_kernels

SHOWN = (
    "Wan2.1 I2V",  # an image's embeddings, its latent beside the noise
    "Wan2.2 T2V, two experts",  # each with a guidance of its own
    "Wan2.2 TI2V, I2V",  # a timestep for each token
    "SkyReels-V2",
    "CogVideoX 1.5",  # rotary tables, a frame filled up
    "CogVideoX I2V",
    "Latte",  # returns variances
    "Allegro",  # tables, masks, text of rank 4
    "Cosmos",  # its own guidance and timesteps
)


@pytest.mark.parametrize("name", SHOWN)
def test_a_bundle_stands_in_for_the_network(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipe = pipelines.build(case)
    model = resolve(case.spec(pipelines.save(pipe, case, tmp_path / "model")))
    traced = {expert: trace(network, tolerance=1e-4) for expert, network in model.networks()}
    for expert, network in model.networks():
        assert float_error(traced[expert], network) <= 1e-4
    bundle = vdq_export.export(model, target="ort-int8", tsw=1, traced=traced, workers=1, out=tmp_path / "bundle")
    kernels, floating = count_kernels(bundle)
    assert kernels.planned == kernels.executed > 10
    assert floating == []
    expected = pipelines.play(pipe, case)
    with vdq_export.load(bundle.path) as transformer:
        pipelines.swap(pipe, transformer)
        found = pipelines.play(pipe, case)
        assert transformer.statistics.calls == case.calls
        if name == "Cosmos":  # the positions in time are constants of its graphs
            with pytest.raises(BundleError, match="fps is not what the graphs were made with"):
                pipelines.play(pipe, replace(case, call={"fps": 24}))
    assert 30 <= expected.sqnr_db(found) < 60
    assert found.video.shape == expected.video.shape
    assert np.abs(found.video - expected.video).max() < 0.2


def test_the_folders_own_calls_are_the_pipelines(tmp_path: Path) -> None:
    """The trajectory's inputs are what the pipeline gives its network; of the latent, what is beside the noise."""
    case = replace(CASES["Wan2.1 I2V"], steps=2)
    pipe = pipelines.build(case)
    model, channels = resolve(case.spec(pipelines.save(pipe, case, tmp_path / "model"))), pipe.vae.config.z_dim
    calls: list[dict[str, Any]] = []
    pipe.transformer.register_forward_pre_hook(lambda _, values, named: calls.append(named), with_kwargs=True)
    pipelines.play(pipe, case, seed=1)
    steps = next(iter(model.iter_trajectories()))
    assert [step["branch"] for step in steps] == ["cond", "uncond"] * 2
    for step, call in zip(steps, calls, strict=True):
        for key, tensor in step["inputs"].items():
            assert tensor.shape == call[key].shape
            if key == "hidden_states":
                tensor, call[key] = (x[:, channels:] for x in (tensor, call[key]))
            torch.testing.assert_close(tensor, call[key].to(tensor.dtype))
