"""A model exported in two precisions is, at both ends of its policy, the two models exported in one each."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest

from tests import tiny_model
from vdq_export import recipe
from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter
from vdq_export.compiler import finish, make_plan
from vdq_export.graph import Array, Graph
from vdq_export.model import Model
from vdq_export.policy import DeltaPolicy
from vdq_export.recipe import Recipe, ScheduleRecipe
from vdq_export.runtime import load
from vdq_export.runtime.engine import Statistics


def quantized(bits: int, schedule: ScheduleRecipe) -> Recipe:
    base = recipe.load("static-minmax")
    activations = msgspec.structs.replace(base.activations, bits=bits)
    return msgspec.structs.replace(base, activations=activations, schedule=schedule)


def clip(bundle: Bundle, policy: str | None) -> tuple[list[Array], Statistics]:
    """Outputs of every call of a recorded trajectory, conditional and unconditional."""
    found = []
    with load(bundle.path, threads=1, policy=policy) as transformer:
        for step in tiny_model.trajectory(3):
            with transformer.cache_context(step["branch"]):
                found.append(transformer(**{name: one.numpy() for name, one in step["inputs"].items()}).sample)
        return found, transformer.statistics


@pytest.fixture(scope="module")
def bundles(tiny: Model, traced: Graph, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    """4 bits, 8 bits, and both with δ between them."""
    recipes = {
        "low": quantized(4, ScheduleRecipe()),
        "high": quantized(8, ScheduleRecipe()),
        "both": quantized(4, ScheduleRecipe(delta=0.3, high=8)),
    }
    made, record = {}, tmp_path_factory.mktemp("record") / "record.safetensors"
    for name, one in recipes.items():
        reused = {"calibration": record} if record.exists() else {"save_calibration": record}
        with BundleWriter(tmp_path_factory.mktemp("policy") / name) as writer:
            planned = make_plan(tiny, target="ort-int8", tsw=2, recipe=one, traced={"": traced.copy()}, **reused)
            made[name] = finish(planned, writer)
    return made


@pytest.mark.parametrize(("delta", "precision", "bits"), [("0", "high", 8.0), ("inf", "low", 4.0)])
def test_the_ends_of_delta_are_the_bundles_of_one_precision(
    bundles: dict[str, Bundle], delta: str, precision: str, bits: float
) -> None:
    alone, _ = clip(bundles[precision], None)
    for policy in (f"delta={delta}", f"static:{precision}"):
        found, counts = clip(bundles["both"], policy)
        np.testing.assert_array_equal(found, alone)
        assert counts.average_bits == bits and counts.steps == len(tiny_model.TIMESTEPS)
    other, _ = clip(bundles["low" if precision == "high" else "high"], None)
    assert np.abs(np.subtract(other, alone)).max() > 1e-3  # the ends differ


def test_in_between_both_precisions_run_on_one_session(bundles: dict[str, Bundle]) -> None:
    schedule = bundles["both"].schedule
    assert schedule.policy == DeltaPolicy(delta=0.3) and schedule.bits == {"low": 4.0, "high": 8.0}
    _, counts = clip(bundles["both"], None)
    assert 0 < counts.low_steps < counts.steps == counts.low_steps + counts.high_steps
    assert counts.loads == 1 and 4 < (counts.average_bits or 0) < 8
    weights = [bundle.manifest.file("graphs/weights/weights.bin") for bundle in bundles.values()]
    low, high, both = (one.size for one in weights if one is not None)
    # Weights once. Biases on the accumulator's grid are each bin's own.
    assert both < 1.5 * max(low, high)
