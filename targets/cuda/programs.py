"""cuda/programs.json: which graphs the GPU runs, which bins are their rows, and what became of the fusing rewrites."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import onnx

from vdq_export.errors import BundleError
from vdq_export.jsonfile import decode, encode
from vdq_export.targets.cuda.ops import DOMAIN, INPUTS

PROGRAMS = "cuda/programs.json"


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Fused(_Data, frozen=True):
    """What one rewrite did: `applied` times, and not at `skipped` (node: why)."""

    name: str
    applied: int
    skipped: tuple[str, ...] = ()


class Program(_Data, frozen=True):
    """One graph. bins: of the schedule; the place of each is its row of the graph's table."""

    graph: str
    bins: tuple[int, ...]
    fused: tuple[Fused, ...] = ()


class Programs(_Data, frozen=True):
    """All of a bundle. kernels: architectures whose kernels were compiled ahead, with `triton` of that version."""

    programs: tuple[Program, ...]
    kernels: tuple[str, ...] = ()
    triton: str = ""
    format: Literal[1] = 1

    def to_json(self) -> bytes:
        return encode(self, PROGRAMS)

    @staticmethod
    def from_json(data: bytes) -> Programs:
        """Raises BundleError when `data` is not of this format."""
        return decode(data, Programs, PROGRAMS, BundleError)


def linears(root: Path, index: int) -> set[str]:
    """Layers that the program for bin `index` of the bundle in `root` runs as Linear on quantized inputs."""
    found = set()
    for program in Programs.from_json((root / PROGRAMS).read_bytes()).programs:
        if index in program.bins:
            for node in onnx.load(root / program.graph, load_external_data=False).graph.node:
                if node.domain == DOMAIN and node.op_type == "Linear" and _operand(node, "x_scale"):
                    found.add(_operand(node, "weight").rpartition(".weight")[0])
    return found


def _operand(node: onnx.NodeProto, name: str) -> str:
    place = INPUTS[node.op_type].index(name)
    return node.input[place] if place < len(node.input) else ""
