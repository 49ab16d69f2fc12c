"""What the report page is made of: ranges over timesteps, growth of the error, costs of graphs, clips as pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper

from tests import tiny_bundle
from vdq_export import recipe as recipes
from vdq_export.bundle_writer import BundleWriter
from vdq_export.calib.record import CalibrationRecord, Slot, ValueRecord
from vdq_export.contract import PassReport
from vdq_export.errors import BundleError
from vdq_export.manifest import PAGE
from vdq_export.model import Step
from vdq_export.plan import Bin, LayerPlan, QuantPlan, Range, Rotation, Smoothing, WeightPlan
from vdq_export.report import costs, ranges
from vdq_export.report.content import gather
from vdq_export.report.data import StepError
from vdq_export.report.growth import Growth, mean
from vdq_export.report.page import render
from vdq_export.report.passes import PassesReport
from vdq_export.report.ranges import RangesReport

SLOTS = (Slot(900.0, "cond"), Slot(900.0, "uncond"), Slot(100.0, "cond"), Slot(100.0, "uncond"))
SCALE = (1.0, 2.0, 4.0, 0.5)


def record() -> CalibrationRecord:
    """One value of 4 channels in 4 slots; 2 sampled rows a slot, the channels' extremes."""
    lo = -np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    hi = 2 * np.arange(1, 17, dtype=np.float32).reshape(4, 4)
    rows = np.stack([lo, hi], axis=1)
    value = ValueRecord("x", "linear", ("a", "b"), lo, hi, np.full(4, 10), np.abs(hi), rows, rows)
    return CalibrationRecord("m", "", "", SLOTS, {"x": value}, calls=4)


def plan(*layers: LayerPlan, branch: str = "any", t: tuple[float, ...] = (900.0, 100.0)) -> QuantPlan:
    bins = tuple(Bin(index=i, t=(one - 50, one + 50), steps=(one,), branch=branch) for i, one in enumerate(t))  # type: ignore[arg-type]
    recipe = recipes.load("static-minmax")
    return QuantPlan(
        model="m", graph_hash="", target="test", recipe=recipe, bins=bins, layers=layers, bins_why="", draft=True
    )


def layer(name: str = "a", smoothing: Smoothing | None = None, rotation: Rotation | None = None) -> LayerPlan:
    weight = WeightPlan(dtype="int8", qmax=127, why="", scale=(1.0,) * 4)
    one = Range(lo=0.0, hi=1.0, scale=1.0, zero_point=0, why="")
    made = {"smoothing": smoothing, "rotation": rotation, "weight": weight, "activation": (one, one)}
    return LayerPlan(name=name, value="x", rows=1, shape=(4, 4), **made)


def test_ranges_are_the_extremes_of_each_slot() -> None:
    found = ranges.measure(record(), plan(layer("a"), layer("b")), "low")
    assert found is not None
    (value,) = found.values
    assert (found.name, value.layers, found.t) == ("low", ("a", "b"), (900.0, 900.0, 100.0, 100.0))
    assert (value.lo, value.hi) == ((-4.0, -8.0, -12.0, -16.0), (8.0, 16.0, 24.0, 32.0))
    assert (value.after_lo, value.after_hi) == ((), ())
    report = RangesReport(networks=(found,))
    assert RangesReport.from_json(report.to_json()) == report


def test_ranges_after_smoothing_are_what_a_quantizer_sees() -> None:
    smoothed = layer(smoothing=Smoothing(alpha=0.5, scale=SCALE, why=""))
    found = ranges.measure(record(), plan(smoothed))
    assert found is not None
    expected = record().values["x"].hi / np.array(SCALE, np.float32)
    assert found.values[0].after_hi == tuple(expected.max(axis=1))
    assert found.values[0].hi == (8.0, 16.0, 24.0, 32.0), "the plain ones stay"
    # A Hadamard matrix of two keeps |x| + |y| over the root of two at most; plain extremes would be wrong there.
    rotated = ranges.measure(record(), plan(layer(rotation=Rotation(block=2, why=""))))
    assert rotated is not None
    assert rotated.values[0].after_hi[0] == pytest.approx((6 + 8) / 2**0.5, rel=1e-4)


def test_ranges_of_a_plan_are_those_of_its_own_steps() -> None:
    found = ranges.measure(record(), plan(layer(), branch="uncond", t=(900.0,)))
    assert found is not None and (found.t, found.branch) == ((900.0,), ("uncond",))
    empty = CalibrationRecord("m", "", "", SLOTS, {}, calls=0)
    assert ranges.measure(empty, plan(layer())) is None
    assert ranges.measure(record(), plan(layer(), t=(7.0,))) is None


def test_passes_keep_their_order_their_words_and_their_places() -> None:
    first, second = PassReport("smoothing"), PassReport("qdq")
    first.did("x: place 3 for a, b")
    first.did("x/y: place 1 for c")
    second.skip("d", "no shape")
    report = PassesReport.of([first, second])
    assert PassesReport.from_json(report.to_json()) == report
    assert [one.name for one in report.passes] == ["smoothing", "qdq"]
    assert report.places("") == {"x": "place 3 for a, b", "x/y": "place 1 for c"} and report.places("low") == {}
    assert report.passes[1].skipped[0].why == "no shape"
    with pytest.raises(BundleError, match=r"passes\.json"):
        PassesReport.from_json(b'{"passes": 3}')


def steps(error: float) -> list[Step]:
    """Three steps of both branches; the latent of step i is i off, the prompt and the mask never change."""
    made: list[Step] = []
    for number, t in enumerate((900.0, 500.0, 100.0)):
        latent = torch.full((4,), 10.0 + number) + error * number
        for branch, prompt in (("cond", 3.0), ("uncond", 4.0)):
            inputs = {"x": latent, "timestep": torch.tensor([t]), "text": torch.full((1000,), prompt)}
            made.append({"t": t, "branch": branch, "inputs": inputs})  # type: ignore[typeddict-item]
    return made


