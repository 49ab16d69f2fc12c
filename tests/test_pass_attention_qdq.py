"""attention_qdq on both forms of an attention, against fake quantization in numpy; then through the compiler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from msgspec.structs import replace
from onnx import TensorProto, helper, numpy_helper

from tests import tiny_model
from vdq_export import ort, pipeline
from vdq_export.compiler import export
from vdq_export.contract import PassContext, PassReport
from vdq_export.errors import RecipeError
from vdq_export.graph import Array, Graph
from vdq_export.model import Model
from vdq_export.plan import AttentionOperand, AttentionPlan, Bin, HeadScales, QuantPlan
from vdq_export.recipe import Recipe
from vdq_export.runtime import load
from vdq_export.targets import reference
from vdq_export.verify import verify

BATCH, QUERIES, KEYS, HEADS, WIDTH = 2, 7, 5, 3, 4
BINS = (Bin(index=0, t=(500.0, 1000.0), steps=(750.0,)), Bin(index=1, t=(0.0, 500.0), steps=(250.0,)))
FORMS: dict[str, tuple[str, ...]] = {"matmuls": (), "one node": ("ort_attention",)}
# Float32 sums in another order: 1e-6 of the outputs, which are about 1. A level of int8 here is 1e-2 of q or k.
TOLERANCE = 2e-6


@dataclass(frozen=True)
class Case:
    """Attentions of one module path over q, k, v [B, tokens, H·D]: each with its factors of q, k and v."""

    factors: Sequence[tuple[float, float, float]] = ((0.7, 0.4, 1.0),)

    @property
    def graph(self) -> Graph:
        nodes, params, outputs = [], dict[str, Array](), []
        for i, factors in enumerate(self.factors):
            end = f"_{2 * i}" if i else ""
            for letter, factor, perm in zip("qkv", factors, ((0, 2, 1, 3), (0, 2, 3, 1), (0, 2, 1, 3)), strict=True):
                tokens, name = QUERIES if letter == "q" else KEYS, f"attn/{letter}{i}"
                params[f"{name}.shape"] = np.array([BATCH, tokens, HEADS, WIDTH])
                params[f"{name}.factor"] = np.array([factor], np.float32)
                nodes += [
                    helper.make_node("Reshape", [f"{letter}{i}", f"{name}.shape"], [f"{name}/Heads"]),
                    helper.make_node("Transpose", [f"{name}/Heads"], [f"{name}/Turned"], perm=perm),
                    helper.make_node("Mul", [f"{name}/Turned", f"{name}.factor"], [f"{name}/Scaled"]),
                ]
            params[f"merge{i}"] = np.array([BATCH, QUERIES, HEADS * WIDTH])
            ends = ["Scaled" if factor != 1 else "Turned" for factor in factors]
            q, k, v = (f"attn/{letter}{i}/{kind}" for letter, kind in zip("qkv", ends, strict=True))
            nodes += [
                helper.make_node("MatMul", [q, k], [f"attn/MatMul{end}"]),
                helper.make_node("Softmax", [f"attn/MatMul{end}"], [f"attn/Softmax{end}"], axis=-1),
                helper.make_node("MatMul", [f"attn/Softmax{end}", v], [f"attn/MatMul_{2 * i + 1}"]),
                helper.make_node("Transpose", [f"attn/MatMul_{2 * i + 1}"], [f"attn/Back{i}"], perm=[0, 2, 1, 3]),
                helper.make_node("Reshape", [f"attn/Back{i}", f"merge{i}"], [f"out{i}"]),
            ]
            outputs.append(helper.make_tensor_value_info(f"out{i}", TensorProto.FLOAT, [BATCH, QUERIES, HEADS * WIDTH]))
        for node in nodes:
            node.name = node.output[0]
        inputs = [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, array.shape) for name, array in self.feeds.items()
        ]
        constants = [numpy_helper.from_array(a, n) for n, a in params.items() if any(n in x.input for x in nodes)]
        made = helper.make_graph(nodes, "g", inputs, outputs, constants)
        domains = [helper.make_opsetid("", 21)]
        found = Graph.from_proto(
            onnx.shape_inference.infer_shapes(helper.make_model(made, opset_imports=domains, ir_version=10))
        )
        found.cleanup()
        return found

    @property
    def feeds(self) -> dict[str, Array]:
        rng = np.random.default_rng(0)
        shapes = {"q": QUERIES, "k": KEYS, "v": KEYS}
        return {
            f"{letter}{i}": (rng.normal(size=(BATCH, tokens, HEADS * WIDTH)) * (1 + i)).astype(np.float32)
            for i in range(len(self.factors))
            for letter, tokens in shapes.items()
        }

    def operand(self, letter: str, i: int, place: int = 0) -> Array:
        """[B, H, tokens, D] of what the product reads, before quantization."""
        value = self.feeds[f"{letter}{i}"]
        return value.reshape(BATCH, -1, HEADS, WIDTH).transpose(0, 2, 1, 3) * np.float32(
            self.factors[i]["qkv".index(letter)]
        )

    def scales(self, letter: str, i: int, place: int) -> Array:
        """Scales that clip a little, unlike ones for every head, operand, attention and bin."""
        most = np.abs(self.operand(letter, i)).max(axis=(0, 2, 3))
        spread = np.array([0.8, 1.0, 1.3]) * (1 + 0.2 * place) / (448 if letter == "v" else 127)
        return np.asarray(most * spread, np.float32)

    def planned(self, i: int, letters: str) -> AttentionPlan:
        end = f"_{2 * i}" if i else ""
        made: dict[str, Any] = {}
        for letter in letters:
            made[letter] = AttentionOperand(
                value=f"attn/{letter}{i}/Scaled", dtype="float8e4m3fn" if letter == "v" else "int8", channels=WIDTH,
                factor=self.factors[i]["qkv".index(letter)],
                bins=tuple(HeadScales(scale=tuple(self.scales(letter, i, p).tolist()), why="test") for p in (0, 1)),
            )  # fmt: skip
        return AttentionPlan(name=f"attn/MatMul{end}", product=f"attn/MatMul_{2 * i + 1}", heads=HEADS, **made)

    def plan(self, letters: str = "qk") -> QuantPlan:
        attentions = tuple(self.planned(i, letters) for i in range(len(self.factors)))
        return plan_of(*attentions)

    def expected(self, i: int, letters: str, place: int) -> Array:
        """Softmax(q̂·k̂)·v̂ in float64 from the definition of the plan's quantizers."""
        made = []
        for letter in "qkv":
            x = self.operand(letter, i)
            if letter in letters:
                s = self.scales(letter, i, place)[:, None, None]
                scaled = x / s
                codes = np.clip(scaled, -448, 448).astype(ml_dtypes.float8_e4m3fn) if letter == "v" else scaled
                codes = codes.astype(np.float32) if letter == "v" else np.clip(np.rint(scaled), -128, 127)
                x = codes * s
            made.append(x.astype(np.float64))
        q, k, v = made
        weights = np.exp(q @ k.transpose(0, 1, 3, 2))
        mixed = weights / weights.sum(axis=-1, keepdims=True) @ v
        return np.asarray(mixed.transpose(0, 2, 1, 3).reshape(BATCH, QUERIES, -1))


