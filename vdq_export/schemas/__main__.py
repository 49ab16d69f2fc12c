"""Writes <name>.schema.json beside this file for every kind of file in a bundle."""

from __future__ import annotations

from pathlib import Path

from vdq_export.schemas import TYPES, render

for name in TYPES:
    (Path(__file__).parent / f"{name}.schema.json").write_bytes(render(name))
