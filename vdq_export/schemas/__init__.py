"""JSON schemas of the files in a bundle, made from the types that read and write them.

`python -m vdq_export.schemas` writes them again after a type has changed.
"""

from __future__ import annotations

from typing import Any

import msgspec

from vdq_export.manifest import Manifest
from vdq_export.plan import QuantPlan
from vdq_export.report.data import VerifyReport
from vdq_export.report.hoisting import HoistingReport
from vdq_export.report.passes import PassesReport
from vdq_export.report.ranges import RangesReport
from vdq_export.schedule import Schedule

TYPES: dict[str, type[msgspec.Struct]] = {
    "hoisting": HoistingReport,
    "manifest": Manifest,
    "passes": PassesReport,
    "plan": QuantPlan,
    "ranges": RangesReport,
    "report": VerifyReport,
    "schedule": Schedule,
}


def schema(name: str) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of one kind of file."""
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, "title": name, **msgspec.json.schema(TYPES[name])}


def render(name: str) -> bytes:
    """The bytes of <name>.schema.json."""
    return msgspec.json.format(msgspec.json.encode(schema(name), order="sorted"), indent=1) + b"\n"
