"""The report page of bundles with several sets of weights: experts, and bins with weights of their own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from vdq_export import export
from vdq_export.bundle import Bundle
from vdq_export.plan import QuantPlan
from vdq_export.report import range_view, sections, verdict
from vdq_export.report.cells import OUTPUT, cells, columns
from vdq_export.report.content import Content, gather
from vdq_export.report.data import KernelCount, LayerQuality, VerifyReport
from vdq_export.report.networks import network_name
from vdq_export.report.page import render
from vdq_export.report.passes import PassesReport, PassRun, Skipped
from vdq_export.report.ranges import NetworkRanges, RangesReport, ValueRanges

WAN = {"layers": 400, "bins": 8}  # 40 blocks of 10 linears
LIMIT = 8_000_000  # bytes of a page


def quality(layer: str, bin: int, sqnr_db: float = 30.0) -> LayerQuality:
    return LayerQuality(layer=layer, bin=bin, sqnr_db=sqnr_db, worst_step=500.0 + bin)


def verified(*layers: LayerQuality) -> VerifyReport:
    kernels = KernelCount(planned=2, executed=2)
    return VerifyReport(verdict="pass", bundle_bytes=1, integer_kernels=kernels, psnr_db=40.0, clips=2, layers=layers)


@pytest.fixture(scope="module")
def plain(made: Path) -> Content:
    """One set of weights, two bins."""
    return gather(Bundle.open(made / "bundle"))


@pytest.fixture(scope="module")
def of_bins(tmp_path_factory: pytest.TempPathFactory) -> Content:
    """Three bins, each with smoothing and weights of its own."""
    out = tmp_path_factory.mktemp("tsq") / "bundle"
    made = export(
        "tests.tiny_model:build", target="reference", recipe="static-tsq-tsw", tsw=3, workers=1, page=False, out=out
    )
    return gather(made)


def with_plans(content: Content, *plans: QuantPlan) -> Content:
    one = content.bundle
    return replace(content, bundle=Bundle(one.path, one.manifest, one.schedule, plans))


def of_experts(content: Content) -> Content:
    """The same plan for two experts: its first bin for one, its second for the other."""
    plan = content.bundle.plan
    plans = []
    for name, one in zip(("high", "low"), plan.bins, strict=True):
        place = plan.place(one)
        layers = [msgspec.structs.replace(x, activation=x.activation[place : place + 1]) for x in plan.layers]
        bins = (msgspec.structs.replace(one, expert=name),)
        plans.append(msgspec.structs.replace(plan, expert=name, bins=bins, layers=tuple(layers), attentions=()))
    return with_plans(content, *plans)


def test_networks_are_called_by_their_expert_and_their_bin(plain: Content) -> None:
    def plan(expert: str, index: int, precision: str = "", t: float = 0.0) -> QuantPlan:
        bins = (msgspec.structs.replace(plain.bundle.plan.bins[0], index=index, t=(t, t + 1), expert=expert),)
        made: QuantPlan = msgspec.structs.replace(
            plain.bundle.plan, expert=expert, precision=precision, bins=bins, draft=True
        )
        return made

    low, high = plan("", 0, "low"), plan("", 1, "high")
    assert [network_name(one, (low, high)) for one in (low, high)] == ["", ""], "the same weights"
    several = (plan("a", 0), plan("b", 1, t=5.0), plan("b", 2, t=6.0))
    assert [network_name(one, several) for one in several] == ["a", "b.bin01", "b.bin02"]
    both = (plan("", 0, "low"), plan("", 1, "low", 9.0), plan("", 2, "high"), plan("", 3, "high", 9.0))
    assert [network_name(one, both) for one in both] == ["bin00", "bin01", "bin00", "bin01"]


def test_the_passes_of_every_set_of_weights_are_told(of_bins: Content) -> None:
    assert of_bins.passes is not None
    runs = {(one.name, one.network) for one in of_bins.passes.passes}
    assert {(name, f"bin{n:02d}") for name in ("smoothing", "rotation", "qdq") for n in range(3)} <= runs
    shown = sections.passes(of_bins)
    linear = next(one for one in shown if one.name == "linear")
    assert linear.networks == () and shown[0].name == "smoothing"
    assert sum(len(one.networks) for one in shown if one.name == "qdq") == 3, "equal ones stand together"
    assert len([one for one in shown if one.name == "qdq"]) < 3


def test_folds_are_those_of_the_cells_own_weights(of_bins: Content, plain: Content) -> None:
    """Values of other experts, and of bins with weights of their own, have the same names."""
    for content, networks in ((of_bins, ("bin00", "bin01", "bin02")), (of_experts(plain), ("high", "low"))):
        layer = next(one for one in content.bundle.plans[0].layers if one.smoothing)
        told = [
            PassRun(name="smoothing", network=name, applied=1, details=(f"{layer.value}: place of {name}",))
            for name in networks
        ]
        known = replace(content, passes=PassesReport(passes=tuple(told)))
        found = {one.bin: one.place for one in cells(known) if one.layer == layer.name}
        assert found == {f"bin{n:02d}": f"place of {name}" for n, name in enumerate(networks)}
    plain_layer = msgspec.structs.replace(layer, smoothing=None, rotation=None)
    plans = [
        msgspec.structs.replace(one, layers=tuple(plain_layer if x.name == layer.name else x for x in one.layers))
        for one in known.bundle.plans
    ]
    left = with_plans(known, plans[0], known.bundle.plans[1])
    assert [one.place for one in cells(left) if one.layer == layer.name] == ["nothing folded", "place of low"]


def test_weights_and_layers_are_counted_once_for_all_bins(of_bins: Content) -> None:
    assert of_bins.hoisting is not None
    whole = {one.whole.weight_bytes for one in of_bins.hoisting.networks}
    assert len(of_bins.hoisting.networks) == 3 and {sections.float_bytes(of_bins)} == whole
    figures = dict(sections.key_figures(of_bins))
    plan = of_bins.bundle.plans[0]
    assert figures["layers quantized"] == f"{sum(x.quantized for x in plan.layers)} of {len(plan.layers)}"
    assert sections.float_graphs(of_bins) == [("", plan.graph_hash)]
    assert len(sections.hoisted(of_bins)) < 3
    for why, layers in sections.in_float(of_bins):
        assert len(layers) == len(set(layers)) and not any(name.startswith("bin") for name in layers), why


def test_ranges_of_bins_with_weights_of_their_own_are_one_picture(of_bins: Content) -> None:
    (network,) = range_view.numbers(of_bins)
    plans = of_bins.bundle.plans
    steps = sorted((t for plan in plans for one in plan.bins for t in one.steps), reverse=True)
    assert network["t"] == [t for t in steps for _ in range(2)] and set(network["branch"]) == {"cond", "uncond"}
    assert of_bins.ranges is not None
    for value in network["values"]:
        seen = [one for part in of_bins.ranges.networks for one in part.values if one.value == value["value"]]
        assert sorted(x for x in value["hi"] if x is not None) == sorted(x for one in seen for x in one.hi)
        for name, none, place in value["layers"]:
            expected = [layer.activation[0].hi for plan in plans for layer in plan.layers if layer.name == name]
            assert none == "" and [one[4] for one in value["boxes"][place]] == expected


def test_slots_that_a_value_was_not_seen_in_are_empty(of_bins: Content) -> None:
    parts = [
        NetworkRanges(name=f"bin{n:02d}", t=(900.0 + n,), branch=("cond",), values=(seen,) if seen else ())
        for n, seen in enumerate((
            ValueRanges(value="x", layers=("a",), lo=(-1.0,), hi=(1.0,), after_lo=(-0.5,), after_hi=(0.5,)),
            None,
            ValueRanges(value="x", layers=("a",), lo=(-3.0,), hi=(3.0,)),
        ))
    ]  # fmt: skip
    (network,) = range_view.numbers(replace(of_bins, ranges=RangesReport(networks=tuple(parts))))
    (value,) = network["values"]
    assert network["t"] == [902.0, 901.0, 900.0], "descending, whatever the order of the networks"
    assert (value["hi"], value["afterHi"]) == ([3.0, None, 1.0], [3.0, None, 0.5])


def test_layers_of_one_value_have_boxes_of_their_own(plain: Content) -> None:
    """The first reader in float in a bin, or altogether, says nothing of the others."""
    assert plain.ranges is not None
    seen = next(one for one in plain.ranges.networks[0].values if len(one.layers) > 1)
    first, *others = seen.layers
    plan = plain.bundle.plan

    def changed(**fields: object) -> list[dict[str, list[object]]]:
        layers = [msgspec.structs.replace(x, **fields) if x.name == first else x for x in plan.layers]
        found = range_view.numbers(with_plans(plain, msgspec.structs.replace(plan, layers=tuple(layers))))
        value = next(one for one in found[0]["values"] if one["value"] == seen.value)
        return [
            {"name": [name, none], "bins": [one[0] for one in value["boxes"][n]]} for name, none, n in value["layers"]
        ]

    rest = [{"name": [name, ""], "bins": ["bin00", "bin01"]} for name in others]
    assert changed(float_in=("measured", "")) == [{"name": [first, ""], "bins": ["bin01"]}, *rest]
    for fields, none in (
        ({"float_in": ("measured", "measured")}, "in float in every bin"),
        ({"activation": (), "activation_dtype": "float"}, "activations stay float"),
    ):
        found = changed(**fields)
        assert none in str(found[0]["name"][1]) and found[0]["bins"] == [] and found[1:] == rest


def test_layers_of_experts_are_told_apart(plain: Content) -> None:
    both = of_experts(plain)
    high, low = both.bundle.plans
    kept = next(one.name for one in low.layers if one.quantized)
    layers = [x.in_bin(0) if x.name != kept else replace_kept(x.name, x.value, x.rows, x.shape) for x in low.layers]
    mixed = with_plans(both, high, msgspec.structs.replace(low, layers=tuple(layers)))
    told = dict(sections.in_float(mixed))
    assert told["only here"] == [f"low: {kept}"]
    shared = [name for why, names in told.items() if why != "only here" for name in names]
    assert shared and {name.split(": ")[0] for name in shared} == {"high", "low"}
    found = replace(mixed, verify=verified(quality("a", 0, 20.0), quality("a", 1, 10.0), quality("sample", 1, 15.0)))
    assert [one.layer for one in verdict.measured(found)] == ["high: a", "low: a", f"low: {OUTPUT}"]
    assert verdict.named(verdict.weakest(found)) == "10.0 dB: low: a, bin01"


def replace_kept(name: str, value: str, rows: int, shape: tuple[int, int]) -> object:
    from vdq_export.plan import LayerPlan

    return LayerPlan(name=name, value=value, rows=rows, shape=shape, keep_float="only here")


def test_what_was_skipped_is_counted_and_comes_first() -> None:
    skipped = tuple(Skipped(where=f"node {n}", why="no") for n in range(300))
    runs = (
        PassRun(name="linear", applied=2, details=("a", "b")),
        PassRun(name="smoothing", network="high", applied=1, details=("x: y",)),
        PassRun(name="smoothing", network="low", applied=1, details=("x: y",)),
        PassRun(name="qdq", applied=1, skipped=skipped),
        PassRun(name="no_ops", applied=0),
    )
    content = Content.__new__(Content)
    object.__setattr__(content, "passes", PassesReport(passes=runs))
    found = sections.passes(content)
    assert [(one.name, one.networks) for one in found] == [("qdq", ()), ("smoothing", ("high", "low")), ("linear", ())]
    assert (found[0].skipped_count, len(found[0].skipped), found[0].more_skipped) == (300, 200, 100)


def wan(plain: Content) -> Content:
    """A plan of the size of a real video model, measured; the graphs are the tiny model's."""
    plan = plain.bundle.plan
    pattern = [one for one in plan.layers if one.quantized]
    first = plan.bins[0]
    bins = tuple(
        msgspec.structs.replace(first, index=n, t=(1000.0 - 125 * (n + 1), 1000.0 - 125 * n), steps=(990.0 - 125 * n,))
        for n in range(WAN["bins"])
    )
    layers = []
    for number in range(WAN["layers"]):
        one = pattern[number % len(pattern)]
        spans = tuple(msgspec.structs.replace(one.activation[0], hi=1.0 + n + number / 7) for n in range(len(bins)))
        name = f"blocks.{number // 10}.part.{number % 10}"
        layers.append(msgspec.structs.replace(one, name=name, value=f"{name}/in", activation=spans))
    made = with_plans(plain, msgspec.structs.replace(plan, bins=bins, layers=tuple(layers), attentions=()))
    slots = [(t, branch) for t in range(1000, 0, -20) for branch in ("cond", "uncond")]
    curve = tuple(n / 3 for n in range(len(slots)))
    values = tuple(
        ValueRanges(value=x.value, layers=(x.name,), lo=curve, hi=curve, after_lo=curve, after_hi=curve) for x in layers
    )
    network = NetworkRanges(
        name="", t=tuple(float(t) for t, _ in slots), branch=tuple(b for _, b in slots), values=values
    )
    measured = verified(*(quality(x.name, one.index, 10.0 + n / 10) for n, x in enumerate(layers) for one in bins))
    return replace(made, verify=measured, ranges=RangesReport(networks=(network,)))