def plan_of(*attentions: AttentionPlan) -> QuantPlan:
    return QuantPlan(
        model="test", graph_hash="", target="test", recipe=Recipe(name="test", summary="test"), bins=BINS, layers=(),
        bins_why="", attentions=attentions,
    )  # fmt: skip


def quantized(
    case: Case, form: str, plan: QuantPlan, place: int = 0, graph: Graph | None = None
) -> tuple[Graph, PassReport]:
    made = case.graph if graph is None else graph
    reports = pipeline.run_passes(made, (*FORMS[form], "attention_qdq"), PassContext(plan, BINS[place]))
    return made, reports[-1]


def worst(graph: Graph, case: Case, letters: str, place: int = 0) -> float:
    """Against the definition, at the session options of the target and at onnxruntime's own defaults."""
    differences = []
    defaults: dict[str, str] = {}
    for options in (reference.session_options(reference.spec()), defaults):
        names = [f"out{i}" for i in range(len(case.factors))]
        found = ort.session(graph, options=options, threads=1).run(names, case.feeds)
        differences += [np.abs(y - case.expected(i, letters, place)).max() for i, y in enumerate(found)]
    return float(max(differences))


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("letters", ["qk", "v", "qkv"])
@pytest.mark.parametrize("form", FORMS)
def test_is_the_plans_formula(form: str, letters: str, place: int) -> None:
    case = Case()
    graph, report = quantized(case, form, case.plan(letters), place)
    assert (report.applied, report.skipped) == (1, [])
    assert any(node.op == "MultiHeadAttention" for node in graph.nodes) == (form == "one node")
    assert sum(node.op == "QuantizeLinear" for node in graph.nodes) == len(letters)
    assert worst(graph, case, letters, place) < TOLERANCE
    assert worst(graph, case, letters, 1 - place) > 100 * TOLERANCE, "the other bin's scales are seen"


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("letter", ["q", "k", "v"])
def test_a_wrong_scale_of_one_head_is_seen(form: str, letter: str) -> None:
    """By the comparison above: 2 % on the scale of the last head of one operand."""
    case = Case()
    one = case.planned(0, "qkv")
    planned = one.operands[letter]
    scales = [replace(b, scale=(*b.scale[:-1], b.scale[-1] * 1.02)) for b in planned.bins]
    spoilt: Any = {letter: replace(planned, bins=tuple(scales))}
    graph, _ = quantized(case, form, plan_of(replace(one, **spoilt)))
    assert worst(graph, case, "qkv") > 100 * TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_attentions_of_one_module_are_told_apart(form: str) -> None:
    """Text and image keys of one cross-attention: two attentions under one path, the second with larger operands."""
    case = Case(factors=((0.7, 0.4, 1.0), (0.5, 0.3, 1.0)))
    graph, report = quantized(case, form, case.plan("qkv"))
    assert (report.applied, report.skipped) == (2, [])
    assert worst(graph, case, "qkv") < TOLERANCE
    both = case.plan("qkv").attentions
    swapped = plan_of(*(replace(a, q=b.q, k=b.k, v=b.v) for a, b in zip(both, both[::-1], strict=True)))
    graph, report = quantized(case, "matmuls", swapped)
    assert worst(graph, case, "qkv") > 100 * TOLERANCE
    graph, report = quantized(case, "one node", swapped)
    assert [skip.why for skip in report.skipped if "multiplies its scores by" in skip.why] == [
        "attn/Attention multiplies its scores by 0.28, the plan by 0.15",
        "attn/Attention_2 multiplies its scores by 0.15, the plan by 0.28",
    ]


