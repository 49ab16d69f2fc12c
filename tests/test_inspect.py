"""What `inspect` says of graphs and bundles, and what `diff` says of two bundles."""

from __future__ import annotations

import json
from pathlib import Path

import onnx
import pytest
from click.testing import CliRunner

from tests import tiny_bundle
from tests.graphs import quantized_linear, transformer
from vdq_export.commands.diff import diff_command
from vdq_export.commands.inspect import inspect_command
from vdq_export.diff.compare import diff
from vdq_export.errors import VdqError
from vdq_export.graphs.view import from_proto
from vdq_export.inspect import ScaleSpread, scale_spread, summarize, summarize_view


def test_linears_are_products_with_constants() -> None:
    float_graph = summarize_view(from_proto(transformer(2)), "float")
    assert (float_graph.linears, float_graph.linears_quantized) == (12, 0)  # not the 4 products of attention
    assert float_graph.ops["MatMul"] == 16
    assert float_graph.param_bytes == {"f32": 12 * (8 * 8 + 8) * 4}
    quantized = summarize_view(from_proto(quantized_linear()), "quantized")
    assert (quantized.linears, quantized.linears_quantized) == (1, 1)
    assert quantized.param_bytes == {"int8": 64, "f32": 4 + 8 * 4 + 8 * 4, "uint8": 1}
    assert quantized.inputs == {"x": "f32[1,4,8]"} and quantized.outputs == {"proj/Add": "f32[1,4,8]"}


def test_spread_of_scales_over_bins() -> None:
    views = [from_proto(quantized_linear(scale)) for scale in (0.5, 0.125, 0.25)]
    assert scale_spread(views) == (ScaleSpread("proj/Q", (0.5, 0.125, 0.25), 4.0),)
    assert scale_spread(views[:1]) == ()


def test_command_on_a_file(tmp_path: Path) -> None:
    onnx.save_model(quantized_linear(), str(tmp_path / "a.onnx"))
    text = CliRunner().invoke(inspect_command, [str(tmp_path / "a.onnx")])
    assert text.exit_code == 0 and "1 of 1" in text.output and "QuantizeLinear" in text.output
    answer = json.loads(CliRunner().invoke(inspect_command, [str(tmp_path / "a.onnx"), "--json"]).output)
    assert answer["what"] == "graph" and answer["size"] == (tmp_path / "a.onnx").stat().st_size
    missing = CliRunner().invoke(inspect_command, [str(tmp_path / "none.onnx")])
    assert isinstance(missing.exception, VdqError) and missing.exception.exit_code == 2


def test_bundle(tmp_path: Path) -> None:
    bundle = tiny_bundle.write(tmp_path / "bundle")
    summary = summarize(bundle.path)
    assert (summary.what, summary.target, summary.size) == ("bundle", "test", bundle.size)
    assert [graph.name for graph in summary.graphs] == ["bin00", "bin01", "bin02", "bin03"]
    assert all(graph.param_bytes["f32"] == 64 * 64 * 4 + 4 for graph in summary.graphs)
    assert CliRunner().invoke(inspect_command, [str(bundle.path)]).exit_code == 0


def test_diff_of_equal_bundles(tmp_path: Path) -> None:
    a, b = tiny_bundle.write(tmp_path / "a"), tiny_bundle.write(tmp_path / "b")
    assert diff(a.path, b.path).same
    assert CliRunner().invoke(diff_command, [str(a.path), str(b.path)]).exit_code == 0


def test_diff_of_bundles_pairs_equal_bins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    a = tiny_bundle.write(tmp_path / "a")
    monkeypatch.setattr(tiny_bundle, "gain", lambda index: 5.0 if index == 2 else 2.0**index)
    b = tiny_bundle.write(tmp_path / "b")
    difference = diff(a.path, b.path)
    assert [(c.kind, c.where, c.detail) for c in difference.changes] == [
        ("parameter", "bin02: scaled", "gain: 4 -> 5 (+25.000%)")
    ]


def test_diff_of_bundles_with_other_weights_and_bins(tmp_path: Path) -> None:
    a = tiny_bundle.write(tmp_path / "a")
    b = tiny_bundle.write(tmp_path / "b", weight=tiny_bundle.WEIGHT * 2)
    assert diff(a.path, b.path).counts == {"parameter": 4}  # one tensor, in each of four graphs
    c = tiny_bundle.write(tmp_path / "c", branches=("cond", "uncond"))
    there, back = diff(a.path, c.path), diff(c.path, a.path)
    assert there.counts["added"] == back.counts["removed"] == 8  # bins of a branch are no bins of both
    assert there.counts["schedule"] > 0


def test_a_bundle_and_a_graph_cannot_be_compared(tmp_path: Path) -> None:
    bundle = tiny_bundle.write(tmp_path / "a")
    with pytest.raises(VdqError, match=r"is a bundle, .* a graph"):
        diff(bundle.path, bundle.graph_path(0))