def test_a_model_of_four_hundred_layers_has_a_page_too(plain: Content) -> None:
    content = wan(plain)
    found = cells(content)
    data, texts = columns(found)
    assert len(found) == WAN["layers"] * WAN["bins"] == len(data["why"])
    assert [texts[number] for number in data["why"]] == [one.why for one in found]
    assert len(set(texts)) == len(texts)
    page = render(content).decode()
    assert len(page) < LIMIT
    plots = json.loads(re.findall(r'id="plots">(.*?)</script>', page)[0])
    told = json.dumps(plots["heat"])
    longest = max((one.why for one in found), key=len)
    assert told.count(json.dumps(longest)) == 1, "a layer's reasons stand once, not once a bin"


def test_provenance_says_how_often_each_expert_was_run(plain: Content) -> None:
    """Bins with weights of their own were calibrated with their expert; what nobody counted is left out."""

    def seen(name: str, t: float, calls: int) -> NetworkRanges:
        return NetworkRanges(name=name, t=(t, t), branch=("cond", "uncond"), values=(), calls=calls)

    networks = (seen("high.bin00", 900.0, 40), seen("high.bin01", 800.0, 40), seen("low", 100.0, 20))
    told = sections.calibration(replace(plain, ranges=RangesReport(networks=networks)))
    assert told == ["high: 40 calls of the network, timesteps: 2", "low: 20 calls of the network, timesteps: 1"]
    alone = RangesReport(networks=(seen("bin00", 900.0, 40), seen("bin01", 800.0, 40)))
    assert sections.calibration(replace(plain, ranges=alone)) == ["40 calls of the network, timesteps: 2"]
    assert sections.calibration(replace(plain, ranges=RangesReport(networks=(seen("", 900.0, 0),)))) == []
    page = render(replace(plain, ranges=RangesReport(networks=networks))).decode()
    assert all(line in page for line in told)
