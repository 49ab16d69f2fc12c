"""vdq-export report: what it writes, where, and what it says when it cannot."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner

from tests.commands import command
from vdq_export import export, sources
from vdq_export.bundle import Bundle
from vdq_export.commands.report import report_command
from vdq_export.errors import BundleError, ModelError
from vdq_export.manifest import PAGE, REPORT
from vdq_export.progress import Reporter
from vdq_export.report.data import KernelCount, LayerQuality, VerifyReport
from vdq_export.report.passes import PASSES
from vdq_export.report.ranges import RANGES, RangesReport
from vdq_export.verify import Clips, judge_clips, make_clips

MODEL = "tests.clip_model:build"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(MODEL, tsw=2, workers=1, out=tmp_path_factory.mktemp("report") / "bundle").path


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    return shutil.copytree(exported, tmp_path / "bundle")


def report(*arguments: str | Path) -> str:
    """What the command prints, run in this process. Raises what it raises."""
    done = CliRunner().invoke(report_command, [str(one) for one in arguments], catch_exceptions=False)
    assert (done.exit_code, done.stderr) == (0, "")
    return done.stdout


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def test_an_export_leaves_its_reports_and_a_page_without_clips(exported: Path) -> None:
    opened = Bundle.open(exported)  # the hashes of what was added, too
    names = {entry.path for entry in opened.manifest.files if entry.path.startswith("report/")}
    assert names == {PAGE, PASSES, RANGES, "report/hoisting.json"}
    page = text(exported / PAGE)
    assert "Not measured" in page and "vdq-export report BUNDLE" in page and "<canvas" not in page
    assert str(exported.parent) not in page, "no path of the machine it was made on"
    ranges = RangesReport.from_json((exported / RANGES).read_bytes())
    (network,) = ranges.networks
    assert network.t[::2] == (1000.0, 800.0, 550.0, 300.0, 120.0, 20.0)
    planned = {layer.value for layer in opened.plan.layers if layer.quantized and layer.activation}
    assert planned <= {one.value for one in network.values}
    for layer in opened.plan.layers:  # static-asq's ranges are minima and maxima: what was drawn is what was planned
        seen = next((one for one in network.values if one.value == layer.value), None)
        if seen is not None and layer.activation:
            assert max(one.hi for one in layer.activation) == pytest.approx(max(seen.after_hi or seen.hi), rel=1e-4)


def test_a_bundle_that_was_not_verified_is_verified(bundle: Path, tmp_path: Path) -> None:
    code, out, err = command("report", "bundle", "--clips", "1", cwd=tmp_path)
    assert (code, err) == (0, "") and out.startswith("bundle/report/report.html: ")
    found = Bundle.open(bundle).report
    assert found is not None and f"verdict {found.verdict}" in out
    assert found.clips == 1 and found.worst_psnr_db == found.psnr_db
    assert [one.t for one in found.growth] == [800.0, 550.0, 300.0, 120.0, 20.0]
    assert all(10 < one.sqnr_db < 100 for one in found.growth)
    page = text(bundle / PAGE)
    assert page.count("<canvas") == 3 and "noise 0" in page and 'id="growth"' in page
    # A second time nothing is measured; the other bundle stands beside, with clips of its own.
    code, out, err = command(
        "report", "bundle", "--against", "bundle", "--clips", "1", "--out", "x/a.html", cwd=tmp_path
    )
    assert (code, err) == (0, "") and out.startswith("x/a.html: ")
    compared = text(tmp_path / "x" / "a.html")
    assert "Compared with bundle" in compared and compared.count("<canvas") == 5
    assert text(bundle / PAGE) == page, "with --out the bundle is left alone"


def test_without_clips_no_model_is_needed(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    failures = ("<b>x</b> is below", "1 of 2 planned linears run in float: a")
    kernels = KernelCount(planned=2, executed=1)
    found = VerifyReport(verdict="fail", bundle_bytes=1, integer_kernels=kernels, failures=failures)
    opened.attach(REPORT, found.to_json())
    manifest = json.loads((bundle / "manifest.json").read_bytes())
    manifest["model"]["name"] = "nowhere:at-all"
    (bundle / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert "verdict fail" in report(bundle, "--clips", "0")
    page = text(bundle / PAGE)
    assert "&lt;b&gt;x&lt;/b&gt; is below" in page and "<b>x</b>" not in page
    assert "nowhere:at-all" in page and "1 of 2" in page
    opened = Bundle.open(bundle)
    opened.attach(REPORT, msgspec.structs.replace(found, verdict="pass", failures=()).to_json())
    assert "verdict fail" in report(bundle, "--clips", "0"), "a linear in float misses the threshold"
    every = KernelCount(planned=2, executed=2)
    opened.attach(REPORT, msgspec.structs.replace(found, verdict="pass", failures=(), integer_kernels=every).to_json())
    assert "verdict open" in report(bundle, "--clips", "0"), "no clip and no layer was measured"


def test_the_float_models_clips_are_made_once(exported: Path) -> None:
    opened, model = Bundle.open(exported), sources.resolve(MODEL)
    made = make_clips(opened, model, 1, Reporter())
    again = make_clips(opened, replace(model, module=torch.nn.Identity()), 1, Reporter(), reference=made.reference)
    assert again.reference[0] is made.reference[0] and again.growth == [[]]
    assert np.array_equal(again.quantized[0], made.quantized[0])


def test_clips_below_a_threshold_lead_to_what_costs_them(exported: Path) -> None:
    model, plan = sources.resolve(MODEL), Bundle.open(exported).plan
    made = Clips(reference=[np.zeros((1, 2, 4, 4))], quantized=[np.full((1, 2, 4, 4), 0.0317687)])
    layers = (LayerQuality(layer="a", bin=0, sqnr_db=40.0, worst_step=1.0),)
    psnr, _, (line,) = judge_clips(model, made, plan.recipe.verify, layers)
    assert psnr is not None and 29.95 < psnr < 30
    assert "PSNR 29.96 dB is below 30; weakest by itself: a" in line and line.endswith("vdq-export bisect")
    assert "bisect" not in judge_clips(model, made, plan.recipe.verify, layers, "clips on the device")[2][0]


def test_what_cannot_be_shown_is_said(bundle: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="is not a bundle"):
        report(tmp_path / "nothing")
    with pytest.raises(ModelError, match="other weights"):
        report(bundle, "--model", "tests.tiny_model:other")
    kernels = KernelCount(planned=2, executed=2)
    found = VerifyReport(verdict="pass", bundle_bytes=1, integer_kernels=kernels)
    Bundle.open(bundle).attach_files({REPORT: found.to_json(), RANGES: b"{}"})
    with pytest.raises(BundleError, match=r"ranges\.json.*networks"):
        report(bundle, "--clips", "0")