@pytest.mark.parametrize("form", FORMS)
def test_idempotent_and_deterministic(form: str) -> None:
    case = Case()
    graph, _ = quantized(case, form, case.plan("qkv"))
    again, _ = quantized(case, form, case.plan("qkv"))
    once = graph.hash()
    assert once == again.hash()
    (report,) = pipeline.run_passes(graph, ("attention_qdq",), PassContext(case.plan("qkv"), BINS[0]))
    assert (report.applied, report.skipped) == (0, [])
    assert graph.hash() == once


@pytest.mark.parametrize("form", FORMS)
def test_bins_differ_in_vectors_only(form: str) -> None:
    case = Case()
    first, second = (quantized(case, form, case.plan("qkv"), place)[0] for place in (0, 1))
    assert [(n.name, n.op, n.attrs) for n in first.nodes] == [(n.name, n.op, n.attrs) for n in second.nodes]
    theirs = {c.name: np.asarray(c.values) for c in second.constants()}
    unlike = {c.name for c in first.constants() if not np.array_equal(theirs[c.name], np.asarray(c.values))}
    assert len(unlike) == 3 and all(name.endswith(".scale") and theirs[name].ndim == 1 for name in unlike)


def test_skips_say_why() -> None:
    case = Case()
    one = case.planned(0, "qk")
    assert one.q is not None
    wide = replace(one, q=replace(one.q, channels=5))
    for form, plan, reason in (
        ("one node", replace(one, name="other/MatMul"), "no such attention"),
        ("matmuls", replace(one, product="other/MatMul_1"), "no such attention"),
        ("one node", wide, "not of 3 heads of 5 channels"),
        ("one node", replace(one, q=replace(one.q, factor=0.1)), "multiplies its scores by 0.28, the plan by 0.04"),
    ):
        graph, report = quantized(case, form, plan_of(plan))
        assert report.applied == 0 and not any(node.op == "QuantizeLinear" for node in graph.nodes)
        assert [skip.where for skip in report.skipped] == [plan.name]
        assert reason in report.skipped[0].why
    kept = AttentionPlan(name="attn/MatMul", product="attn/MatMul_1", heads=0, keep_float="three axes")
    _, report = quantized(case, "matmuls", plan_of(kept))
    assert (report.applied, report.skipped, report.details) == (0, [], ["attn/MatMul: float, three axes"])


