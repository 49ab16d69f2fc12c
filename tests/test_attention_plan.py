"""Scales of attention operands: what the record keeps, what the plan makes of it, against values of the float graph."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec.structs import replace

from tests import calib_cases as cases
from tests.planning import solved
from vdq_export import ort, pipeline
from vdq_export import recipe as recipes
from vdq_export.calib import attention as planning
from vdq_export.calib.attention import plan_attentions
from vdq_export.calib.blocks import observe_blocks
from vdq_export.calib.draft import Network, draft
from vdq_export.calib.observe import observe, step_feeds
from vdq_export.calib.record import CalibrationRecord, Slot
from vdq_export.contract import PassContext
from vdq_export.errors import CalibrationError, PlanError, RecipeError
from vdq_export.graph import Array, Graph
from vdq_export.graphs import attention
from vdq_export.hoisting import split as hoisting
from vdq_export.model import Model
from vdq_export.plan import AttentionOperand, AttentionPlan, Bin, HeadScales, QuantPlan
from vdq_export.recipe import AttentionRecipe, Recipe, RotationRecipe
from vdq_export.targets import reference
from vdq_export.work.store import WorkStore

SPEC = reference.spec()
BOTH = AttentionRecipe(scores="int8", values="fp8")
NAMES = [f"blocks.{block}.attn{kind}/MatMul" for block in (0, 1) for kind in (1, 2)]
LETTERS = {"q": 127, "k": 127, "v": 448}
# Runs of one float graph in two sessions: float32 rounding of single operations.
SAME = 1e-5


@pytest.fixture(scope="module")
def canonical(traced: Graph) -> Graph:
    graph = traced.copy()
    pipeline.run_passes(graph, pipeline.CANONICAL, PassContext(spec=SPEC))
    return graph


@pytest.fixture(scope="module")
def record(canonical: Graph, tiny: Model) -> CalibrationRecord:
    return observe(canonical, tiny, threads=1)


def magnitudes(graph: Graph, model: Model) -> dict[tuple[str, str], dict[Slot, Array]]:
    """{(attention, letter): {slot: largest magnitudes [H]}} of the operands in `graph` over the trajectories."""
    found: dict[tuple[str, str], dict[Slot, Array]] = {}
    values = {(one.name, x): getattr(one, x).name for one in attention.find(graph) for x in LETTERS}
    names = sorted(set(values.values()))
    session = ort.session(graph, outputs=names, threads=1, exact=True)
    types = {one.name: one.type for one in session.get_inputs()}
    for step in (s for trajectory in model.iter_trajectories() for s in trajectory):
        slot = Slot(float(step["t"]), step["branch"])
        seen = dict(zip(names, session.run(names, step_feeds(step, types, slot)), strict=True))
        for key, name in values.items():
            most = np.abs(seen[name]).max(axis=(0, 2, 3))
            slots = found.setdefault(key, {})
            slots[slot] = np.maximum(slots.get(slot, most), most)
    return found


def planned(canonical: Graph, record: CalibrationRecord, recipe: Recipe, tsw: int = 2) -> tuple[Graph, QuantPlan]:
    """(float graph, plan) of a recipe whose attentions are quantized in full."""
    [(floated, one)] = solved(canonical, record, replace(recipe, attention=BOTH), SPEC, tsw=tsw)
    return floated, plan_attentions(one.plan, floated, record)


def shortfall(plan: QuantPlan, truth: dict[tuple[str, str], dict[Slot, Array]], letter: str) -> tuple[float, float]:
    """(least, largest) of what the scales cover over what the graph has, over attentions, bins and heads."""
    ratios = []
    for one in plan.attentions:
        for part, chosen in zip(plan.bins, one.operands[letter].bins, strict=True):
            seen = [most for slot, most in truth[one.name, letter].items() if slot.t in part.steps]
            ratios.append(np.asarray(chosen.scale) * LETTERS[letter] / np.max(seen, axis=0))
    return float(np.min(ratios)), float(np.max(ratios))


# -- the record ------------------------------------------------------------------------------------------------------


def test_record_has_the_magnitudes_of_every_head(canonical: Graph, record: CalibrationRecord, tiny: Model) -> None:
    truth = magnitudes(canonical, tiny)
    assert [one.name for one in attention.find(canonical)] == NAMES
    for one in attention.find(canonical):
        for letter, channels in (("q", 1), ("k", 1), ("v", 12)):
            heads = record.value(getattr(one, letter).name).heads
            assert heads is not None and heads.shape == (len(record.slots), 3, channels)
            expected = np.stack([truth[one.name, letter][slot] for slot in record.slots])
            np.testing.assert_allclose(heads.max(axis=2), expected, rtol=SAME)
            assert np.unique(heads.max(axis=2)).size > 3 * len(record.slots) / 2, "heads and timesteps differ"
        softmax = record.value(one.softmax.outputs[0].name)
        assert softmax.kind == "attention" and softmax.heads is None


def test_calibration_by_segments_keeps_the_same(canonical: Graph, tiny: Model, tmp_path: Path) -> None:
    with WorkStore(tmp_path / "work") as store:
        found = observe_blocks(canonical, tiny, store, budget=20_000, threads=1)
        observe(canonical, tiny, threads=1).save(tmp_path / "whole")
        found.save(tmp_path / "segments")
    assert (tmp_path / "whole").read_bytes() == (tmp_path / "segments").read_bytes()
    assert sum(value.heads is not None for value in found.values.values()) == 12


def test_saved_loaded_and_checked(record: CalibrationRecord, tmp_path: Path) -> None:
    path = tmp_path / "record"
    record.save(path)
    again = CalibrationRecord.load(path, record.graph_hash)
    for name, value in record.values.items():
        heads = again.value(name).heads
        assert (heads is None) == (value.heads is None)
        assert value.heads is None or np.array_equal(value.heads, heads if heads is not None else 0)
    name = next(n for n, v in record.values.items() if v.heads is not None)
    value = record.value(name)
    assert value.heads is not None
    for spoilt, message in ((value.heads[:3], "heads do not fit"), (value.heads * np.inf, "NaN or Inf")):
        changed = type(value)(**{**vars_of(value), "heads": spoilt})
        type(record)(**{**vars_of(record), "values": {**record.values, name: changed}}).save(path)
        with pytest.raises(CalibrationError, match=message):
            CalibrationRecord.load(path).value(name)


def vars_of(item: Any) -> dict[str, Any]:
    return {name: getattr(item, name) for name in type(item).__dataclass_fields__}


def older(record: CalibrationRecord, path: Path) -> CalibrationRecord:
    """The record as a file of format 3, which knew nothing of heads."""
    values = {n: type(v)(**{**vars_of(v), "heads": None}) for n, v in record.values.items()}
    type(record)(**{**vars_of(record), "values": values}).save(path)
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    inner = json.loads(header["__metadata__"]["vdq-calibration"])
    assert inner["format"] == 4 and not any("heads" in entry for entry in inner["values"])
    header["__metadata__"]["vdq-calibration"] = json.dumps({**inner, "format": 3}, sort_keys=True)
    text = json.dumps(header, separators=(",", ":")).encode()
    path.write_bytes(struct.pack("<Q", length) + text.ljust(length) + data[8 + length :])
    return CalibrationRecord.load(path)


def test_older_files_serve_recipes_with_float_attention_only(
    canonical: Graph, record: CalibrationRecord, tmp_path: Path
) -> None:
    old = older(record, tmp_path / "old")
    recipe = recipes.load("static-minmax")
    [(floated, one)] = solved(canonical, old, recipe, SPEC)
    assert plan_attentions(one.plan, floated, old).attentions == ()
    asks = replace(one.plan, recipe=replace(recipe, attention=BOTH))
    with pytest.raises(CalibrationError, match=r"nothing about heads.*earlier version"):
        plan_attentions(asks, floated, old)


# -- the plan --------------------------------------------------------------------------------------------------------


def test_scales_are_those_of_the_bins_own_timesteps(canonical: Graph, record: CalibrationRecord, tiny: Model) -> None:
    floated, plan = planned(canonical, record, recipes.load("static-minmax"), tsw=3)
    truth = magnitudes(floated, tiny)
    assert [one.name for one in plan.attentions] == NAMES
    for letter in LETTERS:
        low, high = shortfall(plan, truth, letter)
        assert low > 1 - SAME and high < 1 + SAME
    rotated = replace(plan, bins=plan.bins[::-1])  # the comparison sees scales of other bins
    assert shortfall(rotated, truth, "q")[0] < 0.99
    for one in plan.attentions:
        assert all(scales.why for operand in one.operands.values() for scales in operand.bins)
        assert one.q is not None and one.q.factor == pytest.approx(12**-0.25, rel=1e-6)
        assert (one.heads, one.q.channels, one.scores_why, one.values_why) == (3, 12, "", "")
    assert QuantPlan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize("name", ["static-asq", "smoothquant"])
def test_values_carry_the_smoothing_behind_them(
    name: str, canonical: Graph, record: CalibrationRecord, tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """to_out's ÷ s is folded into to_v: scales from the record alone would be wrong by up to s."""
    floated, plan = planned(canonical, record, recipes.load(name))
    assert all(x.smoothing is not None for x in plan.layers if x.name.endswith("to_out.0"))
    truth = magnitudes(floated, tiny)
    for letter in LETTERS:
        low, high = shortfall(plan, truth, letter)
        assert low > 1 - SAME and high < 1 + SAME
    monkeypatch.setattr(planning, "_folded", lambda layer, marks: planning.Transform())
    low, high = shortfall(plan_attentions(plan, floated, record), truth, "v")
    assert low < 0.9 or high > 1.1, "without it the test above has nothing to find"


