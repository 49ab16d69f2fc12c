"""A bundle whose parts do not fit together does not open, and says which value is in the way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save

from tests import tiny_bundle
from tests.hoisted_bundle import STEPS, Kind, write
from vdq_export.bundle import Bundle
from vdq_export.commands.inspect import inspect_command
from vdq_export.errors import BundleError
from vdq_export.inspect import summarize


def put(folder: Path, path: str, data: bytes | None) -> None:
    """Replace a file and its entry in the manifest; None: take both away."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    manifest["files"] = [one for one in manifest["files"] if one["path"] != path]
    (folder / path).unlink()
    if data is not None:
        (folder / path).write_bytes(data)
        manifest["files"].append({"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()})
    (folder / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


def of_graph(path: str, change: Callable[[onnx.GraphProto], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        model = onnx.load(folder / path, load_external_data=False)
        change(model.graph)
        put(folder, path, model.SerializeToString())

    return edit


def of_schedule(**change: Any) -> Callable[[Path], None]:
    """Change the schedule's first entry of parts."""

    def edit(folder: Path) -> None:
        schedule = json.loads((folder / "schedule.json").read_bytes())
        schedule["hoisted"][0] |= change
        put(folder, "schedule.json", json.dumps(schedule).encode())

    return edit


def of_tables(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        tables = load_file(folder / "tables/high.safetensors")
        change(tables)
        put(folder, "tables/high.safetensors", save(tables))

    return edit


def one_row_less(tables: dict[str, Any]) -> None:
    tables["time/Add"] = tables["time/Add"][1:].copy()


def another_shape(tables: dict[str, Any]) -> None:
    tables["time/Add"] = tables["time/Add"].reshape(len(STEPS), 8, 1, 1)


def another_value(tables: dict[str, Any]) -> None:
    tables["more"] = np.zeros((len(STEPS), 1), np.float32)


def rename(graph: onnx.GraphProto) -> None:
    next(value for value in graph.input if value.name == "masked").name = "unknown"


def reshape(graph: onnx.GraphProto) -> None:
    next(value for value in graph.input if value.name == "masked").type.tensor_type.shape.dim[1].dim_value = 5


def retype(graph: onnx.GraphProto) -> None:
    graph.input[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT16


def wants(name: str) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        graph.input.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]))

    return change


def gives(name: str) -> Callable[[onnx.GraphProto], None]:
    def change(graph: onnx.GraphProto) -> None:
        graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 1, 8]))

    return change


BODY, PROMPT, TABLES = "graphs/body.bin00.onnx", "graphs/prompt.high.onnx", "tables/high.safetensors"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (of_schedule(prompt="graphs/none.onnx"), r"graph 'graphs/none\.onnx' is not in the bundle"),
        (of_schedule(prompt="schedule.json"), r"'schedule\.json' is no \.onnx file"),
        (of_schedule(tables="tables/none.safetensors"), r"'tables/none\.safetensors' is not in the bundle"),
        (of_schedule(tables="graphs/prompt.high.onnx"), r"prompt\.high\.onnx: no tables"),
        (of_schedule(timesteps=[]), r"the timesteps of 'tables/high\.safetensors' do not fall"),
        (of_schedule(timesteps=list(STEPS[::-1])), r"do not fall from row to row"),
        (of_schedule(timesteps=list(STEPS[:-1])), r"time/Add has 8 rows for 7 timesteps"),
        (of_schedule(prompt=""), r"mixed\.high\.onnx: nothing gives its input pooled"),
        (of_schedule(mixed=""), r"body\.bin00\.onnx: nothing gives its input modulation/Add"),
        (of_schedule(step="", tables="", timesteps=[]), r"mixed\.high\.onnx: nothing gives its input time/Add"),
        (of_schedule(step=PROMPT), r"prompt\.high\.onnx: it takes \w+, which this part must not depend on"),
        (of_schedule(bins=[0]), r"body\.bin01\.onnx: nothing gives its input"),
        (of_tables(one_row_less), r"time/Add has 7 rows for 8 timesteps"),
        (of_tables(another_shape), r"high\.safetensors: time/Add is not as graphs/step\.high\.onnx gives it"),
        (of_tables(another_value), r"high\.safetensors: more is not as graphs/step\.high\.onnx gives it"),
        (of_graph(BODY, rename), r"body\.bin00\.onnx: nothing gives its input unknown"),
        (of_graph(BODY, reshape), r"it takes masked as float32\[1,5,8\], and is given float32\[1,4,8\]"),
        (of_graph(PROMPT, retype), r"it takes \w+ as float16\[.*\], and is given float32\[.*\]"),
        (of_graph(PROMPT, wants("timestep")), r"it takes timestep, which this part must not depend on"),
        (of_graph(PROMPT, gives("time/Add")), r"step\.high\.onnx: time/Add comes from graphs/prompt\.high\.onnx too"),
        (of_graph(PROMPT, gives("mask")), r"prompt\.high\.onnx: mask is an input of the model already"),
        (of_graph("graphs/probe.low.onnx", wants("other")), r"probe\.low\.onnx: nothing gives its input other"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, edit: Callable[[Path], None], message: str) -> None:
    folder = write(tmp_path / "out", Kind(with_probe=True)).path
    edit(folder)
    with pytest.raises(BundleError, match=message):
        Bundle.open(folder)


def test_without_parts_every_graph_takes_inputs_of_the_model(tmp_path: Path) -> None:
    folder = tiny_bundle.write(tmp_path / "out").path
    of_graph(BODY, wants("x"))(folder)
    with pytest.raises(BundleError, match=r"body\.bin00\.onnx: nothing gives its input x"):
        Bundle.open(folder)


def test_tables_alone_will_do(tmp_path: Path) -> None:
    bundle = write(tmp_path / "out", Kind(step=False))
    assert bundle.schedule.hoisted[0].step == ""
    assert Bundle.open(bundle.path).schedule == bundle.schedule


def test_inspect_lists_the_parts(tmp_path: Path) -> None:
    path = write(tmp_path / "out").path
    summary = summarize(path)
    names = [graph.name for graph in summary.graphs]
    assert names[:4] == ["bin00", "bin01", "bin02", "bin03"]
    assert {f"graphs/{part}.{expert}.onnx" for part in ("prompt", "step", "mixed") for expert in ("high", "low")} == (
        set(names[4:])
    )
    high, low = summary.ahead
    assert (high.bins, high.rows, high.values) == ((0, 1), 8, 1) and low.bins == (2, 3)
    assert high.table_bytes == (path / TABLES).stat().st_size
    printed = " ".join(CliRunner().invoke(inspect_command, [str(path)]).output.split())
    assert "ahead of bin00, bin01: graphs/prompt.high.onnx, graphs/step.high.onnx, graphs/mixed.high.onnx, " in printed
    assert "tables/high.safetensors (8 rows of 1 values, " in printed
    assert json.loads(CliRunner().invoke(inspect_command, [str(path), "--json"]).output)["ahead"][0]["rows"] == 8
