"""The layers hold, files stay short, and what is on disk is what gets installed. Reads the sources, imports nothing."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SETUPTOOLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
TOPS = {"passes", "calib", "targets", "samples"}  # folders at the root that are subpackages of vdq_export
LINES, PASS_LINES = 400, 150

# Who may import whom. A module or package belongs to the longest prefix; a layer imports its own and lower numbers.
LAYERS = {
    "vdq_export": 0,  # the package itself loads what it names on first use
    "vdq_export.errors": 0,
    "vdq_export.settings": 0,
    "vdq_export.recipes": 0,
    "vdq_export.schemas": 2,
    "vdq_export.jsonfile": 1,
    "vdq_export.recipe": 1,
    "vdq_export.plan": 1,
    "vdq_export.target_spec": 1,
    "vdq_export.metrics": 1,
    "vdq_export.weights.external_data": 1,
    "vdq_export.onnx_file": 1,
    "vdq_export.graph": 1,
    "vdq_export.weights.promise": 1,
    "vdq_export.hadamard": 1,
    "vdq_export.weights.number_grid": 1,
    "vdq_export.ort": 1,
    "vdq_export.devices.vendor_tool": 1,
    "vdq_export.devices.openvino_runtime": 1,
    "vdq_export.devices.qnn_provider": 1,
    "vdq_export.contract": 1,
    "vdq_export.weights.checkpoint": 1,
    "vdq_export.weights.on_demand": 1,
    "vdq_export.experts": 1,
    "vdq_export.model": 1,
    "vdq_export.steps": 1,
    "vdq_export.weights.learned": 1,
    "vdq_export.graphs.segments": 1,
    "vdq_export.policy": 1,
    "vdq_export.fixed_arguments": 1,
    "vdq_export.graphs.probe": 1,
    "vdq_export.graphs.cut": 1,
    "vdq_export.schedule": 2,
    "vdq_export.calib": 2,
    "vdq_export.passes": 2,
    "vdq_export.targets": 3,
    "vdq_export.runtime": 3,
    "vdq_export.host": 3,
    "vdq_export.lint": 3,
    "vdq_export.handoff.files": 4,
    "vdq_export.pipeline": 3,
    "vdq_export.trace": 3,
    "vdq_export.tracing": 3,
    "vdq_export.sources": 3,
    "vdq_export.sources.families": 2,
    "vdq_export.sources._stdit": 2,
    "vdq_export.samples": 2,
    "vdq_export.recipe_toml": 1,
    "vdq_export.recipe_rules": 3,
    "vdq_export.hoisting.split": 2,
    "vdq_export.planned": 3,
    "vdq_export.hoisting.parts": 4,
    "vdq_export.report.parts": 4,
    "vdq_export.compiler": 4,
    "vdq_export.recording": 4,
    "vdq_export.quality": 4,
    "vdq_export.auto": 4,
    "vdq_export.float_model": 4,
    "vdq_export.verify": 4,
    "vdq_export.devices.verify_openvino": 4,
    "vdq_export.devices.first_difference": 4,
    "vdq_export.bisect": 4,
    "vdq_export.devices.verify": 4,
    "vdq_export.devices.verify_gpu": 4,
    "vdq_export.devices.checks": 4,
    "vdq_export.doctor": 4,
    "vdq_export.commands": 5,
    "vdq_export.cli": 6,
}
_GRAPH = ("vdq_export.graph", "vdq_export.weights.promise")
# Free of layers: files, pictures, progress; used by anyone above the types, and must not import upwards themselves.
SIDE = 2


def sources() -> dict[str, Path]:
    """Module name -> file, for everything that is installed."""
    found = {}
    for folder in ("vdq_export", *sorted(TOPS)):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts if parts[0] == "vdq_export" else ("vdq_export", *parts))
            found[name.removesuffix(".__init__")] = path
    return found


SOURCES = sources()


def imports(tree: ast.AST, runtime_only: bool = False) -> Iterator[tuple[str, int]]:
    """(module, line) of every import, in functions too; `from a import b` gives a.b where that is a module."""
    skipped = set()
    if runtime_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped |= {id(inner) for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield (whole if whole in SOURCES else base), node.lineno


def layer(module: str) -> int:
    prefixes = [p for p in LAYERS if p != "vdq_export" and (module == p or module.startswith(f"{p}."))]
    if prefixes:
        return LAYERS[max(prefixes, key=len)]
    return LAYERS["vdq_export"] if module == "vdq_export" else SIDE


def wrong_imports(name: str, tree: ast.AST) -> list[str]:
    """Every import of the module `name` that breaks the rules of DESIGN's layers."""
    found = []
    for target, line in imports(tree, runtime_only=True):
        where = f"{name}:{line} imports {target}"
        if target.startswith("."):
            found.append(f"{where}: relative")
        elif target.split(".")[0] in TOPS:
            found.append(f"{where}: say vdq_export.{target}")
        elif target.split(".")[0] == "onnx_graphsurgeon" and name not in _GRAPH:
            found.append(f"{where}: only {' and '.join(_GRAPH)} may")
        elif target.split(".")[0] == "vdq_export":
            if layer(target) > layer(name):
                found.append(f"{where}: upwards")
            found += [f"{where}: {why}" for why in _between_passes(name, target)]
    return found