@pytest.mark.parametrize(("scale", "most"), [("none", 12**0.5), ("channel", 12)])
def test_values_carry_the_rotation_behind_them(
    scale: Any, most: float, canonical: Graph, record: CalibrationRecord, tiny: Model
) -> None:
    """A bound: all channels of a block at their largest, with the signs of one column of the matrix: √12 at most, and
    as much again where channels are divided by unlike scales. E4M3 has normal numbers over a factor of 28000."""
    turned = RotationRecipe(kind="hadamard", scale=scale, search=False)
    floated, plan = planned(canonical, record, replace(recipes.load("static-asq"), rotation=turned))
    fused = [x for x in plan.layers if x.name.endswith("to_out.0") and x.rotation is not None]
    assert len(fused) == 4 and {x.rotation.block for x in fused if x.rotation} == {12}
    truth = magnitudes(floated, tiny)
    low, high = shortfall(plan, truth, "v")
    assert low > 1 - SAME and high < most
    for letter in "qk":
        low, high = shortfall(plan, truth, letter)
        assert low > 1 - SAME and high < 1 + SAME


def test_what_stands_behind_the_values_decides(canonical: Graph, record: CalibrationRecord) -> None:
    """Nodes that a smoothing or a rotation put in front of the linear: then the values carry none of that."""
    recipe = replace(
        recipes.load("static-asq"), rotation=RotationRecipe(kind="hadamard", scale="channel", search=False)
    )
    _, plan = planned(canonical, record, recipe)
    layer = next(x for x in plan.layers if x.name == "blocks.0.attn1.to_out.0")
    assert layer.smoothing and layer.rotation and layer.rotation.scale
    plain = replace(layer, rotation=None)
    for one, marks, smooths, turns, scales in (
        (layer, "", True, True, True), (layer, "S", True, True, False), (layer, "R", True, False, False),
        (layer, "RS", True, False, False), (layer, "SR", False, False, False), (plain, "", True, False, False),
        (plain, "S", False, False, False),
    ):  # fmt: skip
        found = planning._folded(one, marks)
        carried = (found.smoothing is not None, found.rotation is not None, found.after is not None)
        assert carried == (smooths, turns, scales), marks


