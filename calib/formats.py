"""What a recipe's bits are on a target, layer by layer."""

from __future__ import annotations

from typing import NamedTuple

from vdq_export.plan import Grid, IntType


class WeightFormat(NamedTuple):
    """Container and grid of one weight: |q| <= qmax in `dtype`; group: input channels a scale, 0 for all of them.

    grid "e2m1": q is twice a number of the MXFP4 element type (OCP Microscaling Formats 1.0), scales powers of two.
    """

    dtype: IntType
    bits: int
    qmax: int
    group: int = 0
    grid: Grid = "int"
