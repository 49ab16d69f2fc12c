"""`vdq-export compile`, with the real offline compiler of onnxruntime-qnn and its emulator."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import msgspec
import onnx
import pytest
from click.testing import CliRunner
from onnx import ModelProto, TensorProto, helper

from tests import qnn_cases, tiny_bundle
from tests.commands import assert_one_line, command, finish, start
from vdq_export import ort
from vdq_export.bundle import Bundle
from vdq_export.commands.compile import compile_command
from vdq_export.devices import qnn_provider
from vdq_export.errors import BundleError, CompileError, OffDeviceError, UnknownNameError
from vdq_export.graph import Graph
from vdq_export.inspect import bundle_graphs
from vdq_export.metrics import sqnr_db
from vdq_export.targets.qnn import hexagon, offline
from vdq_export.targets.qnn.contexts import CompileReport, compile_bundle

needs_tool = pytest.mark.skipif(not qnn_provider.available(), reason="onnxruntime-qnn is not installed")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qnn_cases.write(tmp_path_factory.mktemp("pristine") / "bundle").path


@pytest.fixture
def bundle(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "bundle"))


@pytest.fixture(scope="module")
def compiled(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, CompileReport]:
    """Two architectures by the real command, bins unshared, so that the emulator can load the result."""
    folder = tmp_path_factory.mktemp("compiled")
    place = Path(shutil.copytree(pristine, folder / "bundle"))
    code, out, err = command("compile", place, "--arch", "v75", "--arch", "v79", "--unshared", "--json", cwd=folder)
    assert (code, err) == (0, "")
    return place, msgspec.json.decode(out, type=CompileReport)


@needs_tool
def test_every_graph_is_compiled_for_every_architecture(compiled: tuple[Path, CompileReport]) -> None:
    place, report = compiled
    bundle = Bundle.open(place)
    assert [one.arch for one in report.contexts] == ["v75", "v79"]
    for one in report.contexts:
        assert [graph.graph for graph in one.graphs] == list(bundle.schedule.graphs)
        files = {path for graph in one.graphs for path in (graph.model, *graph.binaries)}
        assert files == {e.path for e in bundle.manifest.files if e.path.startswith(f"contexts/{one.arch}/")}
        assert one.binary_bytes == sum((place / p).stat().st_size for p in files if p.endswith(".bin"))
        assert one.binary_bytes > 2 * 4 * 2 * qnn_cases.WIDTH**2, "each bin has its weights"
        assert one.peak_memory_bytes > 50 * 2**20
        assert all(graph.nodes > 30 and graph.seconds > 0 for graph in one.graphs)
    assert (place / "report/compile.json").read_bytes() == report.to_json()
    assert not list(place.parent.glob("bundle.partial-*"))
    assert list(bundle_graphs(bundle)) == ["bin00", "bin01"]


@needs_tool
@pytest.mark.parametrize("arch", ["v75", "v79"])
def test_contexts_compute_what_the_graph_does(compiled: tuple[Path, CompileReport], arch: str) -> None:
    place, report = compiled
    _, feeds = qnn_cases.blocks(2)
    (one,) = (found for found in report.contexts if found.arch == arch)
    session = hexagon.strict_session(place / one.graphs[0].model, hexagon.provider_options(arch), {})
    (made,) = session.run(None, feeds)
    (expected,) = ort.run(Graph.load(place / one.graphs[0].graph), feeds, exact=True).values()
    assert sqnr_db(expected, made) > 50  # 16-bit activations: one rounding step is 90 dB down, each operator adds some


@needs_tool
def test_bins_share_their_weights(bundle: Path, compiled: tuple[Path, CompileReport]) -> None:
    _, report = compile_bundle(Bundle.open(bundle), ["v75"])
    (one,) = report.contexts
    assert len({path for graph in one.graphs for path in graph.binaries}) == 1
    assert one.binary_bytes < 0.9 * compiled[1].contexts[0].binary_bytes
    Bundle.open(bundle)


@needs_tool
def test_parts_are_one_model_that_computes_the_same(bundle: Path) -> None:
    _, report = compile_bundle(Bundle.open(bundle), ["v75"], shared=False, parts=2)
    graph = report.contexts[0].graphs[0]
    assert (report.contexts[0].parts, len(graph.binaries)) == (2, 2)
    assert graph.boundaries == ("embed/Mul/Q", "blocks.0/Add_1/Q")
    _, feeds = qnn_cases.blocks(2)
    session = hexagon.strict_session(bundle / graph.model, hexagon.provider_options("v75"), {})
    (made,) = session.run(None, feeds)
    (expected,) = ort.run(Graph.load(bundle / graph.graph), feeds, exact=True).values()
    assert sqnr_db(expected, made) > 50


def test_auto_does_not_cut_for_nodes_that_no_cut_helps(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refuse(job: offline.Job, folder: Path) -> offline.Result:
        asked.append(job)
        raise OffDeviceError("2 nodes do not run on the HTP: NonZero a, NonZero b")

    monkeypatch.setattr("vdq_export.targets.qnn.contexts.compile_offline", refuse)
    with pytest.raises(OffDeviceError, match=r"body.bin00.* for v75: 2 nodes"):
        compile_bundle(Bundle.open(bundle), ["v75"], parts="auto")
    assert len(asked) == 1
    assert not (bundle / "contexts").exists()


@needs_tool
def test_auto_takes_the_fewest_parts_that_compile(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, asked = offline.compile_offline, []

    def limited(job: offline.Job, folder: Path) -> offline.Result:
        """A compiler whose limit the whole graph exceeds."""
        asked.append(job)
        if "part" not in job.tasks[0].source:
            raise CompileError("Failed to finalize QNN graph")
        return real(job, folder)

    monkeypatch.setattr("vdq_export.targets.qnn.contexts.compile_offline", limited)
    _, report = compile_bundle(Bundle.open(bundle), ["v75"], parts="auto")
    assert report.contexts[0].parts == 2
    assert len(asked) == 3  # the whole, then each part with both bins in one process
    assert {path.name for path in (bundle / "contexts/v75").glob("*.onnx")} == {
        "body.bin00_ctx.onnx",
        "body.bin01_ctx.onnx",
    }
    Bundle.open(bundle)


@needs_tool
def test_a_second_compile_needs_force(compiled: tuple[Path, CompileReport]) -> None:
    place, _ = compiled
    before = tiny_bundle.files(place)
    assert_one_line(command("compile", place, "--arch", "v75", cwd=place.parent), "v75", "--force")
    assert tiny_bundle.files(place) == before


@needs_tool
def test_force_replaces_and_keeps_other_architectures(bundle: Path) -> None:
    compile_bundle(Bundle.open(bundle), ["v75"], shared=False)
    compile_bundle(Bundle.open(bundle), ["v73"])
    _, report = compile_bundle(Bundle.open(bundle), ["v75"], force=True)
    assert [(one.arch, one.shared) for one in report.contexts] == [("v73", True), ("v75", True)]
    listed = {e.path for e in Bundle.open(bundle).manifest.files if e.path.startswith("contexts/")}
    assert {f"contexts/{p.relative_to(bundle / 'contexts')}" for p in (bundle / "contexts").rglob("*.*")} == listed
    assert len(listed) == 2 * 3  # two models, one binary


@needs_tool
def test_nodes_that_stay_behind_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    place = qnn_cases.write(tmp_path / "bundle", graphs=(with_einsum(),)).path
    before = tiny_bundle.files(place)
    assert_one_line(command("compile", place, "--arch", "v75", cwd=tmp_path), "body.bin00.onnx", "unfold/Einsum")
    assert tiny_bundle.files(place) == before
    assert tiny_bundle.names(tmp_path) == ["bundle"]


def with_einsum() -> ModelProto:
    """An operator that the HTP does not have, before one that it has."""
    nodes = [
        helper.make_node("Einsum", ["hidden_states"], ["turned"], "unfold/Einsum", equation="ij->ji"),
        helper.make_node("Add", ["turned", "timestep"], ["sample"], "out/Add"),
    ]
    floats, names = TensorProto.FLOAT, ("hidden_states", "timestep", "sample")
    ends = [helper.make_tensor_value_info(name, floats, [8, 8]) for name in names]
    graph = helper.make_graph(nodes, "einsum", ends[:2], ends[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    return onnx.shape_inference.infer_shapes(model)


@pytest.mark.parametrize("arch", ["v99", "75", "v68", ""])
def test_unknown_architectures_are_refused(pristine: Path, arch: str) -> None:
    with pytest.raises(UnknownNameError, match=f"unknown HTP architecture '{arch}'"):
        compile_bundle(Bundle.open(pristine), ["v75", arch])


def test_an_unknown_architecture_is_one_line(pristine: Path) -> None:
    assert_one_line(command("compile", pristine, "--arch", "v76", cwd=pristine.parent), "HTP architecture", "v75")


def test_bundles_of_other_targets_are_refused(tmp_path: Path) -> None:
    bundle = qnn_cases.write(tmp_path / "bundle", target="ort-int8")
    with pytest.raises(BundleError, match=r"made for ort-int8.*--target qnn"):
        compile_bundle(bundle, ["v75"])


@pytest.mark.parametrize("parts", ["0", "-1", "some"])
def test_parts_are_a_number_or_auto(pristine: Path, parts: str) -> None:
    done = CliRunner().invoke(compile_command, [str(pristine), "--arch", "v75", f"--parts={parts}"])
    assert done.exit_code == 2
    assert "--parts" in done.output


def test_without_the_tool_it_says_what_to_install(bundle: Path) -> None:
    hide = "import sys; sys.modules['onnxruntime_qnn'] = None"
    done = finish(start("compile", bundle, "--arch", "v75", cwd=bundle.parent, code=hide))
    assert_one_line(done, "onnxruntime-qnn is not installed", "vdq-export[qnn]")


@pytest.mark.parametrize(("code", "words"), [(-9, "SIGKILL.*too little memory"), (-11, "SIGSEGV"), (3, "code 3: last")])
def test_a_compiler_that_dies_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    def die(*_: object, **__: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], code, "", "first\nlast\n")

    monkeypatch.setattr(subprocess, "run", die)
    with pytest.raises(CompileError, match=words):
        offline.compile_offline(offline.Job(arch="v75", soc_model=57, tasks=()), tmp_path)
