"""manifest.json: what a bundle is, what it was made from, and every file in it with size and hash."""

from __future__ import annotations

from importlib import metadata
from pathlib import PurePosixPath, PureWindowsPath
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from vdq_export.errors import BundleError
from vdq_export.jsonfile import encode
from vdq_export.recipe import Recipe

FORMAT = 1
MANIFEST, SCHEDULE, REPORT = "manifest.json", "schedule.json", "report/report.json"
PAGE = "report/report.html"
TOOLS = ("vdq-export", "onnx", "onnxruntime", "torch", "numpy")

Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class TensorInfo(_Data, frozen=True):
    """An input or output of the graphs; dtype is numpy's name ("float32", "bfloat16")."""

    name: str
    dtype: str
    shape: tuple[int, ...]


class Signature(_Data, frozen=True):
    """What the whole model takes and gives; a bin's graph may take less of it, and values that ran ahead of it.

    timestep: the input that carries t.
    returns: what a call of the traced module answers with: a "tensor", or an "output" that holds it, as diffusers does.
    positional: the module's arguments in the order of its forward(), where that is not the inputs'; some may be none.
    """

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    timestep: str
    returns: Literal["output", "tensor"] = "output"
    positional: tuple[str, ...] = ()


class ModelIdentity(_Data, frozen=True):
    """`weight_hash` is Model.weight_hash(); `config` is what a pipeline may ask the transformer (patch_size, …)."""

    name: str
    weight_hash: str
    config: dict[str, Any] = {}


class FileEntry(_Data, frozen=True):
    """A file of the bundle; `path` is relative, with forward slashes."""

    path: str
    size: Annotated[int, Meta(ge=0)]
    sha256: Sha256


class Manifest(_Data, frozen=True):
    """`session` holds the onnxruntime config entries that the graphs need to run as planned."""

    model: ModelIdentity
    target: str
    isa: str
    signature: Signature
    recipe: Recipe | None = None
    session: dict[str, str] = {}
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    tools: dict[str, str] = {}
    files: tuple[FileEntry, ...] = ()
    kind: Literal["vdq-export bundle"] = "vdq-export bundle"
    format: Literal[1] = 1

    def file(self, path: str) -> FileEntry | None:
        return next((entry for entry in self.files if entry.path == path), None)

    def to_json(self) -> bytes:
        """Raises BundleError for a model configuration that JSON cannot hold."""
        return encode(self, MANIFEST)

    @staticmethod
    def from_json(data: bytes, origin: str) -> Manifest:
        """Raises BundleError for another kind of file, another format version, or a damaged manifest."""
        try:
            head = msgspec.json.decode(data, type=_Head)
            if head.kind == "vdq-export bundle" and head.format != FORMAT:
                raise BundleError(f"{origin}: bundle format {head.format} is unknown, this version reads {FORMAT}")
            manifest = msgspec.json.decode(data, type=Manifest)
        except (msgspec.ValidationError, msgspec.DecodeError, RecursionError) as error:
            raise BundleError(f"{origin}: no manifest of a bundle: {error}") from error
        paths = [safe_path(entry.path, origin) for entry in manifest.files]
        doubled = sorted({path for path in paths if paths.count(path) > 1})
        if doubled:
            raise BundleError(f"{origin}: lists {doubled[0]} twice")
        return manifest


class _Head(msgspec.Struct):
    kind: str
    format: int


def safe_path(path: str, origin: str) -> str:
    """`path` when it is relative, normal and inside the bundle; raises BundleError otherwise.

    Checked by both conventions, so that a bundle is equally safe on either kind of system.
    """
    posix, windows = PurePosixPath(path), PureWindowsPath(path)
    outside = posix.is_absolute() or windows.drive or windows.root or ".." in posix.parts
    if outside or "\\" in path or "\0" in path or str(posix) != path or path in ("", "."):
        raise BundleError(f"{origin}: {path!r} is not a path inside the bundle")
    return path


def plan_path(number: int, count: int) -> str:
    """Where a bundle of `count` plans keeps this one."""
    return "plan.json" if count == 1 else f"plans/plan{number:02d}.json"


def tool_versions() -> dict[str, str]:
    """Versions of the packages that decide what a bundle holds."""
    found = {}
    for tool in TOOLS:
        try:
            found[tool] = metadata.version(tool)
        except metadata.PackageNotFoundError:
            continue
    return found
