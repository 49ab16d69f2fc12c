"""Which values are computed alike: by equal operators from equal constants."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from vdq_export.graph import INLINE_BYTES, Node, Value, is_constant


def alike(nodes: Sequence[Node]) -> dict[int, int]:
    """{id of an output: a number that outputs computed alike have in common}, of nodes in order.

    Large constants are equal where they hold the same array or promise, others by type, shape and bytes.
    """
    numbers: dict[Hashable, int] = {}
    found: dict[int, int] = {}

    def number(key: Hashable) -> int:
        return numbers.setdefault(key, len(numbers))

    def of(value: Value) -> int:
        if id(value) not in found:
            held = value._values if is_constant(value) else value
            small = is_constant(value) and held.nbytes < INLINE_BYTES
            same = (str(value.dtype), tuple(value.shape), value.values.tobytes()) if small else id(held)
            found[id(value)] = number(("constant", same))
        return found[id(value)]

    for node in nodes:
        plain = all(isinstance(x, int | float | str) or _is_plain_list(x) for x in node.attrs.values())
        attrs = repr(sorted(node.attrs.items())) if plain else id(node)
        operands = tuple(-1 if t.is_empty() else of(t) for t in node.inputs)
        key = (node.op, node.domain, attrs, operands)
        for index, output in enumerate(node.outputs):
            found[id(output)] = number((*key, len(node.outputs), index))
    return found


def _is_plain_list(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, int | float | str) for x in value)
