"""The server of `vdq-export serve-demo`: one page, one bundle, onnxruntime-web; on loopback, from a list of files.

Nothing is looked up by what a request says: every address it answers was listed when it was made. It answers only
requests to its own address by name (another site's name that resolves to loopback gets nothing), and sends the headers
that give the page threads (cross-origin isolation) and keep it from loading anything from elsewhere.
"""

from __future__ import annotations

import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from vdq_export.bundle import Bundle
from vdq_export.errors import MissingToolError, VdqError
from vdq_export.host import case
from vdq_export.manifest import MANIFEST
from vdq_export.model import Sampler

PAGE = ("index.html", "style.css", "page.mjs", "worker.mjs", "loop.mjs", "ahead.mjs")
RUNTIME = ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm")
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".wasm": "application/wasm",
    ".json": "application/json",
}
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'self'; script-src 'self' 'wasm-unsafe-eval'; worker-src 'self' blob:; "
    "img-src 'self' data:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}


def find_runtime(start: Path) -> Path:
    """The folder of onnxruntime-web's files, in node_modules of `start` or above. Raises MissingToolError."""
    for folder in (start, *start.parents):
        found = folder / "node_modules" / "onnxruntime-web" / "dist"
        if found.is_dir():
            return found
    raise MissingToolError(
        f"onnxruntime-web is not installed in {start} or above it",
        hint="run `npm install --ignore-scripts onnxruntime-web` here, or name its dist folder with --runtime",
    )


class DemoServer(ThreadingHTTPServer):
    """Serves one bundle. `runtime`: onnxruntime-web's dist folder; port 0: any free one.

    Raises MissingToolError when the runtime lacks a file, and as case.check() does.
    """

    daemon_threads = True

    def __init__(self, bundle: Bundle, sampler: Sampler, runtime: Path, port: int = 0) -> None:
        case.check(bundle)
        missing = [name for name in RUNTIME if not (runtime / name).is_file()]
        if missing:
            raise MissingToolError(
                f"{runtime} has no {missing[0]}", hint="name the dist folder of onnxruntime-web, 1.30 is known to work"
            )
        super().__init__(("127.0.0.1", port), _Handler)
        self.bundle, self.sampler = bundle, sampler
        self.lock = threading.Lock()  # a sampler is not made for several threads
        listed = [MANIFEST, *(entry.path for entry in bundle.manifest.files)]
        package = resources.files(__package__)
        self.answers = {
            **{f"/{name}": package.joinpath(name).read_bytes for name in PAGE},
            "/": package.joinpath("index.html").read_bytes,
            **{f"/bundle/{path}": (bundle.path / path).read_bytes for path in listed},
            **{f"/runtime/{name}": (runtime / name).read_bytes for name in RUNTIME},
        }

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away in the middle of an answer is no news either."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/"

    @property
    def hosts(self) -> tuple[str, ...]:
        """What the Host header may say."""
        return (f"127.0.0.1:{self.server_port}", f"localhost:{self.server_port}")


class _Handler(BaseHTTPRequestHandler):
    server: DemoServer
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "vdq-export", ""

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        if self.headers.get("Host") not in self.server.hosts:
            return self._answer(403, b"wrong host", ".txt")
        if asked.path == "/case":
            return self._case(parse_qs(asked.query).get("number", [""])[0])
        read = self.server.answers.get(unquote(asked.path))
        if read is None:
            return self._answer(404, b"there is no such file", ".txt")
        try:
            data = read()
        except OSError as error:  # removed while we serve
            return self._answer(500, str(error.strerror).encode(), ".txt")
        return self._answer(200, data, Path(asked.path).suffix or ".html")

    do_HEAD = do_GET

    def _case(self, number: str) -> None:
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            return self._answer(400, b"number must be a whole number from 0", ".txt")
        try:
            with self.server.lock:
                data = case.make(self.server.bundle, self.server.sampler, int(number))
        except (VdqError, ValueError, LookupError) as error:  # a sampler without such a case may raise either
            return self._answer(400, str(error).encode(), ".txt")
        return self._answer(200, data, ".safetensors")

    def _answer(self, status: int, data: bytes, suffix: str) -> None:
        self.send_response(status)
        plain = "text/plain; charset=utf-8" if suffix == ".txt" else "application/octet-stream"
        for name, value in {**HEADERS, "Content-Type": TYPES.get(suffix, plain), "Content-Length": len(data)}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Requests are nobody's news."""
