"""--target qnn from the command: what lies in the bundle, which bits it takes, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

import vdq_export
from tests.bin_feeds import bin_feeds
from tests.commands import MODEL, assert_one_line, command
from vdq_export import ort, recipe, targets
from vdq_export.bundle import Bundle
from vdq_export.devices.verify import Choices, verify_device
from vdq_export.graph import INLINE_BYTES, Graph
from vdq_export.handoff.encodings import from_json
from vdq_export.model import Model
from vdq_export.recipe import Override
from vdq_export.targets.qnn import ARCHS, hexagon

QUANTIZERS = {"QuantizeLinear", "DequantizeLinear"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qnn")
    code, _, err = command(MODEL, "--target", "qnn", "--tsw", "2", "--strict", "--out", "bundle", cwd=folder)
    assert (code, err) == (0, "")
    return folder / "bundle"


def test_archs_are_the_target_s() -> None:
    assert targets.load("qnn").spec().isas == ARCHS == ("v73", "v75", "v79", "v81")


def test_no_operator_is_left_in_float(exported: Path) -> None:
    """Every float operand of every operator comes from a DequantizeLinear, and every float result goes into a Q."""
    bundle = Bundle.open(exported)
    for one in bundle.plan.bins:
        graph = Graph.load(bundle.graph_path(one))
        for node in (n for n in graph.nodes if n.op not in QUANTIZERS):
            for value in node.inputs:
                if value.dtype == np.float32:
                    assert value.inputs and value.inputs[0].op == "DequantizeLinear", f"{node.name} reads {value.name}"
            for value in node.outputs:
                assert [reader.op for reader in value.outputs] == ["QuantizeLinear"], node.name
        assert all(len(v.shape) <= 5 for v in graph.values().values() if v.shape is not None)


def test_inputs_and_outputs_are_the_model_s_in_every_bin(exported: Path) -> None:
    bundle = Bundle.open(exported)
    graphs = [Graph.load(bundle.graph_path(one)) for one in bundle.plan.bins]
    signatures = [[(v.name, v.dtype, v.shape) for v in (*g.gs.inputs, *g.gs.outputs)] for g in graphs]
    assert signatures[0] == signatures[1]
    assert {dtype for _, dtype, _ in signatures[0]} == {np.dtype(np.float32)}


def test_the_graph_still_computes_the_model(exported: Path, tiny: Model) -> None:
    """16 bits everywhere and 8-bit weights: the noise of the weights, about 47 dB on this model's calibrated steps."""
    step = next(iter(tiny.iter_trajectories()))[2]
    with torch.no_grad():
        wanted = tiny.module(**step["inputs"], return_dict=False)[0].numpy()
    bundle = Bundle.open(exported)
    index = bundle.schedule.select(step["t"], step["branch"])
    [found] = ort.run(Graph.load(bundle.graph_path(index)), bin_feeds(bundle, index, step), exact=True).values()
    noise = float(np.square(found - wanted).sum() / np.square(wanted).sum())
    assert 10 * np.log10(1 / noise) > 40


def test_hand_off_files(exported: Path) -> None:
    names = {path.name for path in (exported / "handoff").rglob("*") if path.is_file()}
    versions = ("0.6.1", "1.0.0", "2.0.0")
    assert names == {"lint.json", "lint.sarif", *(f"bin0{b}.aimet-{v}.json" for b in (0, 1) for v in versions)}
    lint = json.loads((exported / "handoff" / "lint.json").read_text())
    assert (lint["profile"], lint["findings"]) == ("qnn-v75", [])


def test_weights_are_stored_once(exported: Path) -> None:
    """Two bins: the second one's graph adds its own scales, not its own weights."""
    bundle = Bundle.open(exported)
    weights = sum(e.size for e in bundle.manifest.files if e.path.endswith("weights.bin"))
    # Hoisted ones may be float.
    each = [x.shape[0] * x.shape[1] * (1 if x.quantized else 4) for x in bundle.plan.layers]
    own = [size for size in each if size >= INLINE_BYTES]
    assert sum(own) <= weights < 1.5 * sum(own)


def test_bits_from_the_command(tmp_path: Path) -> None:
    code, out, err = command(
        MODEL, "--target", "qnn", "--activations", "8", "--tsw", "1", "--out", "b", "--json", cwd=tmp_path
    )
    assert (code, err) == (0, "")
    plan = Bundle.open(tmp_path / json.loads(out)["bundle"]).plan
    assert plan.recipe.activations.bits == 8
    kinds = {one.dtype for one in plan.values}
    assert kinds == {"uint8", "uint16"}, "16 bits where the recipe keeps float elsewhere"
    assert sum(one.dtype == "uint8" for one in plan.values) > 0.8 * len(plan.values)


