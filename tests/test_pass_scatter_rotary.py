"""scatter, rms_norm and rotary on the traced Wan blocks; what all passes promise is in test_pass_contract.py."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from vdq_export import ort, pipeline
from vdq_export.contract import PassContext
from vdq_export.graph import Graph
from vdq_export.model import Model

# Float32 rounding of reordered sums at these widths is about 1e-6 of the largest output.
TOLERANCE = 1e-5


@pytest.fixture
def canonical(traced: Graph) -> Graph:
    graph = traced.copy()
    pipeline.run_passes(graph, pipeline.CANONICAL, PassContext())
    return graph


def error(graph: Graph, reference: Graph, tiny: Model) -> float:
    feeds = {name: tensor.numpy() for name, tensor in tiny.example_inputs.items()}
    expected, actual = ort.run(reference, feeds)["sample"], ort.run(graph, feeds)["sample"]
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def test_canonical_blocks_have_no_scatter_and_no_reciprocal(canonical: Graph) -> None:
    ops = Counter(node.op for node in canonical.nodes)
    assert ops["ScatterND"] == ops["Reciprocal"] == 0
    assert ops["Div"] == 8  # two blocks: q and k of self- and of cross-attention
    assert max(len(v.shape or ()) for n in canonical.nodes for v in n.outputs if n.name.startswith("blocks.")) == 4


def test_rotary_reorders_q_and_k_alike(canonical: Graph, traced: Graph, tiny: Model) -> None:
    names = {t.name for t in canonical.constants()}
    assert {f"blocks.0.attn1.to_{p}.weight.T.halves" for p in "qk"} <= names
    assert error(canonical, traced, tiny) < TOLERANCE


@pytest.mark.parametrize("part", ["to_q.weight.T", "to_k.bias", "norm_k.weight"])
def test_a_forgotten_reordering_is_seen(part: str, canonical: Graph, traced: Graph, tiny: Model) -> None:
    constants = {t.name: t for t in traced.constants()}
    name = f"blocks.0.attn1.{part}"
    changed = next(t for t in canonical.constants() if t.name == f"{name}.halves")
    original = constants[name.removesuffix(".T")].values
    changed.values = original.T if name.endswith(".T") else original
    assert error(canonical, traced, tiny) > 10 * TOLERANCE


def test_rotary_leaves_a_linear_that_something_else_reads(traced: Graph) -> None:
    graph = traced.copy()
    pipeline.run_passes(graph, pipeline.CANONICAL[: pipeline.CANONICAL.index("rotary")], PassContext())
    linear = next(one for one in graph.linears() if one.name == "blocks.0.attn1.to_q")
    graph.gs.outputs.append(
        graph.add_node("Neg", [linear.output], "probe", dtype=np.float32, shape=linear.output.shape)
    )
    (report,) = pipeline.run_passes(graph, ["rotary"], PassContext())
    assert report.applied == 2  # q and k of the other block
    assert [s.where for s in report.skipped] == ["blocks.0.attn1/MatMul"]
    assert "blocks.0.attn1.to_q/Add" in report.skipped[0].why


def test_scatter_that_is_no_interleaving_is_left(traced: Graph) -> None:
    graph = traced.copy()
    pipeline.run_passes(graph, ("fold_constants", "linear", "no_ops"), PassContext())
    odd = [n for n in graph.nodes if n.op == "ScatterND"][1]
    odd.inputs[1] = graph.constant("swapped", odd.inputs[1].values[::-1].copy())
    (report,) = pipeline.run_passes(graph, ["scatter"], PassContext())
    assert [s.why for s in report.skipped] == ["the assignments do not fill even and odd indices"]


def test_rms_norm_leaves_a_norm_of_something_else(traced: Graph) -> None:
    graph = traced.copy()
    pipeline.run_passes(graph, ("fold_constants", "linear", "no_ops"), PassContext())
    powers = [n for n in graph.nodes if n.op == "Pow"]
    powers[0].inputs[0] = powers[1].inputs[0]  # k's mean square under q
    (report,) = pipeline.run_passes(graph, ["rms_norm"], PassContext())
    assert report.applied == 7
    assert [s.why for s in report.skipped] == ["√ is not of the mean square of what is scaled"]