def test_growth_compares_the_latents_that_each_step_is_given() -> None:
    found = Growth("timestep")
    for step in steps(0.0):
        found.reference(step)
    for step in steps(0.11):
        found.quantized(step)
    expected = [20 * np.log10(11 / 0.11), 20 * np.log10(12 / 0.22)]  # a prompt that counted would add 80 dB's worth
    assert [one.t for one in found.steps] == [500.0, 100.0], "both start from the same noise"
    assert [one.sqnr_db for one in found.steps] == pytest.approx(expected, abs=1e-3)
    other = [StepError(t=500.0, sqnr_db=30.0)]
    assert mean([found.steps, other])[0].sqnr_db == pytest.approx((expected[0] + 30.0) / 2, abs=1e-3)
    assert mean([]) == ()


def test_growth_of_latents_that_are_no_numbers_is_finite() -> None:
    found = Growth("timestep")
    for step in steps(0.0):
        found.reference(step)
    for step in steps(float("nan")):
        found.quantized(step)
    assert [one.sqnr_db for one in found.steps] == [-200.0, -200.0]


def test_growth_keeps_its_own_copies() -> None:
    """Samplers may change the latent in place."""
    found, latent = Growth("timestep"), torch.ones(3)
    for t in (900.0, 500.0):
        found.reference({"t": t, "branch": "cond", "inputs": {"x": latent, "timestep": torch.tensor([t])}})
        latent += 1.0
    other = torch.ones(3)
    for t in (900.0, 500.0):
        found.quantized({"t": t, "branch": "cond", "inputs": {"x": other, "timestep": torch.tensor([t])}})
        other += 1.0
    assert [one.sqnr_db for one in found.steps] == [200.0]


def test_costs_say_what_is_shared_and_add_up(tmp_path: Path) -> None:
    bundle = tiny_bundle.write(tmp_path / "bundle")
    graphs, storage = costs.measure(bundle)
    assert [(one.what, one.bins) for one in graphs] == [("bin", (0,)), ("bin", (1,)), ("bin", (2,)), ("bin", (3,))]
    assert {one.shared_bytes for one in graphs} == {64 * 64 * 4}
    assert {one.own_bytes for one in graphs} == {4 + 3 * 8}, "gain, and the shape of t"
    assert {one.multiply_adds for one in graphs} == {4 * 64 * 64}
    # The prompt, what a product reads and what it makes, of 4 x 64 floats each, and t.
    assert {one.peak_bytes for one in graphs} == {3 * 4 * 64 * 4 + 4}
    assert dict(storage.parts)["weights that bins share"] == 64 * 64 * 4
    assert sum(count for _, count in storage.parts) == bundle.size
    with_page = bundle.attach(PAGE, b"x" * 1000)
    assert with_page.size == bundle.size, "the page is for people"
    assert costs.measure(with_page) == (graphs, storage)


@pytest.mark.parametrize(
    ("op", "shapes", "made", "expected"),
    [
        ("MatMul", [(2, 8, 16), (16, 32)], (2, 8, 32), 2 * 8 * 32 * 16),
        ("Gemm", [(8, 16), (16, 32)], (8, 32), 8 * 32 * 16),
        ("Conv", [(1, 3, 8, 8), (5, 3, 2, 2)], (1, 5, 4, 4), 5 * 16 * 12),
        ("MultiHeadAttention", [(1, 10, 12), (1, 7, 12), (1, 7, 12)], (1, 10, 12), 2 * 10 * 12 * 7),
        ("Add", [(8,), (8,)], (8,), 0),
        ("MatMul", [(), ()], (), 0),
    ],
)
def test_multiply_adds(op: str, shapes: list[tuple[int, ...]], made: tuple[int, ...], expected: int) -> None:
    names = [f"i{number}" for number in range(len(shapes))]
    node = helper.make_node(op, names, ["y"])
    assert costs.multiply_adds(node, {**dict(zip(names, shapes, strict=True)), "y": made}) == expected


def test_four_bit_weights_take_half_a_byte() -> None:
    assert costs._bytes(TensorProto.INT4, (3, 3)) == 5
    assert costs._bytes(TensorProto.FLOAT16, (3, 3)) == 18


def test_a_bundle_without_a_plan_has_no_page(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="carries no plan"):
        render(gather(tiny_bundle.write(tmp_path / "bundle")))


def test_what_describes_a_bundle_is_there_when_it_appears(tmp_path: Path) -> None:
    """And an export that fails while it is described leaves nothing."""
    from vdq_export.schedule import Schedule

    seen = []
    plain = tiny_bundle.write(tmp_path / "plain")
    schedule = Schedule.from_json((plain.path / "schedule.json").read_bytes(), "schedule.json")

    def write(name: str, describe: object) -> Path:
        with BundleWriter(tmp_path / name) as writer:
            for index, one in enumerate(schedule.bins):
                writer.add_graph(one.graph.removeprefix("graphs/").removesuffix(".onnx"), *tiny_bundle.graph(index))
            writer.commit(plain.manifest, schedule, describe=describe)  # type: ignore[arg-type]
        return tmp_path / name

    made = write("made", lambda bundle: seen.append(bundle.path) or {PAGE: b"page"})
    assert (made / PAGE).read_bytes() == b"page" and seen[0] != made

    def fails(_: object) -> dict[str, bytes]:
        raise BundleError("no page")

    with pytest.raises(BundleError, match="no page"):
        write("failed", fails)
    assert tiny_bundle.names(tmp_path) == ["made", "plain"]
