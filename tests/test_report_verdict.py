"""The report's verdict: what was measured, what was not, and what nothing can measure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from vdq_export import recipe as recipes
from vdq_export import recipe_toml
from vdq_export.bundle import Bundle
from vdq_export.metrics import db_text
from vdq_export.plan import Conversion, Range, ValuePlan
from vdq_export.report import comparison, sections, verdict
from vdq_export.report.content import DEVICE, Content, gather
from vdq_export.report.costs import FOR_PEOPLE, GraphCost, Storage
from vdq_export.report.data import JudgeScores, KernelCount, LayerQuality, StepError, VerifyReport
from vdq_export.report.device import DeviceBin, DeviceReport
from vdq_export.report.page import render

WHOLE = VerifyReport(
    verdict="pass",
    bundle_bytes=1,
    integer_kernels=KernelCount(planned=40, executed=40),
    psnr_db=41.25,
    worst_psnr_db=38.0,
    clips=20,
    layers=(LayerQuality(layer="sample", bin=0, sqnr_db=30.0, worst_step=5.0),),
    judge=JudgeScores(float_={"digit": 1.0}, quantized={"digit": 0.95}),
)


@pytest.fixture(scope="module")
def plain(made: Path) -> Content:
    return gather(Bundle.open(made / "bundle"))


def found(content: Content, **fields: object) -> Content:
    return replace(content, verify=msgspec.structs.replace(WHOLE, **fields))


def asked(content: Content, target: str = "", **fields: object) -> Content:
    """Other thresholds; another target."""
    one = content.bundle
    recipe = msgspec.structs.replace(one.plan.recipe, verify=msgspec.structs.replace(one.plan.recipe.verify, **fields))
    manifest = msgspec.structs.replace(one.manifest, target=target or one.manifest.target)
    plan = msgspec.structs.replace(one.plan, recipe=recipe)
    return replace(content, bundle=Bundle(one.path, manifest, one.schedule, (plan,)))


def states(content: Content) -> list[str]:
    return [one.state for one in verdict.checks(content)]


def test_only_what_was_measured_may_ship(plain: Content) -> None:
    assert verdict.headline(plain) == ("open", "Not measured")
    assert verdict.headline(found(plain)) == ("pass", "May ship: every threshold holds")
    without = found(plain, psnr_db=None, worst_psnr_db=None, clips=0, judge=None)
    assert states(without) == ["open", "holds", "holds"]
    assert verdict.headline(without) == ("open", "Passes what was measured; open: clips against float, PSNR")
    assert "May ship" not in render(without).decode() and "May ship" in render(found(plain)).decode()
    missed = found(plain, verdict="fail", psnr_db=29.0, failures=("clips: PSNR 29.0 dB is below 30",))
    assert verdict.headline(missed) == ("fail", "Fails") and states(missed)[0] == "missed"


def test_it_is_said_how_many_clips_were_judged(plain: Content) -> None:
    rows = verdict.checks(found(plain))
    assert [rows[0].measured, rows[3].measured] == [
        "41.2 dB, mean of 20 clips, worst 38.0 dB",
        "100% → 95% of 20 clips",
    ]
    assert verdict.checks(found(plain, clips=1))[0].measured == "41.2 dB, one clip"
    assert verdict.checks(found(plain, clips=0))[0].measured == "41.2 dB", "a report of before they were counted"


def test_what_cannot_fail_does_not_hold(plain: Content) -> None:
    nothing = found(asked(plain, max_judge_drop=1.0), integer_kernels=KernelCount(planned=0, executed=0))
    assert states(nothing) == ["holds", "holds", "none", "none"]
    assert verdict.checks(nothing)[2].measured == "none planned"
    text = render(nothing).decode()
    assert text.count("✓<span") == 2 and text.count('<span class="soft">–</span>') == 2


def test_numbers_are_not_rounded_onto_their_threshold(plain: Content) -> None:
    assert [db_text(29.96, 30), db_text(29.96), db_text(30.04, 30), db_text(29.9999, 30)] == [
        "29.96 dB", "30.0 dB", "30.0 dB", "29.9999 dB",
    ]  # fmt: skip
    assert (db_text(None), db_text(200.0)) == ("not measured", "no difference")
    assert verdict.checks(found(plain, psnr_db=29.96, clips=0))[0].measured == "29.96 dB"
    scores = JudgeScores(float_={"digit": 1.0}, quantized={"digit": 0.896})
    judged = verdict.checks(found(plain, judge=scores))[3]
    assert (judged.state, judged.measured) == ("missed", "100.0% → 89.6% of 20 clips")


def on_device(verdict: str = "pass", **fields: object) -> VerifyReport:
    one = DeviceBin(bin=0, steps=2, exact_db=30.0, device_db=29.0, drop_db=1.0, **fields)  # type: ignore[arg-type]
    told = DeviceReport(device="htp-emulator", arch="v75", tool="t", bins=(one,), clips=1)
    failures = () if verdict == "pass" else ("bin00: <worse>",)
    return msgspec.structs.replace(WHOLE, verdict=verdict, failures=failures, device=told)


def test_what_the_device_found_counts(plain: Content, made: Path) -> None:
    qnn = found(asked(plain, target="qnn"))
    assert verdict.headline(qnn) == ("open", "Passes what was measured; open: on htp-emulator")
    assert verdict.headline(found(plain))[0] == "pass", "no device to ask"
    held = replace(qnn, device=on_device())
    row = verdict.checks(held)[-1]
    assert (row.name, row.state) == ("on htp-emulator v75", "holds")
    assert row.measured == "1 of 1 bins run, at most 1.00 dB lost, clips 41.2 dB"
    assert verdict.headline(held)[0] == "pass"
    broken = replace(qnn, device=on_device("fail", off_device=("Softmax_1",)))
    assert (
        verdict.headline(broken) == ("fail", "Fails")
        and "1 nodes not on the device" in verdict.checks(broken)[-1].measured
    )
    assert "on the device: bin00: &lt;worse&gt;" in render(broken).decode()


def test_the_devices_report_is_read_from_the_bundle(made: Path, tmp_path: Path) -> None:
    import shutil

    place = shutil.copytree(made / "bundle", tmp_path / "bundle")
    opened = Bundle.open(place).attach(DEVICE, on_device().to_json())
    assert gather(opened).device == on_device()


def test_kernels_of_the_cpu_say_nothing_where_every_operator_is_quantized(plain: Content) -> None:
    def value(name: str, hi: float, dtype: str = "uint16") -> ValuePlan:
        spans = tuple(Range(lo=0.0, hi=hi * (n + 1), scale=hi / 100, zero_point=0, why="") for n in range(2))
        other = Conversion(dtype="uint8", ranges=spans, readers=("r",), why="")
        return ValuePlan(name=name, dtype=dtype, ranges=spans, why="", conversions=(other,))  # type: ignore[arg-type]

    plan = plain.bundle.plan
    values = (value("wide", 50.0), value("narrow", 0.5, "int16"), value("middle", 4.0))
    one = plain.bundle
    bundle = Bundle(one.path, one.manifest, one.schedule, (msgspec.structs.replace(plan, values=values),))
    npu = found(replace(plain, bundle=bundle), integer_kernels=KernelCount(planned=0, executed=0))
    assert states(npu)[2] == "none" and "not applicable" in verdict.checks(npu)[2].measured
    told = sections.other_values(npu)
    assert told is not None and told.counts == (
        "2 values, uint16", "1 values, int16", "3 second quantizers of a value, uint8",
    )  # fmt: skip
    assert told.narrowest[0] == ("narrow", "bin00", "int16", "0 … 0.5, scale 0.005")
    assert [row[:2] for row in told.widest] == [("wide", "bin01"), ("middle", "bin01"), ("narrow", "bin01")]
    text = render(npu).decode()
    assert "Not applicable to" in text and "0 of 0" not in text and "3 second quantizers" in text
    assert sections.other_values(plain) is None


def test_key_figures_are_of_a_call_and_of_what_is_loaded(plain: Content) -> None:
    def cost(what: str, bins: tuple[int, ...], count: int) -> GraphCost:
        return GraphCost(
            path=what, what=what, bins=bins, nodes=1, shared_bytes=0, own_bytes=0, multiply_adds=count, peak_bytes=0
        )

    graphs = (cost("bin", (0,), 100_000_000), cost("bin", (1,), 300_000_000), cost("mixed", (1,), 81_000_000))
    parts = (("weights that bins share", 3_000_000), *((name, 1_000_000) for name in FOR_PEOPLE))
    figures = dict(sections.key_figures(replace(plain, graphs=graphs, storage=Storage(parts=parts))))
    assert figures["multiply-adds a call"] == "100 M … 381 M", "what is mixed runs at every step"
    assert figures["of it a device loads"] == "3 MB"
    kinds = dict(plain.storage.parts)
    assert set(FOR_PEOPLE) - {"hand-off files"} <= set(kinds), "the names are those of costs.py"


def test_verdicts_by_other_thresholds_stand_beside_them(plain: Content) -> None:
    lax = found(asked(plain, min_psnr_db=8.0, max_judge_drop=1.0))
    rows = {one.name: one for one in comparison.compared(found(plain), lax)}
    assert "PSNR ≥ 30 dB" in rows["asked"].this and "PSNR ≥ 8 dB" in rows["asked"].other
    assert rows["verdict"].this == rows["verdict"].other == "May ship: every threshold holds"
    assert rows["judge: digit"].this == "100% → 95% of 20 clips"


def test_only_the_other_bundles_growth(plain: Content) -> None:
    """What is drawn has a place on the page."""
    growth = (StepError(t=500.0, sqnr_db=30.0), StepError(t=100.0, sqnr_db=20.0))
    bare = replace(found(plain), against=found(plain, growth=growth))
    for content in (bare, replace(bare, verify=None), found(plain), found(plain, growth=growth)):
        text = render(content).decode()
        plots = text[text.index('id="plots"') :]
        assert ('"growth":{' in plots) == ('id="growth"' in text)
    assert "PSNR 41.2 dB" in render(found(plain, growth=growth)).decode(), "the last step's own error is in the clips"


def test_the_recipe_is_the_one_that_was_run(plain: Content) -> None:
    text = sections.recipe_text(plain)
    assert "tsw = 2" in text and "min_psnr_db = 30.0" in text and "max_judge_drop = 0.1" in text
    assert "rotation" not in text and "low_rank" not in text, "tables that change nothing"
    recipe = plain.bundle.manifest.recipe
    assert recipe is not None and recipes.parse(text) == msgspec.structs.replace(recipe, tsw=2)
    for name in recipes.names():
        assert recipes.parse(recipe_toml.dump(recipes.load(name))) == recipes.load(name)


def test_layers_that_run_in_float_are_all_named(plain: Content) -> None:
    names = tuple(f"blocks.{n} in bin00" for n in range(7))
    kernels = KernelCount(planned=40, executed=33, floating=names)
    text = render(found(plain, integer_kernels=kernels, verdict="fail")).decode()
    assert "7 run in float" in text and all(name in text for name in names)
    assert (
        VerifyReport.from_json(
            b'{"verdict": "pass", "bundle_bytes": 1, "integer_kernels": {"planned": 1, "executed": 1}}'
        ).clips
        == 0
    )