def test_scaled_values_stay_out_of_the_one_node() -> None:
    """Its `scale` multiplies scores: a factor of v has no place in it."""
    case = Case(factors=((0.7, 0.4, 0.5),))
    graph = case.graph
    (report,) = pipeline.run_passes(graph, ("ort_attention",), PassContext())
    assert report.applied == 0 and "is scaled" in report.skipped[0].why
    found, report = quantized(case, "one node", case.plan("qkv"))
    assert report.applied == 1 and worst(found, case, "qkv") < TOLERANCE


# -- through the compiler --------------------------------------------------------------------------------------------


def output_db(path: Path, exact: Any) -> float:
    signal = noise = 0.0
    with load(path, threads=1) as transformer:
        for step in tiny_model.trajectory(3):
            with transformer.cache_context(step["branch"]):
                found = transformer(**step["inputs"]).sample
            wanted = exact(**step["inputs"])
            signal, noise = signal + float(wanted.square().sum()), noise + float((wanted - found).square().sum())
    return 10 * float(np.log10(signal / noise))


def made(name: str, tiny: Model, traced: Graph, folder: Path, **choices: Any) -> Mapping[str, Any]:
    settings = {"target": "reference", "traced": {"": traced.copy()}, "workers": 1, "tsw": 2, "strict": True, **choices}
    bundle = export(tiny, recipe=name, out=folder / name, **settings)
    ops = [node.op for node in Graph.load(bundle.graph_path(0)).nodes]
    return {"db": output_db(bundle.path, tiny), "pairs": ops.count("QuantizeLinear"), "bundle": bundle}


def test_recipes_end_to_end(tiny: Model, traced: Graph, tmp_path: Path) -> None:
    record = tmp_path / "record.safetensors"
    plain = made("static-asq", tiny, traced, tmp_path, save_calibration=record)
    scores = made("static-asq-attention", tiny, traced, tmp_path, calibration=record)
    both = made("static-asq-attention-fp8", tiny, traced, tmp_path, calibration=record)
    assert scores["pairs"] - plain["pairs"] == 8, "q and k of four attentions"
    assert both["pairs"] - scores["pairs"] == 4
    # Int8 attention adds less noise than the linears have; FP8 values have 3 bits of mantissa, 31 dB of their own.
    assert plain["db"] - 1.5 < scores["db"] < plain["db"] + 1.5
    assert plain["db"] - 6 < both["db"]
    assert verify(both["bundle"], tiny, clips=0).verdict == "pass"


def test_targets_without_such_a_kernel_refuse(tiny: Model, traced: Graph, tmp_path: Path) -> None:
    for target in ("ort-int8", "openvino", "qnn", "tensorrt"):
        with pytest.raises(RecipeError, match=r"int8 scores of attentions, which .* has no kernel for"):
            made("static-asq-attention", tiny, traced, tmp_path, target=target)
