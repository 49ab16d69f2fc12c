"""The server of serve-demo: what it gives, to whom, and what the command says when it cannot."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.client import HTTPConnection, HTTPResponse
from pathlib import Path

import pytest

from tests import hoisted_bundle, tiny_bundle
from tests.commands import command
from tests.host_cases import hoisted_case
from vdq_export.errors import MissingToolError, ModelError
from vdq_export.host import case
from vdq_export.host.server import RUNTIME, DemoServer, find_runtime
from vdq_export.samples.digits.sampler import DigitsSampler


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like onnxruntime-web's, with one file more."""
    folder = tmp_path_factory.mktemp("web") / "node_modules" / "onnxruntime-web" / "dist"
    folder.mkdir(parents=True)
    for name in (*RUNTIME, "ort.webgpu.mjs"):
        (folder / name).write_bytes(name.encode())
    return folder


@pytest.fixture(scope="module")
def server(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DemoServer]:
    folder = tmp_path_factory.mktemp("served")
    bundle = hoisted_bundle.write(folder / "bundle")
    (bundle.path / "secret.txt").write_text("not in the manifest", encoding="utf-8")
    with DemoServer(bundle, DigitsSampler(), runtime) as made:
        thread = threading.Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def ask(server: DemoServer, path: str, method: str = "GET", host: str | None = None) -> tuple[HTTPResponse, bytes]:
    """The answer to a path sent as it is."""
    connection = HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.putrequest(method, path, skip_host=True)
    connection.putheader("Host", host or f"127.0.0.1:{server.server_port}")
    connection.endheaders()
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer, data


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/", "text/html; charset=utf-8"),
        ("/?number=3", "text/html; charset=utf-8"),
        ("/style.css", "text/css; charset=utf-8"),
        ("/loop.mjs", "text/javascript; charset=utf-8"),
        ("/ahead.mjs", "text/javascript; charset=utf-8"),
        ("/runtime/ort-wasm-simd-threaded.wasm", "application/wasm"),
        ("/bundle/manifest.json", "application/json"),
        ("/bundle/graphs/body.bin00.onnx", "application/octet-stream"),
        ("/bundle/graphs%2Fbody.bin00.onnx", "application/octet-stream"),
        ("/bundle/tables/high.safetensors", "application/octet-stream"),
    ],
)
def test_it_serves_the_page_the_runtime_and_the_bundle(server: DemoServer, path: str, kind: str) -> None:
    answer, data = ask(server, path)
    assert (answer.status, answer.headers["Content-Type"], len(data) > 0) == (200, kind, True)
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert "default-src 'self'" in answer.headers["Content-Security-Policy"]
    if path.startswith("/bundle/graphs"):
        assert data == server.bundle.graph_path(0).read_bytes()
    head, nothing = ask(server, path, "HEAD")
    assert (head.status, head.headers["Content-Length"], nothing) == (200, str(len(data)), b"")


@pytest.mark.parametrize(
    "path",
    [
        "/bundle/secret.txt",
        "/bundle/../bundle/secret.txt",
        "/bundle/..%2F..%2Fetc%2Fpasswd",
        "/bundle//etc/passwd",
        "/bundle/",
        "/runtime/ort.webgpu.mjs",
        "/runtime/../package.json",
        "/server.py",
        "/nothing",
    ],
)
def test_it_serves_nothing_else(server: DemoServer, path: str) -> None:
    assert ask(server, path)[0].status == 404


def test_other_names_for_loopback_and_other_methods_get_nothing(server: DemoServer) -> None:
    assert ask(server, "/", host=f"elsewhere.example:{server.server_port}")[0].status == 403
    assert ask(server, "/", host=f"localhost:{server.server_port}")[0].status == 200
    assert ask(server, "/", "POST")[0].status == 501
    assert server.server_address[0] == "127.0.0.1"


@pytest.mark.parametrize(
    ("number", "message"),
    [("", "whole number"), ("-1", "whole number"), ("1e3", "whole number"), ("5", "the graphs take [1, 4, 8]")],
)
def test_cases_that_cannot_be_made_say_why(server: DemoServer, number: str, message: str) -> None:
    answer, data = ask(server, f"/case?number={number}")
    assert answer.status == 400 and message in data.decode()


def test_a_sampler_without_that_case_is_no_broken_connection(
    server: DemoServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: object) -> bytes:
        raise IndexError("list index out of range")

    monkeypatch.setattr(case, "make", missing)
    answer, data = ask(server, "/case?number=7")
    assert (answer.status, data) == (400, b"list index out of range")


def test_a_case_arrives_as_it_was_made(server: DemoServer, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    made = hoisted_case(np.zeros((1, 2, 3), np.float32), {})
    monkeypatch.setattr(case, "make", lambda bundle, sampler, number: made + bytes([number]))
    answer, data = ask(server, "/case?number=7")
    assert (answer.status, data) == (200, made + b"\x07")


def test_the_runtime_is_found_from_here_upwards(runtime: Path, tmp_path: Path) -> None:
    inner = runtime.parents[2] / "a" / "b"
    inner.mkdir(parents=True, exist_ok=True)
    assert find_runtime(inner) == runtime
    with pytest.raises(MissingToolError, match=r"npm install --ignore-scripts onnxruntime-web"):
        find_runtime(tmp_path)


def test_what_is_missing_is_said_before_anything_is_served(runtime: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="flow-euler only"):
        DemoServer(tiny_bundle.write(tmp_path / "euler"), DigitsSampler(), runtime)
    with pytest.raises(MissingToolError, match=r"has no ort\.wasm\.min\.mjs"):
        DemoServer(hoisted_bundle.write(tmp_path / "parts"), DigitsSampler(), tmp_path)
    code, out, err = command("serve-demo", "parts", "--no-open", cwd=tmp_path)
    assert (code, out) == (2, "") and "npm install --ignore-scripts onnxruntime-web" in err
    code, out, err = command("serve-demo", "euler", "--no-open", "--runtime", str(runtime), cwd=tmp_path)
    assert (code, out) == (2, "") and "sampler 'euler'" in err