def _between_passes(name: str, target: str) -> Iterator[str]:
    own, other = name.split("."), target.split(".")
    if own[:2] == ["vdq_export", "passes"]:
        if other[1] in ("calib", "targets"):
            yield f"a pass never imports {other[1]}"
        if other[1] == "passes" and len(other) > 2 and other != own and not other[2].startswith("_"):
            yield "a pass never imports another; share a module whose name starts with _"
    if own[:2] == ["vdq_export", "calib"] and other[1] in ("passes", "targets"):
        yield f"calib never imports {other[1]}"


@pytest.mark.parametrize("name", SOURCES)
def test_imports_point_one_way(name: str) -> None:
    assert wrong_imports(name, ast.parse(SOURCES[name].read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("vdq_export.passes.qdq", "from vdq_export.passes import linear"),
        ("vdq_export.passes.qdq", "from vdq_export.passes.linear import run"),
        ("vdq_export.passes.qdq", "from vdq_export.calib.solve import solve"),
        ("vdq_export.passes.qdq", "def f():\n    import vdq_export.targets"),
        ("vdq_export.passes._shared", "from vdq_export.passes.linear import run"),
        ("vdq_export.calib.solve", "from vdq_export.passes import linear"),
        ("vdq_export.calib.solve", "from vdq_export.compiler import export"),
        ("vdq_export.targets.ort_int8", "from vdq_export import compiler"),
        ("vdq_export.plan", "from vdq_export.calib.record import CalibrationRecord"),
        ("vdq_export.compiler", "from vdq_export.cli import main"),
        ("vdq_export.drawing.clips", "from vdq_export.verify import verify"),
        ("vdq_export.trace", "import onnx_graphsurgeon as gs"),
        ("vdq_export.trace", "from . import graph"),
        ("vdq_export.trace", "from .graph import Graph"),
        ("vdq_export.trace", "from passes.linear import run"),
        ("vdq_export.trace", "import calib.solve"),
    ],
)
def test_a_planted_wrong_import_is_caught(name: str, line: str) -> None:
    assert len(wrong_imports(name, ast.parse(line))) >= 1


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("vdq_export.passes.qdq", "from vdq_export.passes._shared import helper"),
        ("vdq_export.targets.ort_int8", "from vdq_export.passes import linear"),
        ("vdq_export.compiler", "from vdq_export.targets import load"),
        ("vdq_export.graph", "import onnx_graphsurgeon as gs"),
    ],
)
def test_allowed_imports_are(name: str, line: str) -> None:
    assert wrong_imports(name, ast.parse(line)) == []


def test_layer_table_names_modules_that_exist() -> None:
    assert [name for name in LAYERS if name not in SOURCES] == []


def test_files_are_short() -> None:
    def limit(name: str) -> int:
        return PASS_LINES if name.startswith("vdq_export.passes.") else LINES

    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in SOURCES.items()}
    tests = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (ROOT / "tests").glob("*.py")}
    assert len(lengths) > 50  # the listing itself works
    assert {n: length for n, length in lengths.items() if length > limit(n)} == {}
    assert {n: length for n, length in tests.items() if length > LINES} == {}


def test_every_package_folder_is_installed() -> None:
    """A new subfolder that pyproject does not list imports in the checkout and is missing from the wheel."""
    folders = {path.parent for path in SOURCES.values()}
    assert [str(f.relative_to(ROOT)) for f in folders if not (f / "__init__.py").is_file()] == []
    packages = {name for name, path in SOURCES.items() if path.name == "__init__.py"}
    assert set(SETUPTOOLS["packages"]) == packages
    assert SETUPTOOLS["package-dir"] == {"vdq_export": "vdq_export", **{f"vdq_export.{t}": t for t in sorted(TOPS)}}


def test_every_data_file_is_installed() -> None:
    """Files beside the modules (recipes, schemas, weights) match the package-data of their package."""
    missing = []
    for name, path in SOURCES.items():
        if path.name != "__init__.py":
            continue
        patterns = SETUPTOOLS["package-data"].get(name, [])
        for file in path.parent.iterdir():
            if file.is_file() and file.suffix in (".toml", ".json", ".safetensors", ".mjs", ".html", ".css"):
                kept = any(file.match(pattern) for pattern in patterns) or file.name == "checkpoint.safetensors"
                missing += [] if kept else [f"{file.relative_to(ROOT)} (package {name})"]
    assert missing == []
