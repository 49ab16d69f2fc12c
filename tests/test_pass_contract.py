"""What every pass promises, checked for each file in passes/ without naming any: a new pass is covered by existing.

The graph is a traced two-block Wan transformer with odd sizes; each pass sees it as the passes before it left it.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.calib_cases import SPEC
from tests.planning import plan_of
from vdq_export import ort, passes, pipeline, recipe, targets
from vdq_export.calib.observe import observe
from vdq_export.contract import PassContext, PassReport
from vdq_export.errors import PassError
from vdq_export.graph import Array, Graph
from vdq_export.model import Model
from vdq_export.plan import QuantPlan

FOLDER = Path(passes.__path__[0])
FILES = sorted(p.stem for p in FOLDER.glob("*.py") if not p.stem.startswith("_"))
STANDARD = (*pipeline.CANONICAL, *pipeline.FLOAT, *pipeline.SHARED, *pipeline.PER_BIN)
OWN = {name: tuple(module.PASSES) for name, module in targets.catalogue().items()}
FORMS = {name: targets.forms(name) for name in OWN}
# Exact in real numbers, so what differs is float32 rounding: about 1e-6 of the largest output at these widths.
FLOAT_TOLERANCE = 1e-5
FLOAT_PASSES = [n for n in FILES if n in (*pipeline.CANONICAL, *pipeline.FLOAT, *sum(FORMS.values(), ()))]
ELSEWHERE = {"single_precision", "rotary_pairs"}  # forms that Wan has not: test_pass_rotary_pairs.py
FIRES = {*pipeline.CANONICAL, "smoothing", "rotation", "quantize_weights", "qdq"} - ELSEWHERE


@pytest.fixture(scope="session")
def canonical(traced: Graph) -> Graph:
    graph = traced.copy()
    pipeline.run_passes(graph, pipeline.CANONICAL, PassContext(spec=SPEC))
    return graph


@pytest.fixture(scope="session")
def plan(canonical: Graph, tiny: Model) -> QuantPlan:
    """Of a recipe that gives every standard pass something to do."""
    method = msgspec.structs.replace(recipe.load("static-asq"), rotation=recipe.RotationRecipe(kind="hadamard"))
    return plan_of(canonical, observe(canonical, tiny), method, SPEC, tsw=2)


def order_of(name: str) -> tuple[str, ...]:
    """The list a pass stands in: the standard one, or that of the target that uses it."""
    if name in STANDARD:
        return STANDARD
    for target, forms in FORMS.items():
        if name in forms:
            return (*pipeline.canonical(target), *STANDARD[len(pipeline.CANONICAL) :])
    return next((*STANDARD, *own) for own in OWN.values() if name in own)


def before(name: str, traced: Graph, context: PassContext) -> Graph:
    graph = traced.copy()
    order = order_of(name)
    pipeline.run_passes(graph, order[: order.index(name)], context)
    return graph


def largest_difference(graph: Graph, reference: Graph, feeds: Mapping[str, Array]) -> float:
    """max|graph − reference| / max|reference| over the outputs."""
    expected, actual = ort.run(reference, dict(feeds)), ort.run(graph, dict(feeds))
    assert expected.keys() == actual.keys()
    return max(float(np.abs(actual[n] - e).max() / np.abs(e).max()) for n, e in expected.items())


def unrelated() -> Graph:
    """No linear, no norm, no attention, nothing to fold: a convolution, a pooling and an integer branch."""
    rng = np.random.default_rng(0)
    constants = {"conv.weight": rng.normal(size=(4, 3, 3, 3)).astype(np.float32), "which": np.array([2, 0], np.int64)}
    nodes = [
        helper.make_node("Conv", ["x", "conv.weight"], ["conv/Conv"], name="conv/Conv", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["conv/Conv"], ["act/Relu"], name="act/Relu"),
        helper.make_node("MaxPool", ["act/Relu"], ["pool/MaxPool"], name="pool/MaxPool", kernel_shape=[2, 2]),
        helper.make_node("Gather", ["pool/MaxPool", "which"], ["y"], name="Gather", axis=1),
        helper.make_node("Shape", ["x"], ["size"], name="Shape"),
    ]
    ends = [("y", TensorProto.FLOAT, [1, 2, 6, 6]), ("size", TensorProto.INT64, [4])]
    graph = helper.make_graph(
        nodes,
        "unrelated",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 7, 7])],
        [helper.make_tensor_value_info(*end) for end in ends],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(proto)
    made = Graph.from_proto(onnx.shape_inference.infer_shapes(proto))
    made.cleanup()
    return made


# -- the file --------------------------------------------------------------------------------------------------------


def test_passes_are_found() -> None:
    assert len(FILES) >= 9


@pytest.mark.parametrize("name", FILES)
def test_file_declares_itself(name: str) -> None:
    module = pipeline.load_pass(name)
    assert name == module.NAME
    assert isinstance(module.AFTER, tuple)
    assert set(module.AFTER) <= set(FILES) - {name}
    signature = inspect.signature(module.run, eval_str=True)
    assert [p.annotation for p in signature.parameters.values()] == [Graph, PassContext]
    assert list(signature.parameters) == ["graph", "context"]
    assert signature.return_annotation is PassReport


@pytest.mark.parametrize("name", FILES)
def test_docstring_has_the_algebra_and_its_price(name: str) -> None:
    text = pipeline.load_pass(name).__doc__ or ""
    first, _, rest = text.partition("\n")
    assert first.endswith(".")
    assert "->" in rest or "→" in rest or "becomes" in rest, "what it rewrites, before -> after"
    assert any(word in text.lower() for word in ("exact", "cost")), "why it is exact, or what it costs"


@pytest.mark.parametrize("name", FILES)
def test_pass_stands_in_the_order_exactly_once(name: str) -> None:
    listed = Counter(STANDARD)
    everybodys = [*OWN.values(), *FORMS.values()]
    for own in everybodys:
        listed.update(set(own))
        assert max(Counter(own).values(), default=1) == 1
    homes = sum(name in own for own in everybodys)
    assert listed[name] == 1 or (name not in STANDARD and homes >= 1), "one line in pipeline.py or a target"


def test_order_satisfies_every_pass() -> None:
    pipeline.check_order(STANDARD)
    for target, own in OWN.items():
        pipeline.check_order(own, known_before=STANDARD)
        pipeline.check_order(pipeline.canonical(target))


def test_a_wrong_order_is_refused() -> None:
    with pytest.raises(PassError, match="linear must come after fold_constants"):
        pipeline.check_order(("linear", "fold_constants"))
    for name in STANDARD:
        others = tuple(n for n in STANDARD if n not in pipeline.load_pass(name).AFTER)
        if len(others) < len(STANDARD):
            with pytest.raises(PassError, match="must come after"):
                pipeline.check_order(others)


def test_order_is_checked_at_import() -> None:
    """A pass moved in front of what it needs fails when the pipeline is imported, not in the middle of an export."""
    source = Path(pipeline.__file__).read_text(encoding="utf-8")
    moved = source.replace('    "linear",', "", 1).replace("CANONICAL = (", 'CANONICAL = (\n    "linear",', 1)
    assert moved != source
    with pytest.raises(PassError, match="linear must come after fold_constants"):
        exec(compile(moved, "pipeline.py", "exec"), {"__name__": "moved"})


# -- what it does ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_idempotent_deterministic_and_it_fires(name: str, traced: Graph, plan: QuantPlan) -> None:
    context = PassContext(plan, plan.bins[0], SPEC)
    run = pipeline.load_pass(name).run
    graph, again = (before(name, traced, context) for _ in range(2))
    report, second = run(graph, context), run(again, context)
    assert report == second
    assert report.name == name
    assert report.applied > 0 or name not in FIRES, "it does nothing on a Wan transformer"
    assert all(skip.where and skip.why for skip in report.skipped)
    graph.check()
    assert graph.hash() == again.hash()
    once = graph.hash()
    repeated = run(graph, context)
    assert repeated.applied == 0
    assert graph.hash() == once
    onnx.checker.check_model(graph.to_proto(), full_check=name in STANDARD)


@pytest.mark.parametrize("name", FILES)
def test_no_op_on_a_graph_it_does_not_concern(name: str, plan: QuantPlan) -> None:
    for context in (PassContext(), PassContext(replace_layers(plan), plan.bins[0], SPEC)):
        graph = unrelated()
        untouched = graph.to_proto().SerializeToString(deterministic=True)
        report = pipeline.load_pass(name).run(graph, context)
        assert report.applied == 0
        assert graph.to_proto().SerializeToString(deterministic=True) == untouched


def replace_layers(plan: QuantPlan) -> QuantPlan:
    """The plan of a model without layers."""
    return msgspec.structs.replace(plan, layers=())


@pytest.mark.parametrize("name", FLOAT_PASSES)
def test_float_passes_are_exact(name: str, traced: Graph, plan: QuantPlan, tiny_feeds: Mapping[str, Array]) -> None:
    context = PassContext(plan, plan.bins[0], SPEC)
    graph = before(name, traced, context)
    pipeline.run_passes(graph, [name], context)
    assert largest_difference(graph, traced, tiny_feeds) <= FLOAT_TOLERANCE


def test_a_pass_that_is_off_by_a_thousandth_is_caught(canonical: Graph, tiny_feeds: Mapping[str, Array]) -> None:
    """The comparison above has teeth: one weight of one output channel, 0.1 % off, is seen."""
    wrong = canonical.copy()
    weight = next(linear for linear in wrong.linears() if linear.name == "blocks.1.ffn.net.2").weight
    values = np.array(weight.values)
    values[:, 4] *= np.float32(1.001)
    weight.values = values
    assert largest_difference(canonical, canonical, tiny_feeds) == 0.0
    assert largest_difference(wrong, canonical, tiny_feeds) > FLOAT_TOLERANCE


@pytest.mark.parametrize("name", FILES)
def test_bins_share_everything_but_small_constants(name: str, traced: Graph, plan: QuantPlan) -> None:
    """Bins differ in numbers, never in nodes or names: the weights are stored once because of it."""
    graphs = []
    for one in plan.bins[:2]:
        context = replace(PassContext(plan, None, SPEC), bin=one)
        graph = before(name, traced, context)
        pipeline.run_passes(graph, [name], context)
        graphs.append(graph)
    first, second = graphs
    assert [(n.name, n.op) for n in first.nodes] == [(n.name, n.op) for n in second.nodes]
    theirs = {c.name: np.asarray(c.values) for c in second.constants()}
    for constant in first.constants():
        other = theirs[constant.name]
        assert constant.values.dtype == other.dtype
        assert constant.values.ndim < 2 or np.array_equal(constant.values, other), constant.name


def test_names_and_bytes_do_not_depend_on_hash_seeds(traced: Graph, plan: QuantPlan, tmp_path: Path) -> None:
    """Sets of strings iterate differently in every process; nothing of that may reach a graph."""
    traced.save(tmp_path / "traced.onnx")
    (tmp_path / "plan.json").write_bytes(plan.to_json())
    script = (
        "import sys\n"
        "from pathlib import Path\n"
        "from tests.calib_cases import SPEC\n"
        "from vdq_export import pipeline as p\n"
        "from vdq_export.contract import PassContext\n"
        "from vdq_export.graph import Graph\n"
        "from vdq_export.plan import QuantPlan\n"
        "graph, plan = Graph.load(Path(sys.argv[1])), QuantPlan.from_json(Path(sys.argv[2]).read_bytes())\n"
        "p.run_passes(graph, (*p.CANONICAL, *p.FLOAT, *p.SHARED, *p.PER_BIN), PassContext(plan, plan.bins[1], SPEC))\n"
        "print(graph.hash())\n"
    )
    hashes = set()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", script, str(tmp_path / "traced.onnx"), str(tmp_path / "plan.json")],
            cwd=Path(__file__).parents[1],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        hashes.add(done.stdout)
    assert len(hashes) == 1
