"""report/hoisting.json: what left the graphs that run at every step, and how much of the network that is."""

from __future__ import annotations

from typing import Literal

import msgspec

from vdq_export.errors import BundleError
from vdq_export.jsonfile import decode, encode

HOISTING = "report/hoisting.json"


class _Data(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Work(_Data, frozen=True):
    """weight_bytes: of the float graph, each constant once. multiply_adds: of matrix products, in one run."""

    nodes: int
    weight_bytes: int
    multiply_adds: int


class NetworkReport(_Data, frozen=True):
    """One set of weights; name: "", an expert, a bin with weights of its own.

    parts: "prompt" (runs once a video and guidance branch), "step" (tables), "mixed" (every step, for both), "body".
    values: that cross from the others to the body, of value_bytes a step.
    """

    name: str
    whole: Work
    parts: dict[str, Work]
    values: int
    value_bytes: int

    @property
    def moved(self) -> float:
        """Share of the weight bytes that left the body."""
        return 1.0 - self.parts["body"].weight_bytes / max(self.whole.weight_bytes, 1)

    @property
    def saved(self) -> float:
        """Share of a step's multiply-adds that it does no more; mixed still runs at every step."""
        kept = sum(one.multiply_adds for part, one in self.parts.items() if part in ("body", "mixed"))
        return 1.0 - kept / max(self.whole.multiply_adds, 1)

    def in_words(self) -> str:
        """One line for people."""
        shares = ", ".join(f"{part} {one.nodes}" for part, one in self.parts.items())
        name = f"{self.name}: " if self.name else ""
        return (
            f"hoisted: {name}{self.moved:.1%} of the weight bytes and {self.saved:.1%} of the multiply-adds leave the "
            f"step (nodes: {shares}; {self.values} values of {self.value_bytes / 1e6:.2f} MB go from there to the body)"
        )


class HoistingReport(_Data, frozen=True):
    networks: tuple[NetworkReport, ...]
    format: Literal[1] = 1

    def to_json(self) -> bytes:
        return encode(self, "hoisting.json")

    @staticmethod
    def from_json(data: bytes, origin: str = HOISTING) -> HoistingReport:
        """Raises BundleError when `data` is not a report of this format."""
        return decode(data, HoistingReport, origin, BundleError)
