"""Bins on one session: found where graphs allow it, equal to every bin's own session to the last bit, as fast."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from tests import tiny_model
from tests.tiny_bundle import bins
from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter, signature_of
from vdq_export.compiler import finish, make_plan
from vdq_export.errors import BundleError
from vdq_export.graph import Graph
from vdq_export.manifest import Manifest, ModelIdentity
from vdq_export.model import Model
from vdq_export.runtime import families, load
from vdq_export.runtime.providers import CPU, Backend
from vdq_export.runtime.session import SessionFactory
from vdq_export.runtime.transformer import Transformer
from vdq_export.schedule import Schedule

Array = np.ndarray[Any, Any]
Edit = Callable[[int, onnx.ModelProto, dict[str, Array]], None]
ROWS, WIDTH, TIMES = 6, 512, (900.0, 600.0, 300.0, 100.0)  # a vector of 512 floats lies in the weight store
RNG = np.random.default_rng(0)
WEIGHT: Array = RNG.integers(-127, 128, (WIDTH, WIDTH), np.int8)
# Packed like the shared one: kernels on packed and unpacked float weights round differently.
ITS_OWN: dict[str, Any] = {"threads": 1, "share": False, "session_options": {"session.disable_prepacking": "0"}}
OTHER: Array = RNG.integers(-127, 128, (WIDTH, WIDTH), np.int8)


def graph(index: int, edit: Edit | None = None) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """One 8-bit linear as the qdq pass writes it, with the ranges of bin `index`, then y + t."""
    scale, weight_scale = np.float32(0.02 + 0.005 * index), np.linspace(0.001, 0.002, WIDTH, dtype=np.float32)
    arrays: dict[str, Array] = {
        "scale": np.array(scale),
        "zero_point": np.array(120 + index, np.uint8),
        "weight": WEIGHT,
        "weight.scale": weight_scale,
        "weight.zero_point": np.zeros(WIDTH, np.int8),
        "bias": np.arange(WIDTH, dtype=np.int32) * (index + 1),
        "bias.scale": scale * weight_scale,
        "rows": np.array([ROWS, WIDTH]),
        "whole": np.array([1, ROWS, WIDTH]),
    }
    nodes = [
        helper.make_node("Reshape", ["hidden_states", "rows"], ["x"]),
        helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["x.q"]),
        helper.make_node("DequantizeLinear", ["x.q", "scale", "zero_point"], ["x.dq"]),
        helper.make_node("DequantizeLinear", ["weight", "weight.scale", "weight.zero_point"], ["w"], axis=1),
        helper.make_node("DequantizeLinear", ["bias", "bias.scale"], ["b"], axis=0),
        helper.make_node("Gemm", ["x.dq", "w", "b"], ["gemm"], alpha=1.0),
        helper.make_node("Reshape", ["gemm", "whole"], ["y"]),
        helper.make_node("Add", ["y", "timestep"], ["sample"]),
    ]
    inputs = [
        helper.make_tensor_value_info("hidden_states", TensorProto.FLOAT, [1, ROWS, WIDTH]),
        helper.make_tensor_value_info("timestep", TensorProto.FLOAT, [1]),
    ]
    output = helper.make_tensor_value_info("sample", TensorProto.FLOAT, [1, ROWS, WIDTH])
    body = helper.make_graph(nodes, f"bin{index}", inputs, [output])
    model = helper.make_model(body, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    if edit:
        edit(index, model, arrays)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in arrays.items())
    return model, {}


def write(out: Path, edit: Edit | None = None) -> Bundle:
    made = bins()
    with BundleWriter(out) as writer:
        paths = [writer.add_graph(f"body.{one.name}", *graph(one.index, edit)) for one in made]
        identity = ModelIdentity(name="tiny", weight_hash="0")
        signature = signature_of(graph(0)[0], "timestep")
        manifest = Manifest(model=identity, target="test", isa="any", signature=signature)
        return writer.commit(manifest, Schedule.from_bins(made, paths))


def find(bundle: Bundle) -> list[families.Family]:
    return families.find([bundle.graph_path(index) for index in range(4)])


def results(transformer: Transformer) -> list[Array]:
    x = np.random.default_rng(1).standard_normal((1, ROWS, WIDTH)).astype(np.float32)
    return [transformer(hidden_states=x, timestep=t).sample for t in TIMES]


def both(bundle: Bundle) -> tuple[list[Array], list[Array]]:
    """Every bin's result: as loaded by default, and from a plain session of its own file."""
    with load(bundle.path, threads=1) as transformer:
        shared = results(transformer)
    with load(bundle.path, **ITS_OWN) as transformer:
        return shared, results(transformer)


