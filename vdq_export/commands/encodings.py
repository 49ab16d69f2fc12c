"""vdq-export encodings BUNDLE: the float graph and the AIMET encodings that a vendor's converter reads."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import click
import msgspec

from vdq_export.bundle import Bundle
from vdq_export.commands.options import Word, bundle_argument, machine_readable
from vdq_export.commands.outputs import Output
from vdq_export.errors import BundleError
from vdq_export.graph import Graph
from vdq_export.handoff import encodings, float_graph


class Written(msgspec.Struct, frozen=True):
    """What belongs together: a graph of the bundle, the float graph of it, and its encodings files."""

    graph: str
    model: str
    encodings: list[str]
    tensors: int


@click.command("encodings")
@bundle_argument()
@click.option("--out", type=Output(), default=Path("encodings"), show_default=True, help="New folder to write.")
@click.option(
    "--version",
    "versions",
    type=Word("version of encodings", encodings.VERSIONS),
    multiple=True,
    default=encodings.VERSIONS,
    help="Version of the encodings file, several times for several; by default all.",
)
@machine_readable
def encodings_command(bundle: Path, out: Path, versions: tuple[encodings.Version, ...], as_json: bool) -> None:
    """Write BUNDLE's float graph (one for all bins that share weights) and each bin's encodings into a new folder."""
    opened = Bundle.open(bundle)
    if out.exists():
        raise BundleError(f"{out} exists", hint="choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f"{out.name}.partial-", dir=out.parent))
    try:
        rows = _write(opened, draft, versions)
        draft.chmod(0o755)
        draft.rename(out)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if as_json:
        click.echo(msgspec.json.encode({"out": str(out), "graphs": rows}).decode())
        return
    for row in rows:
        click.echo(f"{out / row.model} + {', '.join(row.encodings)}: {row.tensors} tensors")


def _write(bundle: Bundle, folder: Path, versions: tuple[encodings.Version, ...]) -> list[Written]:
    models: dict[str, str] = {}  # weights -> the float graph that has them
    rows: list[Written] = []
    for graph_path in dict.fromkeys(one.graph for one in bundle.schedule.bins):  # all others are the host's
        name = Path(graph_path).stem
        graph = Graph.load(bundle.path / graph_path)
        found = encodings.of_graph(graph)
        if not found:
            continue  # a float graph: the host's, or for another converter run without encodings
        key = float_graph.weights_key(graph)
        if key not in models:
            models[key] = "model.onnx" if not models else f"model.{name.removeprefix('body.')}.onnx"
            float_graph.save(graph, folder / models[key])
        made = []
        for version in versions:
            made.append(encodings.file_name(name, version))
            (folder / made[-1]).write_bytes(encodings.to_json(found, version))
        rows.append(Written(graph_path, models[key], made, len(found)))
    if not rows:
        raise BundleError(f"{bundle.path} has no Q/DQ graph", hint="encodings belong to quantized graphs")
    return rows