def test_mixed_bits(tiny: Model, tmp_path: Path) -> None:
    """Linears in 8 bits, with the layers that the recipe keeps in float elsewhere and all between them in 16."""
    plan = vdq_export.export(tiny, target="qnn", tsw=1, activations="mixed", out=tmp_path / "b").plan
    bits = {layer.name: layer.activation_bits for layer in plan.of_bins().layers}
    assert {name for name, own in bits.items() if own == 16} == {
        name for name in bits if not name.startswith("blocks.")
    }
    for one in plan.values:
        path = one.name.rpartition("/")[0]
        wide = bits.get(path, 16) == 16
        assert one.dtype == ("uint16" if wide else "uint8"), one.name


def test_mixed_is_for_targets_without_float(tmp_path: Path) -> None:
    assert_one_line(command(MODEL, "--activations", "mixed", "--out", "b", cwd=tmp_path), "mixed", "ort-int8")


@pytest.mark.skipif(not hexagon.available(), reason="onnxruntime-qnn is not installed: pip install 'vdq-export[qnn]'")
def test_a_mix_of_bits_on_the_emulator(tiny: Model, tmp_path: Path) -> None:
    """One block in 8 bits between 16-bit neighbours, its FFN with 4-bit weights: all on the HTP, exact to 0.5 dB."""
    rules = (
        Override(match="blocks.1.*", activations=8, why="test"),
        Override(match="blocks.1.ffn.*", weights=4, why="test"),
    )
    method = msgspec.structs.replace(recipe.load("static-asq"), override=rules)
    bundle = vdq_export.export(tiny, target="qnn", tsw=1, recipe=method, out=tmp_path / "b")
    assert {value.dtype for value in bundle.plan.values} == {"uint8", "uint16"}
    assert any(c.dtype == "uint8" for value in bundle.plan.values for c in value.conversions)
    report = verify_device(bundle, tiny, Choices(steps=2, clips=0))
    assert report.device is not None
    [one] = report.device.bins
    assert one.off_device == ()
    assert one.drop_db is not None and one.drop_db <= 0.5
    assert one.exact_db is not None and 20 < one.exact_db < 40, "8-bit activations cost what they cost"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--isa", "v99"), ("v99", "v79")),
        (("--activations", "4"), ("4-bit activations", "8, 16")),
        (("--activations", "half"), ("half", "known: 16, 4, 6, 8, mixed")),
        (("--recipe", "q-dit"), ("groups of 128", "16, 32, 64")),
        (("--recipe", "wan22-mxfp4"), ("computed at run time", "reference")),
    ],
)
def test_what_the_htp_has_not_is_refused(arguments: tuple[str, ...], words: tuple[str, ...], tmp_path: Path) -> None:
    assert_one_line(command(MODEL, "--target", "qnn", *arguments, "--out", "b", cwd=tmp_path), *words)
    assert not (tmp_path / "b").exists()


def test_every_quantized_tensor_has_its_encoding(exported: Path) -> None:
    """As many in a bin's file as its graph dequantizes, with the plan's numbers; bins differ in activations alone."""
    bundle = Bundle.open(exported)
    files = []
    for place, one in enumerate(bundle.plan.bins):
        data = (exported / f"handoff/encodings/{one.name}.aimet-2.0.0.json").read_bytes()
        files.append({encoding.name: encoding for encoding in from_json(data)})
        graph = Graph.load(bundle.graph_path(one))
        assert len(files[-1]) == sum(node.op == "DequantizeLinear" for node in graph.nodes)
        planned = {value.name: value.ranges[place] for value in bundle.plan.values if value.name in files[-1]}
        assert len(planned) > 100
        for name, numbers in planned.items():
            held = files[-1][name]
            assert held.scale == np.float32(numbers.scale) and held.zero_point == numbers.zero_point, name
    assert {one.axis for one in files[0].values()} >= {None, 1}
    weights = [name for name, one in files[0].items() if one.axis == 1]
    assert all(files[0][name].same_grid(files[1][name]) for name in weights)
    assert any(not one.same_grid(files[1][name]) for name, one in files[0].items())