def test_an_explicit_rotation_is_seen(canonical: Graph, record: CalibrationRecord) -> None:
    """One over blocks that are no parts of heads, planted by hand."""
    floated, _ = planned(canonical, record, recipes.load("static-asq"))
    product = next(n for n in floated.nodes if n.name == "blocks.0.attn1.to_out.0/MatMul")
    identity = floated.constant("planted.hadamard", np.eye(36, dtype=np.float32)[None])
    product.inputs[0] = floated.add_node(
        "MatMul", [product.inputs[0], identity], "planted/Rotate", dtype=np.float32, shape=product.inputs[0].shape
    )
    one = next(attention.find(floated))
    assert planning._linears_behind(one) == [("blocks.0.attn1.to_out.0", "R", True)]


def test_operands_without_heads_stay_float_and_say_why() -> None:
    graph = cases.graph()
    record = observe(graph, cases.model())
    recipe = replace(recipes.load("static-minmax"), attention=BOTH)
    [(floated, one)] = solved(graph, record, recipe, SPEC)
    (found,) = plan_attentions(one.plan, floated, record).attentions
    assert (found.name, found.operands) == ("attn/MatMul", {})
    assert found.keep_float.startswith("operands are not [batch, heads, …, …] each: [1, 7, 6], [1, 6, 7], [1, 7, 6]")


