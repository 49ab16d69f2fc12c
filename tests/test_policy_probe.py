"""The probe graph gives the network's own modulated input, and changes of it tell changes of the output."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tiny_model
from vdq_export import ort, pipeline
from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter, signature_of
from vdq_export.calib.step_reuse import Learnt, changes, fit, learn
from vdq_export.contract import PassContext
from vdq_export.errors import CalibrationError, PassError
from vdq_export.graph import OUTPUT, Array, Graph
from vdq_export.graphs import probe
from vdq_export.manifest import Manifest, ModelIdentity
from vdq_export.metrics import relative_change
from vdq_export.model import Model
from vdq_export.plan import Bin
from vdq_export.policy import CachePolicy, Probe
from vdq_export.runtime import load
from vdq_export.schedule import Schedule

WEIGHTS = "graphs/weights/weights.bin"
MODULATED = "blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def canonical(traced: Graph) -> Graph:
    graph = traced.copy()
    pipeline.run_passes(graph, pipeline.CANONICAL, PassContext())
    return graph


def value_of(graph: Graph, layer: str) -> str:
    return next(str(one.value.name) for one in graph.linears() if one.name == layer)


# -- cutting ---------------------------------------------------------------------------------------------------------


def test_the_first_value_that_both_latent_and_timestep_reach_is_what_attention_reads(canonical: Graph) -> None:
    chosen = probe.choose(canonical, "timestep", "hidden_states")
    assert chosen == value_of(canonical, MODULATED)
    # Not the first linears, which are those of the timestep's embedding or of the patches.
    assert canonical.linears()[0].value.name != chosen
    with pytest.raises(PassError, match="'timestep' and 'nothing'"):
        probe.choose(canonical, "timestep", "nothing")


def test_the_probe_gives_the_graphs_own_value(canonical: Graph, tiny_feeds: Mapping[str, Array]) -> None:
    chosen, before = probe.choose(canonical, "timestep", "hidden_states"), canonical.hash()
    made = probe.cut(canonical, chosen)
    assert canonical.hash() == before
    assert [one.name for one in made.gs.inputs] == ["hidden_states", "timestep"]  # the prompt is not needed
    feeds = {name: tiny_feeds[name] for name in ("hidden_states", "timestep")}
    # The same operators on the same values; onnxruntime may fuse them otherwise, in the last bits.
    whole = ort.run(canonical, tiny_feeds, [chosen])[chosen]
    np.testing.assert_allclose(ort.run(made, feeds)[chosen], whole, rtol=1e-5, atol=1e-6)
    moved = ort.run(made, {**feeds, "timestep": feeds["timestep"] / 2})[chosen]
    assert relative_change(moved, whole) > 0.01  # the timestep is in it


def test_the_probe_holds_nothing_else(canonical: Graph) -> None:
    made = probe.cut(canonical, probe.choose(canonical, "timestep", "hidden_states"))
    assert len(made.nodes) < len(canonical.nodes) / 3
    needed = {t.name for node in made.nodes for t in node.inputs}
    assert {one.name for one in made.constants()} <= needed
    layers = {one.name for one in made.linears()}
    assert not any(name.startswith(("blocks.1", "blocks.0.ffn", "proj_out")) for name in layers) and layers


def test_values_that_no_node_computes_cannot_be_cut(canonical: Graph) -> None:
    for name in ("hidden_states", "nonsense", canonical.linears()[0].weight.name):
        with pytest.raises(PassError, match=f"no node of the graph computes '{name}'"):
            probe.cut(canonical, name)


# -- measuring and fitting -------------------------------------------------------------------------------------------


def test_changes_are_those_of_the_probe_and_of_the_output(canonical: Graph, tiny: Model) -> None:
    chosen = probe.choose(canonical, "timestep", "hidden_states")
    found = changes(canonical, tiny, chosen, limit=1)
    calls = [step for step in tiny_model.trajectory(0) if step["branch"] == "cond"]  # the first of each step
    runs = [ort.run(canonical, {n: t.numpy() for n, t in step["inputs"].items()}, [chosen]) for step in calls]
    pairs = [(now, before) for before, now in pairwise(runs)]
    np.testing.assert_allclose(found.inputs, [relative_change(a[chosen], b[chosen]) for a, b in pairs], rtol=1e-6)
    np.testing.assert_allclose(found.outputs, [relative_change(a[OUTPUT], b[OUTPUT]) for a, b in pairs], rtol=1e-6)
    assert len(found.inputs) == len(tiny_model.TIMESTEPS) - 1 and min(found.inputs) > 0
    assert len(changes(canonical, tiny, chosen).inputs) == 2 * len(found.inputs)


def test_a_trajectory_of_one_step_tells_nothing(canonical: Graph) -> None:
    one = Model(tiny_model.wan(), tiny_model.inputs(7, 500.0), [tiny_model.trajectory(0)[:2]])
    with pytest.raises(CalibrationError, match="has two steps"):
        changes(canonical, one, probe.choose(canonical, "timestep", "hidden_states"))


@given(
    st.lists(st.floats(-3, 3), min_size=5, max_size=5),
    st.lists(st.integers(1, 400), min_size=6, max_size=30, unique=True),
)
def test_a_polynomial_is_found_again(coefficients: list[float], points: list[int]) -> None:
    x = np.array(points) / 400
    y = np.polyval(coefficients, x)
    # On the points themselves: coefficients of nearby points are ill-conditioned, their values are not.
    np.testing.assert_allclose(np.polyval(fit(x.tolist(), y.tolist()), x), y, rtol=0, atol=1e-6)


def test_small_changes_do_not_spoil_the_fit() -> None:
    x = np.linspace(1e-4, 4e-4, 20)
    np.testing.assert_allclose(np.polyval(fit(x.tolist(), (3 * x).tolist()), x), 3 * x, rtol=1e-9)


def test_few_points_lower_the_degree() -> None:
    assert fit([0.1, 0.2], [0.2, 0.4]) == pytest.approx((2.0, 0.0), abs=1e-12)
    assert fit([0.1, 0.1], [0.2, 0.4]) == pytest.approx((0.3,))
    assert fit([0.1, 0.2, np.inf, 0.3], [0.2, 0.4, 1.0, np.nan]) == pytest.approx((2.0, 0.0), abs=1e-12)
    assert len(fit(np.linspace(0, 1, 9).tolist(), np.linspace(0, 2, 9).tolist(), degree=2)) == 3
    with pytest.raises(CalibrationError, match="no step's change is finite"):
        fit([np.nan], [1.0])


# -- in a bundle -----------------------------------------------------------------------------------------------------


def written(out: Path, graph: Graph, learnt: Learnt | None) -> Bundle:
    """A bundle of one bin; a float graph stands for the integer ones."""
    with BundleWriter(out) as writer:
        body, probes = writer.add_graph("body.bin00", *graph.skeleton()), list[Probe]()
        if learnt is not None:
            path = writer.add_graph("probe", *learnt.graph.skeleton())
            probes.append(Probe(graph=path, coefficients=learnt.coefficients))
        manifest = Manifest(
            model=ModelIdentity(name="tiny", weight_hash="0"),
            target="test",
            isa="any",
            signature=signature_of(graph.skeleton()[0], "timestep"),
        )
        every = Bin(index=0, t=(0.0, 1000.0), steps=tiny_model.TIMESTEPS)
        reuse = CachePolicy(threshold=0.0, probes=tuple(probes))
        return writer.commit(manifest, Schedule.from_bins([every], [body], reuse=reuse))


def test_a_bundle_with_its_probe_reuses_steps(canonical: Graph, tiny: Model, tmp_path: Path) -> None:
    learnt = learn(canonical, tiny)
    bundle = written(tmp_path / "out", canonical, learnt)
    sizes = [one.manifest.file(WEIGHTS) for one in (bundle, written(tmp_path / "bare", canonical, None))]
    assert sizes[0] is not None and sizes[0] == sizes[1]  # its weights are those of the body, stored once
    calls: list[dict[str, Any]] = [
        {name: tensor.numpy() for name, tensor in step["inputs"].items()} for step in tiny_model.trajectory(0)[::2]
    ]
    feeds = [{name: call[name] for name in ("hidden_states", "timestep")} for call in calls]
    values = [next(iter(ort.run(learnt.graph, one).values())) for one in feeds]
    moved = [np.polyval(learnt.coefficients, relative_change(b, a)) for a, b in pairwise(values)]
    threshold = 1.1 * moved[0]  # the second step is reused, and another one adds to it
    with load(bundle.path, threads=1) as plain, load(bundle.path, threads=1, policy=f"cache={threshold}") as cached:
        exact = [plain(**call).sample for call in calls]
        found = [cached(**call).sample for call in calls]
        assert plain.statistics.reused_steps == 0 < cached.statistics.reused_steps < len(calls) - 1
    np.testing.assert_array_equal(found[0], exact[0])
    np.testing.assert_array_equal(found[1], exact[0])
    np.testing.assert_array_equal(found[-1], exact[-1])
