"""A rotary embedding of some of the tokens as one of all: angle 0 leaves the others as they are.

Legend: x[B, n, H, D] or [B, n, H·D]; cos, sin[a, R/2] constants.

    Concat(RotaryEmbedding(Slice(x, 0 … a), cos, sin), Slice(x, a … n))  along the tokens, in any order and number
      ->  RotaryEmbedding(x, cos and 1s, sin and 0s)

Exact: x·1 − y·0 is x. Text and video tokens that run through the same layers are written like this; the norm in front
and the quantizer behind then find one value to belong to. Angles that several embeddings share are held once.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np

from vdq_export.contract import PassContext, PassReport
from vdq_export.graph import Constant, Graph, Node, Value, is_constant
from vdq_export.graphs.match import integers, made_by
from vdq_export.targets.cuda._fused import is_output, remove
from vdq_export.targets.cuda._layouts import reshaped
from vdq_export.targets.cuda.rejoin import cut_of

NAME = "rope_tokens"
_TOKENS = 1  # their axis


class _Part(NamedTuple):
    """Tokens begin … end of `whole`, turned by an embedding or not."""

    whole: Value
    begin: int
    end: int
    embedding: Node | None


def run(graph: Graph, context: PassContext) -> PassReport:
    report = PassReport(NAME)
    for node in graph.nodes:
        parts = _parts(node) if node.op == "Concat" and not is_output(graph, node.outputs[0]) else None
        if parts is not None:
            _join(graph, node, parts)
            report.did(node.name)
    held: dict[bytes, Constant] = {}
    for node in graph.nodes:
        if node.op == "RotaryEmbedding":
            for index in (2, 3):
                shared = held.setdefault(_digest(node.inputs[index]), node.inputs[index])
                if shared is not node.inputs[index]:
                    node.inputs[index] = shared
                    report.did(f"{node.name}: the angles of {shared.name}")
    graph.cleanup()
    return report


def _parts(node: Node) -> list[_Part] | None:
    found = [part for value in node.inputs if (part := _part(value)) is not None]
    embeddings = [part.embedding for part in found if part.embedding is not None]
    if not embeddings or len(found) < len(node.inputs):
        return None
    first, whole, start = embeddings[0], found[0].whole, 0
    for part in found:
        if part.whole is not whole or part.begin != start:
            return None
        start = part.end
    alike = all(one.attrs == first.attrs and one.inputs[2].shape[1] == first.inputs[2].shape[1] for one in embeddings)
    along = int(node.attrs["axis"]) % len(whole.shape) == _TOKENS
    return found if alike and along and start == whole.shape[_TOKENS] else None


def _part(value: Value) -> _Part | None:
    source, embedding = value, None
    merged = made_by(value, "Reshape")
    turned = made_by(merged.inputs[0] if merged else value, "RotaryEmbedding")
    if turned is not None and turned.domain == "com.microsoft":
        x, positions, cos, sin = turned.inputs
        split = made_by(x, "Reshape")
        source, embedding = (split.inputs[0] if split else x), turned
        known = integers(positions) == [0] and is_constant(cos) and is_constant(sin) and len(x.shape) == 3
        if not known or cos.shape[0] != x.shape[_TOKENS] or list(source.shape) != list(value.shape):
            return None
    cut = cut_of(made_by(source, "Slice"))
    return _Part(cut[0], *cut[2:], embedding) if cut is not None and cut[1] == _TOKENS else None


def _join(graph: Graph, node: Node, parts: list[_Part]) -> None:
    embedding = next(part.embedding for part in parts if part.embedding is not None)
    whole, old = parts[0].whole, node.outputs[0]
    name = graph.fresh(f"{node.name}/Rotary")
    width = embedding.inputs[2].shape[1]
    tables = []
    for which, index, still in (("cos", 2, 1.0), ("sin", 3, 0.0)):
        rows = [
            np.full((part.end - part.begin, width), still, np.float32)
            if part.embedding is None
            else np.asarray(part.embedding.inputs[index].values)
            for part in parts
        ]
        tables.append(graph.constant(graph.fresh(f"{name}.{which}"), np.concatenate(rows)))
    flat = [*whole.shape[:2], int(np.prod(whole.shape[2:]))]
    x = reshaped(graph, whole, flat)
    turned = graph.add_node(
        "RotaryEmbedding", [x, embedding.inputs[1], *tables], name, dtype=whole.dtype, shape=flat,
        domain="com.microsoft", attrs=dict(embedding.attrs),
    )  # fmt: skip
    remove(node)
    graph.replace_uses(old, reshaped(graph, turned, whole.shape))


def _digest(table: Constant) -> bytes:
    values = np.ascontiguousarray(table.values)
    return hashlib.sha256(values.view(np.uint8).data).digest() + str(values.shape).encode()