def test_values_that_something_unknown_changes_stay_float(canonical: Graph, record: CalibrationRecord) -> None:
    """A gate between attention and a smoothed linear: the factor may have gone to either."""
    floated, plan = planned(canonical, record, recipes.load("static-asq"))
    product = next(n for n in floated.nodes if n.name == "blocks.0.attn1.to_out.0/MatMul")
    value = product.inputs[0]
    product.inputs[0] = floated.add_node("Mul", [value, value], "gate/Mul", dtype=np.float32, shape=value.shape)
    first, *others = plan_attentions(plan, floated, record).attentions
    assert first.v is None and "to_out.0 is smoothed or rotated" in first.values_why
    assert first.q is not None and not first.keep_float
    assert all(one.v is not None for one in others)


def test_keys_that_come_scaled_into_the_body(canonical: Graph, record: CalibrationRecord, tiny: Model) -> None:
    """Hoisted, keys of the prompt have their constant factor before the body: the one node does not take it then."""
    floated, plan = planned(canonical, record, recipes.load("static-asq"))
    roles = hoisting.roles(tiny.example_inputs, tiny.timestep_input, {"encoder_hidden_states"})
    body = hoisting.split(floated, roles).body
    plan = plan_attentions(plan, body, record)
    factors = {one.name: (one.q.factor, one.k.factor) for one in plan.attentions if one.q and one.k}
    half = pytest.approx(12**-0.25, rel=1e-6)
    assert list(factors) == NAMES and set(factors) == {one.name for one in plan.attentions}
    for name, found in factors.items():
        assert found == ((half, half) if "attn1" in name else (half, 1.0))
    context = PassContext(plan, plan.bins[0], SPEC)
    *_, report = pipeline.run_passes(body.copy(), ("ort_rotary", "ort_attention", "attention_qdq"), context)
    assert (report.applied, report.skipped) == (4, [])
    whole = plan_attentions(plan, floated, record)  # of another graph: seen, not carried out wrongly
    context = PassContext(whole, plan.bins[0], SPEC)
    *_, report = pipeline.run_passes(body.copy(), ("ort_rotary", "ort_attention", "attention_qdq"), context)
    assert report.applied == 2 and all("multiplies its scores by" in skip.why for skip in report.skipped)


def test_only_what_the_recipe_asks_for(canonical: Graph, record: CalibrationRecord) -> None:
    floated, plan = planned(canonical, record, recipes.load("static-minmax"))

    def letters(**choices: Any) -> set[str]:
        wanted = replace(plan.recipe, attention=AttentionRecipe(**choices))
        found = plan_attentions(replace(plan, attentions=(), recipe=wanted), floated, record).attentions
        return {"".join(one.operands) for one in found}

    assert letters() == set()
    assert letters(scores="int8") == {"qk"}
    assert letters(values="fp8") == {"v"}
    assert letters(scores="int8", values="fp8") == {"qkv"}


