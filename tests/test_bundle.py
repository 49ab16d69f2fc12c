"""What a bundle holds, and that nothing in one is trusted unchecked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import jsonschema
import ml_dtypes
import msgspec
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from tests.tiny_bundle import WEIGHT, bins, files, fill, graph, names, write
from vdq_export import schemas
from vdq_export.bundle import Bundle, hash_file
from vdq_export.bundle_writer import BundleWriter, signature_of
from vdq_export.errors import BundleError, VdqError
from vdq_export.plan import QuantPlan
from vdq_export.recipe import Recipe
from vdq_export.report.data import JudgeScores, KernelCount, LayerQuality, VerifyReport
from vdq_export.weights.store import PAGE, WeightStore

WEIGHTS = "graphs/weights/weights.bin"
REPORT = VerifyReport(
    verdict="pass",
    bundle_bytes=1,
    integer_kernels=KernelCount(planned=2, executed=2),
    judge=JudgeScores(float_={"digit": 1.0}, quantized={"digit": 0.9}),
    layers=(LayerQuality(layer="blocks.0", bin=0, sqnr_db=40.0, worst_step=999.0),),
)
PLAN = QuantPlan(
    model="tiny",
    graph_hash="0",
    target="test",
    recipe=Recipe(name="r", summary=""),
    bins=tuple(bins()),
    layers=(),
    bins_why="",
)


# -- what a bundle is ------------------------------------------------------------------------------------------------


def test_layout_and_round_trip(tmp_path: Path) -> None:
    made = write(tmp_path / "out")
    opened = Bundle.open(tmp_path / "out")
    assert opened == made
    graphs = [f"graphs/body.bin0{i}.onnx" for i in range(4)]
    assert sorted(files(tmp_path / "out")) == sorted([*graphs, WEIGHTS, "manifest.json", "schedule.json"])
    assert names(tmp_path) == ["out"]
    assert opened.manifest.model.config["in_channels"] == 4
    assert opened.graph_path(2) == tmp_path / "out" / graphs[2] == opened.graph_path(bins()[2])
    assert opened.size == sum(len(data) for name, data in files(tmp_path / "out").items() if name != "manifest.json")


def test_weights_are_stored_once_however_many_graphs_use_them(tmp_path: Path) -> None:
    made = write(tmp_path / "out")
    assert (made.path / WEIGHTS).read_bytes() == WEIGHT.tobytes()


def test_same_input_same_bytes(tmp_path: Path) -> None:
    write(tmp_path / "a")
    write(tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_other_tools_read_the_graphs_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "out").graph_path(1)
    onnx.checker.check_model(str(path), full_check=True)
    loaded = onnx.load(path)
    assert np.array_equal(onnx.numpy_helper.to_array(loaded.graph.initializer[0]), WEIGHT)
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    x = np.ones((1, 4, 64), np.float32)
    feeds = {"hidden_states": x, "timestep": np.zeros(1, np.float32), "encoder_hidden_states": 0 * x}
    np.testing.assert_allclose(session.run(None, feeds)[0], 2 * x @ WEIGHT, rtol=1e-5, atol=1e-4)


def test_external_data_beside_the_graphs_folder_is_still_refused_by_onnxruntime(tmp_path: Path) -> None:
    """Why weights/ lies below graphs/. When this fails, the store may move to the root of the bundle."""
    path = write(tmp_path / "out").graph_path(0)
    shutil.copytree(path.parent / "weights", tmp_path / "out" / "weights")
    model = onnx.load(tmp_path / "out" / "graphs" / "body.bin01.onnx", load_external_data=False)
    model.graph.initializer[0].external_data[0].value = "../weights/weights.bin"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(Exception, match="escapes model directory"):
        ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])


# -- weight store ----------------------------------------------------------------------------------------------------


def test_store_finds_equal_content_and_keeps_types_apart(tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "w.bin", "w.bin")
    first = store.put(WEIGHT, TensorProto.FLOAT)
    assert store.put(WEIGHT, TensorProto.FLOAT) is first  # by identity
    assert store.put(WEIGHT.copy(), TensorProto.FLOAT) is first  # by content
    assert store.put(WEIGHT.reshape(32, 128), TensorProto.FLOAT) != first
    assert store.put(WEIGHT.view(np.int32), TensorProto.INT32) != first
    size, digest = store.close()
    assert size == 3 * WEIGHT.nbytes == (tmp_path / "w.bin").stat().st_size
    assert digest == hash_file(tmp_path / "w.bin")


def test_store_does_not_mistake_a_recycled_identity(tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "w.bin", "w.bin")
    places = [store.put(np.full((64, 64), i, np.float32), TensorProto.FLOAT) for i in range(50)]
    assert len(set(places)) == 50
    store.close()


def test_large_tensors_start_on_a_page(tmp_path: Path) -> None:
    store = WeightStore(tmp_path / "w.bin", "w.bin")
    store.put(np.ones(300, np.float32), TensorProto.FLOAT)
    large = np.arange(64 * 1024, dtype=np.float32)
    stored = store.put(large, TensorProto.FLOAT)
    size, digest = store.close()
    assert stored.offset == PAGE
    data = (tmp_path / "w.bin").read_bytes()
    assert data[stored.offset : stored.offset + stored.length] == large.tobytes()
    assert (size, digest) == (len(data), hash_file(tmp_path / "w.bin"))


def test_mapped_and_transposed_arrays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vdq_export.weights.store.CHUNK_BYTES", 1000)  # several pieces, the last one short
    (tmp_path / "source").write_bytes(WEIGHT.tobytes())
    mapped = np.memmap(tmp_path / "source", np.float32, "r", shape=(64, 64)).T
    store = WeightStore(tmp_path / "w.bin", "w.bin")
    store.put(mapped, TensorProto.FLOAT)
    store.close()
    assert (tmp_path / "w.bin").read_bytes() == np.ascontiguousarray(WEIGHT.T).tobytes()


@pytest.mark.parametrize("shape", [(64, 64), (63, 65), (3, 5)])  # even rows; odd rows share bytes; small: inline
@pytest.mark.parametrize("kind", ["int4", "uint4"])
def test_four_bit_weights_are_packed(tmp_path: Path, shape: tuple[int, int], kind: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, kind))
    values = np.random.default_rng(1).integers(0, 7, shape).astype(dtype)
    if kind == "int4":
        values[0, 0] = -8
    placeholder = TensorProto(name="W", dims=shape, data_location=TensorProto.EXTERNAL)
    placeholder.data_type = helper.np_dtype_to_tensor_dtype(dtype)
    nodes = [helper.make_node("DequantizeLinear", ["W", "s"], ["y"])]
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)
    made = helper.make_graph(nodes, "g", [], [out], [placeholder, helper.make_tensor("s", 1, [], [0.5])])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    store = WeightStore(tmp_path / "w.bin", "w.bin")
    store.externalise(model, {"W": values})
    store.close()
    onnx.save(model, tmp_path / "g.onnx")
    onnx.checker.check_model(str(tmp_path / "g.onnx"))
    result = ort.InferenceSession(str(tmp_path / "g.onnx"), providers=["CPUExecutionProvider"]).run(None, {})[0]
    assert np.array_equal(result, values.astype(np.float32) * 0.5)


def test_embedded_large_constants_move_out_and_small_ones_stay(tmp_path: Path) -> None:
    model, arrays = graph(1.0)
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(arrays["W"], "W"))
    store = WeightStore(tmp_path / "w.bin", "w.bin")
    store.externalise(model, {})
    assert store.close()[0] == WEIGHT.nbytes
    assert [t.data_location == TensorProto.EXTERNAL for t in model.graph.initializer] == [True, False, False]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "no data"),
        ({"W": WEIGHT[:32]}, "its data .32, 64."),
        ({"W": WEIGHT.astype(np.float64)}, "its data float64"),
    ],
)
def test_wrong_weights_are_refused(tmp_path: Path, data: dict[str, np.ndarray], message: str) -> None:
    with (
        pytest.raises(BundleError, match=f"initializer 'W'.*{message}|{message}.*'W'"),
        BundleWriter(tmp_path / "o") as w,
    ):
        w.add_graph("body", graph(1.0)[0], data)
    assert names(tmp_path) == []


def test_dynamic_shapes_have_no_signature() -> None:
    model, _ = graph(1.0)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    with pytest.raises(BundleError, match="'hidden_states' is not static"):
        signature_of(model, "timestep")


# -- nothing is trusted ----------------------------------------------------------------------------------------------


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink])
@pytest.mark.parametrize("name", [WEIGHTS, "graphs/body.bin02.onnx", "schedule.json"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str, damage: Callable[[Path], None]) -> None:
    write(tmp_path / "out")
    damage(tmp_path / "out" / name)
    with pytest.raises(BundleError, match=name.replace(".", r"\.")):
        Bundle.open(tmp_path / "out")


def edit_manifest(out: Path, change: Callable[[dict[str, object]], object]) -> None:
    manifest = json.loads((out / "manifest.json").read_text())
    change(manifest)
    (out / "manifest.json").write_text(json.dumps(manifest))


def rewrite(out: Path, name: str, data: bytes) -> None:
    """Change a file and let the manifest agree, as an attacker would."""
    (out / name).write_bytes(data)
    entry = {"path": name, "size": len(data), "sha256": hash_file(out / name)}
    edit_manifest(out, lambda m: m.update(files=[entry if f["path"] == name else f for f in m["files"]]))  # type: ignore


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m.update(format=2), "bundle format 2 is unknown"),
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m.pop("signature"), "signature"),
        (lambda m: m["files"][0].update(path="../outside"), r"'\.\./outside' is not a path inside"),
        (lambda m: m["files"][0].update(path="/etc/hostname"), "is not a path inside"),
        (lambda m: m["files"][0].update(path="C:\\x"), "is not a path inside"),
        (lambda m: m["files"][0].update(path="graphs/./a"), "is not a path inside"),
        (lambda m: m["files"].append(m["files"][0]), "twice"),
        (lambda m: m["files"].pop(), "lists no schedule"),
        (lambda m: m["files"].pop(0), r"body\.bin00\.onnx' is not in the bundle"),
    ],
)
def test_a_manifest_that_lies_is_refused(tmp_path: Path, change: Callable[[dict], object], message: str) -> None:
    write(tmp_path / "out")
    edit_manifest(tmp_path / "out", change)
    with pytest.raises(BundleError, match=message):
        Bundle.open(tmp_path / "out")


@pytest.mark.parametrize(
    "location", ["../../secret", "/etc/hostname", "weights/../../../secret", "weights/other.bin", ""]
)
def test_external_data_that_leaves_the_bundle_is_refused(tmp_path: Path, location: str) -> None:
    (tmp_path / "secret").write_bytes(WEIGHT.tobytes())
    out = write(tmp_path / "out").path
    model = onnx.load(out / "graphs/body.bin00.onnx", load_external_data=False)
    model.graph.initializer[0].external_data[0].value = location
    rewrite(out, "graphs/body.bin00.onnx", model.SerializeToString())
    with pytest.raises(BundleError, match=r"body\.bin00\.onnx, initializer W"):
        Bundle.open(out)


@pytest.mark.parametrize(("field", "value"), [(1, "16"), (1, "-1"), (2, "99999999"), (2, "x")])
def test_external_data_past_the_end_is_refused(tmp_path: Path, field: int, value: str) -> None:
    out = write(tmp_path / "out").path
    model = onnx.load(out / "graphs/body.bin00.onnx", load_external_data=False)
    model.graph.initializer[0].external_data[field].value = value
    rewrite(out, "graphs/body.bin00.onnx", model.SerializeToString())
    with pytest.raises(BundleError, match="points outside"):
        Bundle.open(out)


def test_external_data_hidden_in_a_subgraph_is_refused(tmp_path: Path) -> None:
    out = write(tmp_path / "out").path
    model = onnx.load(out / "graphs/body.bin00.onnx", load_external_data=False)
    inner = helper.make_graph([], "inner", [], [], [model.graph.initializer[0]])
    inner.initializer[0].external_data[0].value = "../../secret"
    model.graph.node.append(helper.make_node("If", ["c"], ["z"], then_branch=inner, else_branch=inner))
    rewrite(out, "graphs/body.bin00.onnx", model.SerializeToString())
    with pytest.raises(BundleError, match="not a path inside"):
        Bundle.open(out)


def test_links_are_refused(tmp_path: Path) -> None:
    out = write(tmp_path / "out").path
    (out / WEIGHTS).rename(tmp_path / "elsewhere")
    (out / WEIGHTS).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="is a link"):
        Bundle.open(out)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '"x"', '{"kind": "vdq-export bundle"}'])
def test_garbage_is_no_manifest(tmp_path: Path, text: str) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(BundleError, match="no manifest of a bundle"):
        Bundle.open(tmp_path)


def test_garbage_is_no_graph(tmp_path: Path) -> None:
    out = write(tmp_path / "out").path
    rewrite(out, "graphs/body.bin00.onnx", b"\xff" * 40)
    with pytest.raises(BundleError, match="not an ONNX model"):
        Bundle.open(out)


def test_no_bundle_at_all(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(BundleError, match="is not a bundle"):
            Bundle.open(place)


# -- reports, schemas ------------------------------------------------------------------------------------------------


def test_reports_can_be_attached_and_nothing_else(tmp_path: Path) -> None:
    made = write(tmp_path / "out")
    assert made.report is None
    assert made.attach("report/report.json", REPORT.to_json()).report == REPORT
    later = msgspec.structs.replace(REPORT, verdict="fail")
    Bundle.open(made.path).attach("report/report.json", later.to_json())
    assert Bundle.open(made.path).report == later
    with pytest.raises(BundleError, match="cannot be changed"):
        made.attach("graphs/body.bin00.onnx", b"")


def test_a_report_holds_numbers_json_can_hold() -> None:
    with pytest.raises(BundleError, match="sqnr_db"):
        msgspec.structs.replace(
            REPORT, layers=(msgspec.structs.replace(REPORT.layers[0], sqnr_db=float("inf")),)
        ).to_json()


def test_settings_may_be_numpy_scalars_but_not_objects(tmp_path: Path) -> None:
    made = write(tmp_path / "a")
    settings = {"shift": np.float32(3), "sigmas": np.ones(2), "order": {"b": 1, "a": np.int64(2)}}
    data = msgspec.structs.replace(made.schedule, sampler=settings).to_json()
    assert json.loads(data)["sampler"] == {"shift": 3.0, "sigmas": [1.0, 1.0], "order": {"b": 1, "a": 2}}
    assert data.index(b'"a"') < data.index(b'"b"')
    for bad in (object(), {"x": {1, object()}}):
        with pytest.raises(BundleError, match=r"schedule\.json cannot be written"):
            msgspec.structs.replace(made.schedule, sampler={"bad": bad}).to_json()


@pytest.mark.parametrize("name", schemas.TYPES)
def test_committed_schemas_are_current(name: str) -> None:
    committed = Path(schemas.__file__).parent / f"{name}.schema.json"
    assert committed.read_bytes() == schemas.render(name), "run `python -m vdq_export.schemas`"


def test_files_fit_their_schemas(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "out") as writer:
        made = fill(writer)
    made.attach("report/report.json", REPORT.to_json())
    written = {
        "manifest": (made.path / "manifest.json").read_bytes(),
        "schedule": (made.path / "schedule.json").read_bytes(),
        "report": (made.path / "report/report.json").read_bytes(),
        "plan": PLAN.to_json(),
    }
    for name, data in written.items():
        checker = jsonschema.Draft202012Validator(schemas.schema(name))
        checker.validate(json.loads(data))
        assert not checker.is_valid({**json.loads(data), "unknown": 1})


def test_the_plan_travels_with_the_bundle(tmp_path: Path) -> None:
    source = write(tmp_path / "a")
    with BundleWriter(tmp_path / "b") as writer:
        for one in bins():
            writer.add_graph(f"body.{one.name}", *graph(1.0))
        writer.add_file("handoff/note.txt", b"hello")
        writer.file("tables/t.bin").write_bytes(b"table")
        made = writer.commit(source.manifest, source.schedule, [PLAN], REPORT)
    assert (made.plan, made.report) == (PLAN, REPORT)
    assert {"handoff/note.txt", "tables/t.bin", "plan.json"} <= {entry.path for entry in made.manifest.files}
    _flip(made.path / "tables/t.bin")
    with pytest.raises(VdqError, match=r"t\.bin"):
        Bundle.open(made.path)


def test_hashes_are_checked_unless_told_otherwise(tmp_path: Path) -> None:
    made = write(tmp_path / "out")
    _flip(made.path / WEIGHTS)
    assert Bundle.open(made.path, verify_hashes=False) == made
    with pytest.raises(BundleError, match="sha256"):
        Bundle.open(made.path)
