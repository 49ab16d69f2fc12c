"""cuda/programs.json: which graphs the GPU runs, which bins are their rows, and what became of the fusing rewrites."""

from __future__ import annotations

from typing import Literal

import msgspec

from vdq_export.errors import BundleError
from vdq_export.jsonfile import decode, encode

PROGRAMS = "cuda/programs.json"
KERNELS = "cuda/kernels"


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
