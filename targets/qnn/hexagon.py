"""Sessions of the HTP compiler and emulator that onnxruntime-qnn carries, for one architecture.

On Linux x86-64 creating a session compiles the graph for `arch`, and running it emulates that NPU (slow: a 2.5 M
parameter graph takes about a second). Architectures other than ARCHS are refused here because the tool does not: it
takes any number and falls back to the numerics of an old one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnxruntime as ort

from vdq_export.devices import qnn_provider
from vdq_export.devices.qnn_provider import PROVIDER, available
from vdq_export.errors import CompileError, OffDeviceError, UnknownNameError
from vdq_export.targets.qnn import ARCHS

STRICT = "session.disable_cpu_ep_fallback"
__all__ = [
    "ARCHS",
    "PROVIDER",
    "assignment",
    "available",
    "emulator",
    "left_over",
    "provider_options",
    "session",
    "strict_session",
]

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_NAMED = 8  # nodes listed in a message


def provider_options(arch: str) -> dict[str, str]:
    """What every session for `arch` needs; the graph's own Q/DQ of inputs and outputs then runs on the HTP too.

    Raises UnknownNameError for an architecture that is not in ARCHS, MissingToolError without onnxruntime-qnn.
    """
    if arch not in ARCHS:
        raise UnknownNameError("HTP architecture", arch, ARCHS)
    return qnn_provider.htp_options(arch)


def session(model: Path | bytes, options: Mapping[str, str], entries: Mapping[str, str]) -> ort.InferenceSession:
    """A session of the provider alone. options: the provider's; entries: onnxruntime's session config entries.

    What the backend writes to stdout and stderr meanwhile is held back; its errors are in the CompileError.
    """
    settings = ort.SessionOptions()
    settings.log_severity_level = 3
    settings.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    for key, value in entries.items():
        settings.add_session_config_entry(key, value)
    settings.add_provider_for_devices(qnn_provider.devices(), dict(options))
    source = model if isinstance(model, bytes) else str(model)
    said: list[str] = []
    try:
        with qnn_provider.held_back(said):
            return ort.InferenceSession(source, settings)
    except Exception as error:  # onnxruntime's own errors have no common class
        raise CompileError(_words(error, said)) from error


def emulator(
    model: Path | bytes,
    arch: str = "v75",
    *,
    strict: bool = True,
    dump_json: Path | None = None,
    options: Mapping[str, str] = {},
) -> ort.InferenceSession:
    """Compile `model` for `arch`; running the session emulates it.

    strict: every node goes to the HTP, or CompileError names those that do not. dump_json: a folder for the backend's
    own description of the graphs (tensors with types, scales and offsets). options: further provider options.
    Raises CompileError with the tool's own message.
    """
    chosen = {**provider_options(arch), **options}
    if dump_json is not None:
        dump_json.mkdir(parents=True, exist_ok=True)
        chosen |= {"dump_json_qnn_graph": "1", "json_qnn_graph_dir": str(dump_json)}
    return strict_session(model, chosen, {}) if strict else session(model, chosen, {})


def strict_session(model: Path | bytes, options: Mapping[str, str], entries: Mapping[str, str]) -> ort.InferenceSession:
    """session(), every node of which runs on the HTP; else OffDeviceError names those that do not."""
    try:
        return session(model, options, {**entries, STRICT: "1"})
    except CompileError as error:
        if "fallback to CPU EP has been explicitly disabled" not in str(error):
            raise
        nodes = left_over(session(model, options, {}))  # a second time, now to be told which they are
        raise _refused(nodes, options["htp_arch"]) from error


def assignment(session: ort.InferenceSession) -> dict[str, list[str]]:
    """Provider name -> its nodes, as "OpType name"; sessions made here record it."""
    found: dict[str, list[str]] = {}
    for part in session.get_provider_graph_assignment_info():
        found.setdefault(part.ep_name, []).extend(f"{node.op_type} {node.name}" for node in part.get_nodes())
    return found


def left_over(session: ort.InferenceSession) -> list[str]:
    """The nodes of a session that do not run on the HTP."""
    return [node for provider, nodes in assignment(session).items() if provider != PROVIDER for node in nodes]


def _refused(nodes: Sequence[str], arch: str) -> OffDeviceError:
    more = f" and {len(nodes) - _NAMED} more" if len(nodes) > _NAMED else ""
    return OffDeviceError(
        f"{len(nodes)} nodes do not run on the HTP: {', '.join(nodes[:_NAMED])}{more}",
        hint=f"`vdq-export lint --for qnn-v{arch}` says why and what to change",
    )


def _words(error: Exception, said: Sequence[str]) -> str:
    """The exception's message, then the errors the backend logged on the way to it."""
    logged = [_COLOURS.sub("", line) for line in "".join(said).splitlines() if "[E:" in line or "[ERROR]" in line]
    causes = dict.fromkeys(line.split("] ", 1)[-1].strip() for line in logged)
    message = " ".join(str(error).split())
    return "; ".join([message, *(cause for cause in causes if cause not in message)][:4])
