"""Every fused layer of the programs, in plain torch, against onnxruntime on the same inputs, recipe by recipe."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from tests import tiny_model
from tests.cuda_layers import Layer, layers
from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter
from vdq_export.compiler import finish, make_plan
from vdq_export.graph import Graph
from vdq_export.model import Model
from vdq_export.targets.cuda import fused_ops

RECIPES = (
    "static-asq", "wan22-w4a4", "svdquant", "quarot", "w4a16-g128", "static-fp8", "static-asq-attention",
    "static-asq-attention-fp8",
)  # fmt: skip
# Relative errors. The target is held to 2e-3 a layer; float32 leaves 2e-7. float16 rounds by 2^-11 at most, by 2.8e-4
# in the mean, what a layer reads and again what it gives: 4e-4, and 6e-4 of attention with its three operands.
BOUNDS = {torch.float32: 2e-6, torch.float16: 1e-3}
# How near to the edge of its code a float lies whose code may be the next one, in units of the floats' root mean
# square: what rounding moves a number by that is a few times as large.
EDGES = {torch.float32: 2e-6, torch.float16: 5e-3}
Bundles = Callable[[str], Bundle]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, tiny: Model, traced: Graph) -> Bundles:
    """The bundle of a recipe; all share one trace and one calibration record."""
    folder = tmp_path_factory.mktemp("layers")
    record = folder / "record.safetensors"

    @cache
    def made(recipe: str) -> Bundle:
        place: dict[str, Any] = {"calibration" if record.is_file() else "save_calibration": record}
        planned = make_plan(
            tiny, target="cuda", isa="jit", recipe=recipe, tsw=2, workers=1, traced={"": traced.copy()}, **place
        )
        with BundleWriter(folder / recipe) as writer:
            return finish(planned, writer)

    return made


def measured(bundle: Bundle, dtype: torch.dtype) -> list[Layer]:
    """Of both bins."""
    found = []
    for index in range(len(bundle.schedule.bins)):
        t = next(t for t in tiny_model.TIMESTEPS if bundle.schedule.select(t, "cond") == index)
        step: Any = {"inputs": tiny_model.inputs(3, t)}
        found += layers(bundle, index, step, dtype)
    return found


@pytest.mark.parametrize("recipe", RECIPES)
def test_each_fused_layer_is_what_onnxruntime_computes(recipe: str, bundles: Bundles) -> None:
    bundle = bundles(recipe)
    for dtype in (torch.float32, torch.float16):
        found = measured(bundle, dtype)
        ops = [one.op for one in found]
        assert min(ops.count(op) for op in ("Linear", "Normalize", "Rope", "Attention")) >= 8
        assert all(one.error <= BOUNDS[dtype] and one.far <= EDGES[dtype] for one in found), max(
            found, key=lambda one: max(one.error / BOUNDS[dtype], one.far / EDGES[dtype])
        )
        assert max(one.error for one in found) > BOUNDS[dtype] / 100  # the type was not ignored


@pytest.mark.parametrize("op", ["Linear", "Normalize", "Rope", "Attention"])
def test_a_layer_that_is_wrong_by_its_bound_is_seen(op: str, bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    call = fused_ops.CALLS[op]

    def wrong(*given: Any, **named: Any) -> Any:
        found = call(*given, **named)
        every = (found,) if isinstance(found, torch.Tensor) else found
        made = tuple(one * 1.002 if one is not None and one.dtype == torch.float32 else one for one in every)
        return made if isinstance(found, tuple) else made[0]

    monkeypatch.setitem(fused_ops.CALLS, op, wrong)
    found = measured(bundles("static-asq-attention"), torch.float32)
    assert {one.op for one in found if one.error >= 1.9e-3} == {op}


@pytest.mark.parametrize("op", ["Linear", "Normalize", "Rope", "Attention"])
def test_a_code_that_is_wrong_is_seen(op: str, bundles: Bundles, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of them, by one."""
    call = fused_ops.CALLS[op]

    def wrong(*given: Any, **named: Any) -> Any:
        found = call(*given, **named)
        for one in (found,) if isinstance(found, torch.Tensor) else found:
            if one is not None and one.dtype == torch.int8:
                one.view(-1)[7] ^= 1
        return found

    monkeypatch.setitem(fused_ops.CALLS, op, wrong)
    found = measured(bundles("static-asq-attention"), torch.float32)
    assert {one.op for one in found if one.far > 10 * EDGES[torch.float32]} == {op}
