"""Whole graphs lowered to torch: values, node by node and at the end; types; weights; what is refused."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto
from torch import fx

from tests import cuda_reference, tiny_bundle
from tests.bin_feeds import bin_feeds
from tests.cuda_blocks import FP8, INT4, INT8, Block
from tests.cuda_models import model_of, only, op, stream, tensors
from vdq_export.errors import CompileError, MissingToolError, ModelError
from vdq_export.graph import Array, Graph
from vdq_export.metrics import sqnr_db
from vdq_export.targets.cuda import fuse, fused_ops
from vdq_export.targets.cuda.lower import lower
from vdq_export.targets.cuda.program import Program
from vdq_export.targets.cuda.rules import RULES

FORMATS = {
    "int8": Block(INT8),
    "int8 smoothed": Block(INT8, smooth=True),
    "int4, low rank": Block(INT4, ("uint8", 4), rank=4),
    "int4 rotated": Block(INT4, ("uint8", 4), rotate=True),
    "fp8": Block(FP8, ("float8e4m3fn", 8)),
    "weights only": Block(INT4, ("float", 16)),
    "attention": Block(INT8, attention="q k v"),
}


@cache
def built(name: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """The graph of both bins of a format, of standard operators and fused."""
    merged, _ = FORMATS[name].merged()
    plain = merged.to_proto()
    fuse.run(merged)
    return plain, merged.to_proto()


def session(model: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    return ort.InferenceSession(model.SerializeToString(), options)


def every_value(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
    """What onnxruntime computes on the way, of the types that it gives out."""
    whole = onnx.shape_inference.infer_shapes(model)
    have = {one.name for one in whole.graph.output}
    for one in list(whole.graph.value_info):
        if one.name not in have and one.type.tensor_type.elem_type != TensorProto.FLOAT8E4M3FN:
            whole.graph.output.append(one)
    names = [one.name for one in whole.graph.output]
    return dict(zip(names, session(whole).run(names, dict(feeds)), strict=True))


class Forced(fx.Interpreter):
    """Runs a program on onnxruntime's values: each node is judged by its own error, whatever came before."""

    def __init__(self, program: Program, expected: Mapping[str, Array]) -> None:
        super().__init__(program.module)
        self.expected, self.errors = expected, dict[str, float]()

    def run_node(self, n: fx.Node) -> Any:
        found = super().run_node(n)
        name = n.meta.get("onnx", "")
        if name not in self.expected:
            return found
        want = self.expected[name]
        assert tuple(found.shape) == want.shape
        error = np.abs(found.double().numpy() - want.astype(np.float64)).max(initial=0)
        self.errors[name] = float(error / max(np.abs(want).max(initial=0), 1e-20))
        return torch.from_numpy(want).to(found.dtype)


def forced(model: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, float]:
    """{value: relative error of the node that computes it}"""
    program = lower(model, dtype=torch.float32)
    runner = Forced(program, every_value(model, feeds))
    with torch.no_grad():
        runner.run(*[tensors(feeds)[one.name] for one in program.inputs])
    return runner.errors


# -- values ----------------------------------------------------------------------------------------------------------


def test_a_float_graph_is_what_onnxruntime_computes(traced: Graph, tiny_feeds: Mapping[str, Array]) -> None:
    model = traced.to_proto()
    expected = session(model).run(None, dict(tiny_feeds))[0]
    found = only(lower(model, dtype=torch.float32)(tensors(tiny_feeds))).numpy()
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
    errors = forced(model, tiny_feeds)
    assert len(errors) > 100
    assert max(errors.values()) <= 1e-6


@pytest.mark.parametrize("name", FORMATS)
def test_each_node_of_a_quantized_graph_is(name: str) -> None:
    """Codes too, to the last one: they are given the same floats."""
    block = FORMATS[name]
    errors = forced(block.graphs()[0].to_proto(), block.feeds)
    assert len(errors) > 40
    assert max(errors.values()) <= 1e-6