# -- the same numbers, the same kernels ------------------------------------------------------------------------------


def test_one_session_gives_every_bins_own_result_to_the_last_bit(tmp_path: Path) -> None:
    shared, own = both(write(tmp_path / "out"))
    for index in range(4):
        np.testing.assert_array_equal(shared[index], own[index])
        assert index == 0 or np.abs(own[index] - TIMES[index] - (own[0] - TIMES[0])).max() > 0.1  # the bins differ


def test_another_bins_constants_are_seen(tmp_path: Path) -> None:
    """The comparison above has teeth: one bin fed with its neighbour's zero point alone is far off."""
    bundle = write(tmp_path / "out")
    (family,) = find(bundle)
    mixed = {**family.constants[1], "zero_point": family.constants[2]["zero_point"]}
    wrong = replace(family, constants={**family.constants, 1: mixed})
    _, own = both(bundle)
    session = SessionFactory(Backend(), {}, 1, several=False)(family)
    x = np.random.default_rng(1).standard_normal((1, ROWS, WIDTH)).astype(np.float32)
    inputs = {"hidden_states": x, "timestep": np.array([TIMES[1]], np.float32)}
    (right,) = session.run(None, {**inputs, **family.constants[1]})
    (off,) = session.run(None, {**inputs, **wrong.constants[1]})
    np.testing.assert_array_equal(right, own[1])
    assert np.abs(off - own[1]).max() > 1e-3


def test_the_constants_that_differ_do_not_cost_the_integer_kernel(tmp_path: Path) -> None:
    bundle = write(tmp_path / "out")
    (family,) = find(bundle)
    assert sorted(family.constants[0]) == ["bias", "bias.scale", "scale", "zero_point"]

    def kernels(model: bytes | None) -> Counter[str]:
        settings = ort.SessionOptions()
        settings.optimized_model_filepath = str(tmp_path / "optimised.onnx")
        folder = str(family.graph.parent)
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        ort.InferenceSession(model or str(family.graph), settings, providers=[CPU])
        optimised = onnx.load(tmp_path / "optimised.onnx", load_external_data=False)
        return Counter(node.op_type for node in optimised.graph.node)

    assert kernels(family.model) == kernels(None)
    assert kernels(family.model)["QGemm"] == 1


def test_a_value_that_is_not_fed_is_an_error(tmp_path: Path) -> None:
    """Not silently the first bin's."""
    (family,) = find(write(tmp_path / "out"))
    session = SessionFactory(Backend(), {}, 1, several=False)(family)
    inputs = {"hidden_states": np.zeros((1, ROWS, WIDTH), np.float32), "timestep": np.zeros(1, np.float32)}
    with pytest.raises(ValueError, match="zero_point"):
        session.run(None, inputs)


def test_a_bundle_named_by_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, own = both(write(tmp_path / "out"))
    monkeypatch.chdir(tmp_path)
    with load("out", threads=1) as transformer:
        np.testing.assert_array_equal(results(transformer), own)


def test_changing_bins_loads_nothing(tmp_path: Path) -> None:
    with load(write(tmp_path / "out").path, threads=1) as transformer:
        results(transformer)
        statistics = transformer.statistics
        assert (statistics.calls, statistics.loads, statistics.switches) == (4, 1, 3)
        assert transformer.loaded == [0, 1, 2, 3]
        assert statistics.longest_stall <= statistics.stall_seconds < statistics.first_load_seconds


def test_an_exported_model_is_one_family(tmp_path: Path, tiny: Model, traced: Graph) -> None:
    """A pass that names or orders anything by bin would cost the sharing, silently."""
    with BundleWriter(tmp_path / "out") as writer:
        planned = make_plan(tiny, target="ort-int8", tsw=3, recipe="static-minmax", traced={"": traced.copy()})
        bundle = finish(planned, writer)
    (family,) = families.find([bundle.graph_path(index) for index in range(3)])
    assert family.bins == (0, 1, 2)
    call: dict[str, Any] = {name: tensor.numpy() for name, tensor in tiny_model.inputs(11, 0.0).items()}
    with load(bundle.path, threads=1) as shared, load(bundle.path, **ITS_OWN) as each:
        for t in tiny_model.TIMESTEPS:
            call["timestep"] = np.array([t], np.float32)
            np.testing.assert_array_equal(shared(**call).sample, each(**call).sample)
        assert shared.statistics.switches == each.statistics.switches == 2


