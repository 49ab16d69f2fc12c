"""Target cuda without a GPU: its programs in plain torch against onnxruntime, bin by bin and as a drop-in."""

from __future__ import annotations

import dataclasses
import gc
import shutil
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from msgspec.structs import replace

from tests import tiny_model
from tests.commands import assert_one_line, command
from vdq_export import ort
from vdq_export.bundle import Bundle
from vdq_export.compiler import export
from vdq_export.devices.verify_gpu import verify_gpu
from vdq_export.errors import BundleError, MissingToolError, RecipeError, UnknownNameError
from vdq_export.graph import Graph
from vdq_export.metrics import sqnr_db
from vdq_export.model import Model
from vdq_export.runtime import load
from vdq_export.runtime.ahead import Ahead
from vdq_export.runtime.device import DeviceAhead, DeviceEngine, programs_of, uploaded
from vdq_export.targets import cuda
from vdq_export.targets.cuda.ops import DOMAIN
from vdq_export.targets.cuda.programs import Programs
from vdq_export.verify import count_kernels

# Where no code flips, program and onnxruntime agree to 1e-6; one flipped code of this small network is 2e-3 of a layer.
AGREE_DB = 40.0
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, tiny: Model, traced: Graph) -> Bundle:
    return export(
        tiny, target="cuda", isa="jit", tsw=2, recipe="static-asq-attention", workers=1,
        out=tmp_path_factory.mktemp("cuda") / "bundle", traced={"": traced.copy()},
    )  # fmt: skip


def engine(bundle: Bundle, dtype: str = "float32") -> DeviceEngine:
    return DeviceEngine(bundle, bundle.schedule, DeviceAhead(bundle, bundle.schedule, CPU), CPU, dtype)


def outputs(bundle: Bundle, row: int | None = None) -> list[tuple[Any, Any]]:
    """(onnxruntime's exact output, the program's) of one call of each bin; row: of the table, instead of the bin's."""
    found, ahead, device = [], Ahead(bundle), engine(bundle)
    for index in range(len(bundle.schedule.bins)):
        t = next(t for t in tiny_model.TIMESTEPS if bundle.schedule.select(t, "cond") == index)
        inputs = {name: value.numpy() for name, value in tiny_model.inputs(3, t).items()}
        session = ort.session(Graph.load(bundle.graph_path(index)), exact=True)
        feeds = ahead.arrays(index, session, inputs)
        program: Any = device._session(index, "cond")
        given = uploaded(feeds, CPU) | {"bin": torch.tensor([index if row is None else row])}
        found.append((session.run(["sample"], feeds)[0], program(given)["sample"].numpy()))
    return found


def test_one_program_serves_all_bins_and_computes_what_onnxruntime_does(bundle: Bundle) -> None:
    (program,) = programs_of(bundle).programs
    assert program.bins == (0, 1)
    right = [sqnr_db(expected, found) for expected, found in outputs(bundle)]
    assert min(right) > AGREE_DB
    # The other bin's row is another function: the check would see a table that is read at the wrong place.
    wrong = [sqnr_db(expected, found) for expected, found in outputs(bundle, row=0)]
    assert wrong[0] == right[0] and wrong[1] < right[1] - 6.0


def test_all_planned_linears_and_attentions_are_fused(bundle: Bundle) -> None:
    (program,) = programs_of(bundle).programs
    nodes = onnx.load(bundle.path / program.graph, load_external_data=False).graph.node
    ops = [node.op_type for node in nodes if node.domain == DOMAIN]
    assert not [node for node in nodes if node.op_type in ("QuantizeLinear", "MultiHeadAttention", "RotaryEmbedding")]
    assert ops.count("Attention") == 4 and ops.count("Rope") >= 4 and not any(one.skipped for one in program.fused)
    kernels, floating = count_kernels(bundle)
    assert kernels.planned == kernels.executed > 0 and floating == []
    (layer, *_) = cuda.fused_layers(bundle.path, 0, bundle.plans[0])
    assert not cuda.fused_layers(bundle.path, 7, bundle.plans[0])[layer]  # a bin that no program serves


def test_the_drop_in_follows_the_schedule(bundle: Bundle) -> None:
    with load(bundle.path) as host, load(bundle.path, device="cpu", dtype="float32") as device:
        for t in tiny_model.TIMESTEPS:
            for branch in ("cond", "uncond"):
                inputs = tiny_model.inputs(5, t)
                with host.cache_context(branch), device.cache_context(branch):
                    expected, found = host(**inputs).sample, device(**inputs).sample
                assert found.dtype == expected.dtype
                assert sqnr_db(expected.numpy(), found.numpy()) > AGREE_DB
        told = device.statistics
    assert told.switches == 2 and told.loads == 1
    with pytest.raises(BundleError, match="closed"):
        device(**tiny_model.inputs(5, 1000.0))


