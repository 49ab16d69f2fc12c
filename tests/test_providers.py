"""What a bundle runs on: recipes for providers that come as packages of their own, and onnxruntime's by name."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import onnxruntime as ort
import pytest

from tests import tiny_bundle
from tests.commands import assert_one_line, command
from tests.qdq_graphs import small_qdq
from tests.quantized_blocks import block
from vdq_export import load
from vdq_export.bundle import Bundle
from vdq_export.bundle_writer import BundleWriter, signature_of
from vdq_export.devices import qnn_provider
from vdq_export.errors import BundleError, MissingToolError, UnknownNameError
from vdq_export.manifest import FileEntry, Manifest, ModelIdentity
from vdq_export.metrics import sqnr_db
from vdq_export.runtime.families import alone
from vdq_export.runtime.providers import CPU, OPENVINO, Backend, choose
from vdq_export.runtime.session import SessionFactory
from vdq_export.schedule import Schedule

STRICT = {"session.disable_cpu_ep_fallback": "1"}
needs_qnn = pytest.mark.skipif(not qnn_provider.available(), reason="onnxruntime-qnn is not installed")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return tiny_bundle.write(tmp_path_factory.mktemp("tiny") / "bundle")


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle for the HTP of four transformer blocks, with the session entry that such bundles carry for the CPU."""
    graphs = [block(seed=seed)[0] for seed in range(4)]
    with BundleWriter(tmp_path_factory.mktemp("quantized") / "bundle") as writer:
        paths = [writer.add_graph(f"body.bin{i:02d}", *one.skeleton()) for i, one in enumerate(graphs)]
        manifest = Manifest(
            model=ModelIdentity(name="blocks", weight_hash="0"),
            target="qnn",
            isa="v73",
            signature=signature_of(graphs[0].skeleton()[0], "x"),
            session={"session.disable_quant_qdq": "1"},
        )
        return writer.commit(manifest, Schedule.from_bins(tiny_bundle.bins(), paths, sampler={}))


def test_names_of_onnxruntime_are_taken_as_before(tiny: Bundle) -> None:
    assert choose(None, tiny) == choose([CPU], tiny) == choose(CPU, tiny) == Backend()
    assert choose(None, tiny).on_cpu and not choose([(CPU, {})], tiny).on_cpu
    assert Backend().settings(tiny, {"a": "1"}) == {"a": "1"}


def test_unknown_recipes_are_refused_with_the_near_ones(tiny: Bundle) -> None:
    with pytest.raises(UnknownNameError, match="did you mean ort-qnn-ep"):
        load(tiny.path, providers="ort-qnn")