# -- what is a family ------------------------------------------------------------------------------------------------


def last_bin(change: Edit) -> Edit:
    return lambda index, model, arrays: change(index, model, arrays) if index == 3 else None


def weight(_: int, model: onnx.ModelProto, arrays: dict[str, Array]) -> None:
    arrays["weight"] = OTHER


def attribute(_: int, model: onnx.ModelProto, arrays: dict[str, Array]) -> None:
    next(node for node in model.graph.node if node.op_type == "Gemm").attribute[0].f = 2.0


def another_node(_: int, model: onnx.ModelProto, arrays: dict[str, Array]) -> None:
    model.graph.node[-1].op_type = "Sub"


def another_name(_: int, model: onnx.ModelProto, arrays: dict[str, Array]) -> None:
    arrays["range"] = arrays.pop("scale")
    for node in model.graph.node:
        node.input[:] = ["range" if name == "scale" else name for name in node.input]


def shape(_: int, model: onnx.ModelProto, arrays: dict[str, Array]) -> None:
    arrays["rows"] = np.array([-1, WIDTH])


def another_size(_: int, model: onnx.ModelProto, arrays: dict[str, Array]) -> None:
    arrays["scale"] = arrays["scale"].reshape(1)
    arrays["zero_point"] = arrays["zero_point"].reshape(1)


@pytest.mark.parametrize("change", [weight, attribute, another_node, another_name, shape, another_size])
def test_a_bin_of_another_structure_gets_its_own_session(tmp_path: Path, change: Edit) -> None:
    bundle = write(tmp_path / "out", last_bin(change))
    assert [family.bins for family in find(bundle)] == [(0, 1, 2), (3,)]
    shared, own = both(bundle)
    for index in range(4):
        np.testing.assert_array_equal(shared[index], own[index])
    with load(bundle.path, threads=1) as transformer:
        results(transformer)
        assert transformer.statistics.loads <= 3  # at the end the first bins are loaded again for the next clip
        assert transformer.statistics.switches == 3


def test_two_networks_are_two_families(tmp_path: Path) -> None:
    """As models with an expert for high noise and one for low: the second is loaded during the first one's last bin."""

    def expert(index: int, model: onnx.ModelProto, arrays: dict[str, Array]) -> None:
        arrays["weight"] = WEIGHT if index < 2 else OTHER

    bundle = write(tmp_path / "out", expert)
    assert [family.bins for family in find(bundle)] == [(0, 1), (2, 3)]
    shared, own = both(bundle)
    for index in range(4):
        np.testing.assert_array_equal(shared[index], own[index])
    x, seen = np.zeros((1, ROWS, WIDTH), np.float32), []
    with load(bundle.path, threads=1) as transformer:
        for t in TIMES:
            transformer(hidden_states=x, timestep=t)
            seen.append(transformer.loaded)
    assert seen == [[0, 1], [0, 1, 2, 3], [2, 3], [0, 1, 2, 3]]


def test_bins_that_do_not_differ_share_too(tmp_path: Path) -> None:
    def same(index: int, model: onnx.ModelProto, arrays: dict[str, Array]) -> None:
        arrays.update({name: onnx.numpy_helper.to_array(t) for t in graph(0)[0].graph.initializer for name in [t.name]})

    bundle = write(tmp_path / "out", same)
    (family,) = find(bundle)
    assert family.bins == (0, 1, 2, 3) and not any(family.constants.values())
    shared, own = both(bundle)
    np.testing.assert_array_equal(shared, own)


def test_other_providers_get_plain_graphs(tmp_path: Path) -> None:
    """They compile scales into the device's program, so these stay constants."""
    provider = (CPU, {"arena_extend_strategy": "kSameAsRequested"})  # stands for any that is not the plain one
    with load(write(tmp_path / "out").path, providers=[provider], prefetch=False) as transformer:
        results(transformer)
        assert transformer.statistics.loads == 4


def test_a_family_that_does_not_load_names_its_graph(tmp_path: Path) -> None:
    (family,) = find(write(tmp_path / "out"))
    with pytest.raises(BundleError, match=r"body\.bin00\.onnx"):
        SessionFactory(Backend(), {}, 1, several=False)(replace(family, model=b"no model"))
