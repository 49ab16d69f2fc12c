"""Which values are rotated, in blocks of how many channels.

Merged heads of an attention get one block a head: to_v's columns take the rotation, nothing remains at run time. So
does a value that a linear makes directly, in the largest blocks. Any other is rotated at run time in blocks of the
recipe's size, or the largest that divides its width. The pass decides again, on the smoothed graph, where each goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from vdq_export.graph import Graph, Linear
from vdq_export.graphs.carriers import Reading, carriers, head_width
from vdq_export.hadamard import is_order, largest_block
from vdq_export.plan import Rotation
from vdq_export.recipe import RotationRecipe

SMALLEST = 4  # a block of two spreads an outlier over two channels, for the price of a pass over the tokens


def choose(
    graph: Graph, values: Mapping[str, Sequence[Linear]], settings: RotationRecipe
) -> dict[str, tuple[Rotation | None, str]]:
    """{value: (rotation or None, why)} for each value with the quantized linears that read it. `graph`: as calibrated.

    `settings.scale` needs data: the rotations have none yet.
    """
    if settings.kind == "none":
        return dict.fromkeys(values, (None, "the recipe rotates nothing"))
    refused = {name: why for name, readers in values.items() if (why := _refusal(readers, settings))}
    asked = {name: readers for name, readers in values.items() if name not in refused}
    tries = [_fusable(readers, settings) for readers in asked.values()]
    found = dict(zip(asked, zip(tries, carriers(graph, tries), strict=True), strict=True))
    chosen: dict[str, tuple[Rotation | None, str]] = {}
    for name, readers in values.items():
        block, why = 0, refused.get(name, "")
        if name in found:
            block, why = _decide(readers, settings, *found[name])
        chosen[name] = (Rotation(block=block, why=why) if block else None, why)
    return chosen


def _refusal(readers: Sequence[Linear], settings: RotationRecipe) -> str:
    for linear in readers:
        if not any(fnmatchcase(linear.name, pattern) for pattern in settings.match):
            return f"{linear.name} is not among the recipe's {', '.join(settings.match) or 'none'}"
    return ""


def _fusable(readers: Sequence[Linear], settings: RotationRecipe) -> Reading:
    """The blocks that would cost nothing: a head's channels, where those are a Hadamard order."""
    value = readers[0].value
    head = head_width(value)
    block = head if head >= SMALLEST and is_order(head) else _block(readers, settings)[0]
    return Reading(value, tuple(linear.matmul for linear in readers), block)


def _decide(
    readers: Sequence[Linear], settings: RotationRecipe, tried: Reading, found: tuple[Linear, ...] | str
) -> tuple[int, str]:
    """(block or 0, why)"""
    if tried.block >= SMALLEST and not isinstance(found, str):
        names = ", ".join(dict.fromkeys(linear.name for linear in found))
        return tried.block, f"blocks of {tried.block}, free: the columns of {names} take them"
    block, why = _block(readers, settings)
    if block < SMALLEST:
        return 0, why
    return block, f"{why}, at run time: {found}"


def _block(readers: Sequence[Linear], settings: RotationRecipe) -> tuple[int, str]:
    width = readers[0].shape[0]
    block = largest_block(width, settings.block)
    if block < SMALLEST:
        return block, f"no Hadamard matrix of {SMALLEST} or more rows fits a width of {width}"
    if block == settings.block:
        return block, f"blocks of {block}"
    most = f" up to {settings.block}" if settings.block else ""
    return block, f"blocks of {block}, the largest{most} in a width of {width}"