# Half a step of each type, 2⁻¹² and 2⁻⁹, is 72 and 54 dB below a value; a dozen such roundings follow each other, and
# code flips that they cause count as quantization noise does.
@pytest.mark.parametrize(("dtype", "least"), [("float16", 45.0), ("bfloat16", 40.0)])
def test_halves_between_kernels_stay_near_the_exact_program(bundle: Bundle, dtype: str, least: float) -> None:
    inputs = {name: value.numpy() for name, value in tiny_model.inputs(3, 1000.0).items()}
    exact, halves = (engine(bundle, one).run(0, "cond", inputs, "sample") for one in ("float32", dtype))
    assert least < sqnr_db(exact, halves) < 100.0  # were nothing rounded, the type was ignored


def test_verify_measures_the_programs(bundle: Bundle, tiny: Model) -> None:
    report = verify_gpu(bundle, tiny, device="cuda-torch", dtype="float32", steps=2)
    assert report.verdict == "pass", report.failures
    assert report.device is not None and report.device.device == "cuda-torch" and report.device.arch == "cpu"
    assert [one.bin for one in report.device.bins] == [0, 1] and report.integer_kernels.planned > 0


def test_verify_sees_a_wrong_program(bundle: Bundle, tiny: Model, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(bundle.path, broken)
    path = broken / programs_of(bundle).programs[0].graph
    proto = onnx.load(path, load_external_data=False)
    picks = [node for node in proto.graph.node if node.op_type == "Pick" and node.name.endswith("scale.picked")]
    picks[0].attribute[[one.name for one in picks[0].attribute].index("offset")].i += 4  # its neighbour's number
    onnx.save(proto, path)
    report = verify_gpu(Bundle.open(broken, verify_hashes=False), tiny, device="cuda-torch", dtype="float32", steps=1)
    assert report.verdict == "fail" and any("lost" in line for line in report.failures)


def test_refusals(bundle: Bundle, tiny: Model, traced: Graph, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="device 'gpu'"):
        load(bundle.path, device="gpu")
    with pytest.raises(UnknownNameError, match="float64"):
        load(bundle.path, device="cpu", dtype="float64")
    with pytest.raises(UnknownNameError, match="sm_70"):
        cuda.spec("sm_70")
    with pytest.raises(RecipeError, match="MXFP4"):
        export(tiny, target="cuda", recipe="wan22-mxfp4", out=tmp_path / "no", traced={"": traced.copy()})
    other = export(tiny, target="reference", recipe="static-minmax", tsw=1, out=tmp_path / "other",
                   traced={"": traced.copy()}, workers=1)  # fmt: skip
    with pytest.raises(BundleError, match=r"made for reference and has no programs for a GPU; export it with --target"):
        load(other.path, device="cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_that_is_said(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(MissingToolError, match="no GPU that torch can use"):
        load(bundle.path, device="cuda")
    assert_one_line(command("verify", bundle.path, "--device", "cuda", cwd=tmp_path), "no GPU that torch can use")


def test_without_triton_export_says_what_to_do(
    tiny: Model, traced: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(
        MissingToolError, match=r"triton is not installed; pip install 'vdq-export\[cuda\]', or --isa jit"
    ):
        export(tiny, target="cuda", recipe="static-minmax", tsw=1, out=tmp_path / "b", traced={"": traced.copy()},
               workers=1)  # fmt: skip
    assert not (tmp_path / "b").exists()


def test_programs_of_another_format_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    text = programs_of(bundle).to_json()
    assert Programs.from_json(text) == programs_of(bundle)
    with pytest.raises(BundleError, match=r"cuda/programs\.json"):
        Programs.from_json(text.replace(b'"format": 1', b'"format": 9'))


def test_closing_frees_the_weights(bundle: Bundle) -> None:
    device = engine(bundle, "float16")
    inputs = {name: value.numpy() for name, value in tiny_model.inputs(3, 1000.0).items()}
    device.run(0, "cond", inputs, "sample")
    held = [weakref.ref(one) for one in device._weights.values()]
    assert held and all(one() is not None for one in held)
    device.close()
    gc.collect()
    assert not any(one() is not None for one in held)


def test_threads_get_what_one_gets(bundle: Bundle) -> None:
    with load(bundle.path, device="cpu", dtype="float32") as device, ThreadPoolExecutor(4) as threads:
        calls = [tiny_model.inputs(seed, t) for seed in range(3) for t in tiny_model.TIMESTEPS]
        expected = [device(**one).sample for one in calls]
        found = list(threads.map(lambda one: device(**one).sample, calls))
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda one: replace(one, graph="../elsewhere.onnx"), "which is no file"),
        (lambda one: replace(one, bins=(0,)), r"serves bins \[0\], the schedule has 2"),
        (lambda one: replace(one, bins=(0, 1, 1)), r"serves bins \[0, 1, 1\]"),
    ],
)
def test_programs_that_are_not_the_bundles_are_refused(bundle: Bundle, tmp_path: Path, change: Any, words: str) -> None:
    other = tmp_path / "other"
    shutil.copytree(bundle.path, other)
    told = programs_of(bundle)
    wrong = replace(told, programs=tuple(map(change, told.programs)))
    (other / "cuda" / "programs.json").write_bytes(wrong.to_json())
    with pytest.raises(BundleError, match=words):  # a bundle whose sizes and hashes agree with it, as somebody may make
        programs_of(dataclasses.replace(bundle, path=other))