@pytest.mark.parametrize(
    ("recipe", "module", "words"),
    [
        ("ort-qnn-ep", "onnxruntime_qnn", "onnxruntime-qnn is not installed"),
        (
            "ort-openvino-ep",
            "onnxruntime_ep_openvino",
            "OpenVINO's provider for onnxruntime is not installed",
        ),
    ],
)
def test_a_missing_package_is_named(
    tiny: Bundle, monkeypatch: pytest.MonkeyPatch, recipe: str, module: str, words: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    with pytest.raises(MissingToolError, match=words):
        load(tiny.path, providers=recipe)


def test_openvino_inside_onnxruntime(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-openvino brings the provider by name; floats stay floats, and the CPU takes what it leaves."""
    monkeypatch.setattr(ort, "get_available_providers", lambda: [OPENVINO, CPU])
    (name, options), rest = choose("ort-openvino-ep", tiny).providers
    assert (name, options["device_type"], rest) == (OPENVINO, "CPU", CPU)
    assert "ACCURACY" in options["load_config"]


def test_openvino_as_a_plugin_takes_its_cpu(tiny: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it lists no device (a processor of another maker), the error says so."""
    found: list[SimpleNamespace] = []
    registered: list[tuple[str, str]] = []
    plugin = SimpleNamespace(get_ep_name=lambda: OPENVINO, get_library_path=lambda: "plugin.so")
    monkeypatch.setitem(sys.modules, "onnxruntime_ep_openvino", plugin)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [CPU])
    monkeypatch.setattr(ort, "get_ep_devices", lambda: found)
    monkeypatch.setattr(ort, "register_execution_provider_library", lambda *what: registered.append(what))
    with pytest.raises(MissingToolError, match="finds no CPU"):
        choose("ort-openvino-ep", tiny)
    assert registered == [(OPENVINO, "plugin.so")]
    kinds = ort.OrtHardwareDeviceType
    found += [SimpleNamespace(ep_name=OPENVINO, device=SimpleNamespace(type=one)) for one in (kinds.NPU, kinds.CPU)]
    assert choose("ort-openvino-ep", tiny).devices == (found[1],)


def test_contexts_are_loaded_where_there_is_an_npu(quantized: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those the manifest lists, one binary for all bins; the emulator compiles the graphs themselves."""
    context = FileEntry(path="contexts/v73/body.bin00_ctx.onnx", size=0, sha256="0" * 64)
    manifest = msgspec.structs.replace(quantized.manifest, files=(*quantized.manifest.files, context))
    bundle = Bundle(quantized.path, manifest, quantized.schedule, ())
    graphs = [bundle.graph_path(index) for index in (0, 1)]
    kinds = ort.OrtHardwareDeviceType
    monkeypatch.setattr(qnn_provider, "htp_library", lambda: "QnnHtp")
    made = []
    for kind in (kinds.NPU, kinds.CPU):
        devices = [SimpleNamespace(device=SimpleNamespace(type=kind))]
        monkeypatch.setattr(qnn_provider, "devices", lambda devices=devices: devices)
        made.append(choose("ort-qnn-ep", bundle))
    phone, emulator = made
    assert [phone.graph(bundle, path) for path in graphs] == [bundle.path / context.path, graphs[1]]
    assert phone.settings(bundle, {})["ep.share_ep_contexts"] == "1" and "htp_arch" not in phone.options
    assert [emulator.graph(bundle, path) for path in graphs] == graphs
    assert "ep.share_ep_contexts" not in emulator.settings(bundle, {}) and emulator.options["htp_arch"] == "73"


@needs_qnn
def test_the_htp_emulator_runs_a_bundle(quantized: Bundle) -> None:
    """A whole block in 16 bits: 73 dB from onnxruntime when this was written, where an operand rounded to 8 bits gives
    41. No node is left to the CPU, and the CPU's session entry, which would end the process there, is left out.
    """
    backend = choose("ort-qnn-ep", quantized)
    assert backend.arch == "v73" and not backend.on_cpu
    settings = backend.settings(quantized, {"session.disable_quant_qdq": "1"})
    assert settings["session.disable_quant_qdq"] == "0"
    (family, *_) = alone([backend.graph(quantized, quantized.graph_path(0))])
    _, feeds = block(seed=0)
    emulated = SessionFactory(backend, {**settings, **STRICT}, None, several=False)(family).run(None, feeds)[0]
    on_cpu = SessionFactory(Backend(), quantized.manifest.session, None, several=False)(family).run(None, feeds)[0]
    assert sqnr_db(on_cpu, emulated) > 60


@needs_qnn
def test_a_graph_the_provider_refuses_is_an_error_of_the_bundle(quantized: Bundle, tmp_path: Path) -> None:
    """Operands of unlike types are left to the CPU, which the caller may forbid."""
    backend = choose("ort-qnn-ep", quantized)
    small_qdq().save(tmp_path / "graph.onnx")
    (family,) = alone([tmp_path / "graph.onnx"])
    with pytest.raises(BundleError, match="cannot load"):
        SessionFactory(backend, backend.settings(quantized, STRICT), None, several=False)(family)


def test_the_command_refuses_before_it_loads_a_model(tiny: Bundle) -> None:
    assert_one_line(
        command("run", tiny.path, "--providers", "ort-qnn", cwd=tiny.path.parent), "did you mean ort-qnn-ep"
    )