@pytest.mark.parametrize("op", ["QuantizeLinear", "LayerNormalization", "com.microsoft.MultiHeadAttention", "MatMul"])
def test_a_node_that_is_wrong_is_seen(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = RULES[op]

    def wrong(*arguments: Any, **attributes: Any) -> Any:
        found = rule.run(*arguments, **attributes)
        return found * (1 + 1e-4) if found.is_floating_point() else found ^ 1

    monkeypatch.setitem(RULES, op, type(rule)(wrong, rule.kind, rule.static, rule.scalars, rule.exact))
    block = FORMATS["int8"]
    assert max(forced(block.graphs()[0].to_proto(), block.feeds).values()) > 5e-5


def fused_distance(name: str) -> tuple[float, float]:
    """SQNR in dB of the fused program beside the operators' definitions, of the bin that is worse; and beside those of
    the other bin."""
    block, (_, model) = FORMATS[name], built(name)
    program = lower(model, dtype=torch.float32)
    found, expected = [], []
    for row in range(2):
        feeds = {**block.feeds, "bin": np.array([row])}
        feeds = {one.name: feeds[one.name] for one in program.inputs}
        found.append(only(program(tensors(feeds))).numpy())
        expected.append(only(cuda_reference.run(model, feeds)))
    own = min(sqnr_db(want, got) for want, got in zip(expected, found, strict=True))
    return own, sqnr_db(expected[0], found[1])


@pytest.mark.parametrize("name", FORMATS)
def test_a_fused_graph_is_what_its_operators_say(name: str) -> None:
    """Numpy's float64 beside float32 may put a value that lies on an edge into the next code, one of some thousand."""
    assert "vdq.cuda" in {node.domain for node in built(name)[1].graph.node}
    own, other = fused_distance(name)
    assert own >= 45
    if name != "weights only":
        assert other < 40


@pytest.mark.parametrize("name", ["int8 smoothed", "int4, low rank", "int4 rotated", "fp8", "attention"])
def test_the_kernels_compute_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole block in Triton's interpreter: each kernel has what its launch is given, strides and absent operands.

    Attention over E4M3 values rounds its probabilities to E4M3 too, up to 6 % each, which the definition does not.
    """
    monkeypatch.setenv("VDQ_KERNELS", "triton")
    assert fused_distance(name)[0] >= (30 if name == "attention" else 45)


@pytest.mark.parametrize(
    ("kernel", "lost"),
    [
        ("Linear", "bias"), ("Linear", "gate"), ("Linear", "residual"), ("Linear", "x_zero"), ("Linear", "low"),
        ("Linear", "post"), ("Normalize", "shift"), ("Normalize", "scale"), ("Normalize", "weight"), ("Rope", "cos"),
        ("Rope", "weight"), ("Attention", "scale"),
    ],
)  # fmt: skip
def test_an_operand_that_is_lost_is_seen(kernel: str, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    call, neutral = fused_ops.CALLS[kernel], {"scale": 1.0} if kernel == "Attention" else {}
    seen = []

    def losing(*given: Any, **named: Any) -> Any:
        seen.append(named.pop(lost, None))
        if lost in ("low", "cos"):
            named.pop({"low": "up", "cos": "sin"}[lost], None)
        return call(*given, **named, **neutral)

    monkeypatch.setitem(fused_ops.CALLS, kernel, losing)
    name = {"low": "int4, low rank", "post": "int8 smoothed"}.get(lost, "int8")
    assert fused_distance(name)[0] < 40
    assert any(one is not None for one in seen)


@pytest.mark.parametrize(("dtype", "least"), [(torch.bfloat16, 40), (torch.float16, 55)])
def test_in_sixteen_bits_a_block_is_near(dtype: torch.dtype, least: float) -> None:
    models, feeds = built("weights only"), tensors(FORMATS["weights only"].feeds)
    exact = only(lower(models[0], dtype=torch.float32)(feeds)).numpy()
    for model in models:
        found = only(lower(model, dtype=dtype)(feeds))
        assert found.dtype == torch.float32
        assert least <= sqnr_db(exact, found.numpy()) < 100


def test_the_graphs_of_a_bundle_run_from_their_files(tmp_path: Path) -> None:
    bundle = tiny_bundle.write(tmp_path / "bundle")
    x, t, context = np.ones((1, 4, 64), np.float32), np.array([300.0], np.float32), np.ones((1, 4, 64), np.float32)
    step: Any = {"inputs": tensors({"hidden_states": x, "timestep": t, "encoder_hidden_states": context})}
    for index in range(4):
        program = lower(bundle.graph_path(index), dtype=torch.float32)
        found = program(tensors(bin_feeds(bundle, index, step)))["sample"].numpy()
        expected = tiny_bundle.expected(x, t, context, [index])
        assert np.abs(found - expected).max() <= 1e-6 * np.abs(expected).max()


# -- weights ---------------------------------------------------------------------------------------------------------


def pages_of(file: Path) -> list[range]:
    """Where it is mapped into this process."""
    lines = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    found = [line.split()[0].split("-") for line in lines if line.endswith(str(file))]
    return [range(int(a, 16), int(b, 16)) for a, b in found]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mappings")
def test_weights_are_the_pages_of_their_file(tmp_path: Path) -> None:
    bundle = tiny_bundle.write(tmp_path / "bundle")
    program = lower(bundle.graph_path(0), dtype=torch.float32)
    (weight,) = [one for one in program.module.buffers() if one.shape == (64, 64)]
    (file,) = (bundle.path / "graphs" / "weights").iterdir()
    assert any(weight.data_ptr() in pages for pages in pages_of(file.resolve()))
    copied = lower(bundle.graph_path(0))
    assert not any(one.data_ptr() in pages for one in copied.module.buffers() for pages in pages_of(file.resolve()))


def test_programs_share_weights(tmp_path: Path) -> None:
    bundle = tiny_bundle.write(tmp_path / "bundle")
    held: dict[Any, Any] = {}
    programs = [lower(bundle.graph_path(index), weights=held) for index in range(3)]
    places = {one.data_ptr() for program in programs for one in program.module.buffers() if one.ndim == 2}
    assert len(places) == 1
    alone = lower(bundle.graph_path(1))
    assert {one.data_ptr() for one in alone.module.buffers() if one.ndim == 2}.isdisjoint(places)
    assert programs[0].weight_bytes == 64 * 64 * 2
    other = lower(bundle.graph_path(0), dtype=torch.float32, weights=held)
    assert [one.dtype for one in other.module.buffers() if one.ndim == 2] == [torch.float32]


def test_fused_weights_are_prepared_once() -> None:
    held: dict[Any, Any] = {}
    one, other = (lower(built("int8")[1], weights=held) for _ in range(2))
    prepared = [value for value in vars(one.module).values() if type(value).__name__ == "Weight"]
    assert len(prepared) == 6
    assert all(any(value is again for again in vars(other.module).values()) for value in prepared)
    assert one.weight_bytes >= sum(value.nbytes for value in prepared)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMATS)
def test_a_program_reads_no_value_back(name: str, dtype: torch.dtype) -> None:
    """On device "meta" there are none to read: neither shape nor path of the program asks for any."""
    for model in built(name):
        program = lower(model, device="meta", dtype=dtype)
        feeds = {one.name: torch.empty(one.shape, dtype=one.dtype, device="meta") for one in program.inputs}
        found = only(program(feeds))
        assert (found.device.type, tuple(found.shape)) == ("meta", program.outputs[0].shape)


def test_values_are_freed_behind_their_last_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[torch.Tensor]] = []
    counts = []

    def relu(x: torch.Tensor) -> torch.Tensor:
        made = x + 1
        alive.append(weakref.ref(made))
        counts.append(sum(one() is not None for one in alive))
        return made

    monkeypatch.setitem(RULES, "Relu", type(RULES["Relu"])(relu, RULES["Relu"].kind))
    nodes = [op("Relu", f"v{index}", f"v{index + 1}") for index in range(12)]
    lower(model_of(nodes, {"v0": (2, 2)}, {"v12": (2, 2)}, {}), dtype=torch.float32)({"v0": torch.ones(2, 2)})
    assert max(counts) == 2  # what is read and what is made


# -- refusals --------------------------------------------------------------------------------------------------------


def test_feeds_that_do_not_fit_are_refused() -> None:
    program = lower(stream())
    with pytest.raises(ModelError, match=r"input 'x' is missing; the program takes x"):
        program({})
    with pytest.raises(ModelError, match="no input 'z'"):
        program({"x": torch.ones(1, 4, 16), "z": torch.ones(1)})
    with pytest.raises(ModelError, match=r"x is \[4, 16\], the program takes \[1, 4, 16\]"):
        program({"x": torch.ones(4, 16)})


def test_no_cpu_captures_a_graph() -> None:
    program = lower(stream())
    with pytest.raises(CompileError, match=r"on cpu cannot be captured; lower it with device=\"cuda\""):
        program.capture()
    assert not program.captured


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_build_of_torch_is_named() -> None:
    with pytest.raises(MissingToolError, match=r"pip install 'vdq-export\[cuda\]'"):
        lower(stream(), device="cuda")


def test_without_triton_its_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ModuleNotFoundError("No module named 'triton'", name="triton")

    monkeypatch.setattr(fused_ops, "import_module", missing)
    plain, fused = built("int8")
    lower(plain)  # standard operators need none
    with pytest.raises(MissingToolError, match=r"need triton; pip install 'vdq-export\[cuda\]'"):
        lower(fused)


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    bundle = tiny_bundle.write(tmp_path / "bundle")
    proto = onnx.load(bundle.graph_path(0), load_external_data=False)
    with pytest.raises(ModelError, match=r"the data of W lies outside; say folder="):
        lower(proto)
    (file,) = (bundle.path / "graphs" / "weights").iterdir()
    file.chmod(0o644)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ModelError, match=r"ends before byte"):
        lower(proto, folder=bundle.path / "graphs")
    file.unlink()
    with pytest.raises(ModelError, match="cannot read"):
        lower(bundle.graph_path(0))
    (tmp_path / "no.onnx").write_bytes(b"\xff\xff")
    with pytest.raises(ModelError, match=r"cannot read .*no\.onnx"):
        lower(tmp_path / "no.onnx")


def test_a_graph_of_free_sizes_is_refused() -> None:
    model = stream()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_param = "batch"
    with pytest.raises(CompileError, match="x has no static shape"):
        lower(model)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", FORMATS)
def test_a_captured_graph_gives_what_the_program_gives(name: str) -> None:
    program, captured = (lower(built(name)[1], device="cuda") for _ in range(2))
    captured.capture()
    for row in (1, 0):
        feeds = tensors({**FORMATS[name].feeds, "bin": np.array([row])})
        feeds = {one.name: feeds[one.name].cuda() for one in program.inputs}
        assert torch.equal(only(captured(feeds)), only(program(feeds)))
