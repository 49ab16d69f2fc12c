"""Reads .onnx files, whatever they are called: onnx.load() goes by the suffix, and reads .json as protobuf's JSON."""

from __future__ import annotations

from pathlib import Path

import onnx
from google.protobuf.message import Error as ProtobufError  # type: ignore[import-untyped]

from vdq_export.errors import ModelError


def read(path: Path) -> onnx.ModelProto:
    """The model in the file, its external data left where it is. Raises ModelError for what is no such file."""
    if not path.is_file():
        raise ModelError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}", hint="give an .onnx file")
    try:
        proto = onnx.load(path, format="protobuf", load_external_data=False)
    except (ProtobufError, OSError, ValueError) as error:
        raise ModelError(f"{path}: not an ONNX file ({error})") from error
    if not proto.HasField("graph") or not proto.opset_import:
        raise ModelError(f"{path}: not an ONNX file (no graph in it)")
    return proto