def test_recipes_ask_and_targets_refuse(canonical: Graph, record: CalibrationRecord, tiny: Model) -> None:
    wanted = {name: recipes.load(name).attention.kinds for name in recipes.names()}
    assert {name: kinds for name, kinds in wanted.items() if kinds} == {
        "static-asq-attention": ("int8 scores",), "static-asq-attention-fp8": ("int8 scores", "fp8 values"),
    }  # fmt: skip
    assert "attention scales" in recipes.load("static-asq-attention").data_uses
    free = replace(recipes.load("w8a16"), attention=BOTH)
    with pytest.raises(CalibrationError, match="needs calibration data: attention scales"):
        draft(Network(canonical, CalibrationRecord.empty(canonical, tiny), free, SPEC))
    half = replace(SPEC, attention=("int8 scores",))
    with pytest.raises(
        RecipeError, match="asks for fp8 values of attentions, which reference has no kernel for"
    ) as one:
        draft(Network(canonical, record, recipes.load("static-asq-attention-fp8"), half))
    assert "it offers: int8 scores" in str(one.value.hint)


# -- faults ----------------------------------------------------------------------------------------------------------


def operand(dtype: Any = "int8", heads: int = 2, bins: int = 1, **choices: Any) -> AttentionOperand:
    scales = tuple(HeadScales(scale=(0.5,) * heads, why="test") for _ in range(bins))
    return AttentionOperand(value="x", dtype=dtype, channels=4, bins=scales, **choices)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({}, "a reason to keep it in float, or operands"),
        ({"q": operand(), "k": operand(), "keep_float": "why"}, "and not both"),
        ({"q": operand()}, "q and k are quantized together"),
        ({"q": operand(), "k": operand(heads=3)}, "k needs 2 scales, one a head, for each of 1 bins"),
        ({"q": operand(bins=2), "k": operand()}, "q needs 2 scales"),
        ({"v": operand()}, "v is int8"),
        ({"q": operand("float8e4m3fn"), "k": operand()}, "q is float8e4m3fn"),
        ({"q": operand(), "k": operand(factor=0.0)}, "k is int8 behind a factor of 0"),
    ],
)
def test_plans_that_cannot_be(parts: dict[str, Any], message: str) -> None:
    def plan(*attentions: AttentionPlan) -> QuantPlan:
        bins = (Bin(index=0, t=(0.0, 1000.0), steps=(500.0,)),)
        return QuantPlan(
            model="m", graph_hash="", target="t", recipe=Recipe(name="r", summary=""), bins=bins, layers=(),
            bins_why="", attentions=attentions,
        )  # fmt: skip

    sound = AttentionPlan(name="a", product="b", heads=2, q=operand(), k=operand(), v=operand("float8e4m3fn"))
    plan(sound)
    with pytest.raises(PlanError, match="names an attention twice"):
        plan(sound, sound)
    with pytest.raises(PlanError, match=message):
        plan(AttentionPlan(name="a", product="b", heads=2, **parts))


def test_torch_s_guard_of_masked_rows_is_seen_through(canonical: Graph) -> None:
    """Where(IsNaN(p), 0, p) between softmax and values; anything else there hides the attention."""
    for filler, expected in ((0.0, NAMES), (0.5, NAMES[1:])):
        graph = canonical.copy()
        for one in list(attention.find(graph))[: 1 if filler else None]:
            weights, name = one.softmax.outputs[0], one.name
            shape: Any = weights.shape
            nothing = graph.constant(graph.fresh(f"{name}/filler"), np.array(filler, np.float32))
            lost = graph.add_node("IsNaN", [weights], graph.fresh(f"{name}/IsNaN"), dtype=np.bool_, shape=shape)
            kept = graph.add_node(
                "Where", [lost, nothing, weights], graph.fresh(f"{name}/Where"), dtype=np.float32, shape=shape
            )
            one.product.inputs[0] = kept
        assert [one.name for one in attention.find(graph)] == expected


def test_names_of_the_one_node() -> None:
    assert attention.fused_name("blocks.0.attn1/MatMul") == "blocks.0.attn1/Attention"
    assert attention.fused_name("blocks.0.attn2/MatMul_2") == "blocks.0.attn2/Attention_2"
    assert attention.fused_name("MatMul_4") == "Attention_4"
    assert attention.fused_name("scores") == "scores/Attention"
