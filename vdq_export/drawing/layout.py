"""Where the boxes of a drawn graph go: layers from top to bottom, few crossings, straight long edges.

The usual four steps, each in its simplest form: layers by the longest way from a source, corners for edges that cross
layers, barycentres for the order within a layer, least squares under a minimum distance for the places.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import networkx as nx

SWEEPS = 8
GAP, BETWEEN = 16.0, 34.0  # pixels between boxes of a layer, and between layers
CORNER = 6.0  # width kept free for an edge that only passes through a layer

Key = Any  # whatever the caller names its boxes by; hashable
Point = tuple[float, float]


@dataclass(frozen=True)
class Layout:
    """Pixels. places: middle of the top side of each box; ways: the corners of each edge, from box to box."""

    places: dict[Key, Point]
    ways: dict[tuple[Key, Key], tuple[Point, ...]]
    width: float
    height: float


def layered(sizes: Mapping[Key, tuple[float, float]], edges: Iterable[tuple[Key, Key]]) -> Layout:
    """Places for boxes of `sizes` (width, height). Raises ValueError for a graph with a cycle."""
    graph = nx.DiGraph()
    graph.add_nodes_from(sizes)
    graph.add_edges_from(edges)
    if not nx.is_directed_acyclic_graph(graph):
        raise ValueError("the graph has a cycle")
    rank = _ranks(graph)
    chains = {edge: _chain(edge, rank) for edge in graph.edges}
    for chain in chains.values():
        rank |= {corner: rank[chain[0]] + step for step, corner in enumerate(chain[:-1])}
    layers: list[list[Key]] = [[] for _ in range(max(rank.values(), default=-1) + 1)]
    for node in rank:
        layers[rank[node]].append(node)
    up, down = _neighbours(chains.values())
    _order(layers, up, down)
    widths = {node: sizes[node][0] if node in sizes else CORNER for node in rank}
    x = _abscissas(layers, up, down, widths)
    tops, heights, top = [], [], 0.0
    for layer in layers:
        tops.append(top)
        heights.append(max((sizes[node][1] for node in layer if node in sizes), default=0.0))
        top += heights[-1] + BETWEEN
    left = min((x[node] - widths[node] / 2 for node in rank), default=0.0)
    places = {node: (x[node] - left, tops[rank[node]]) for node in rank}
    ways = {edge: _way(chain, places, sizes, heights, rank) for edge, chain in chains.items()}
    right = max((places[node][0] + widths[node] / 2 for node in rank), default=0.0)
    return Layout({node: places[node] for node in sizes}, ways, right, max(top - BETWEEN, 0.0))


def _ranks(graph: nx.DiGraph) -> dict[Key, int]:
    """Layer of each node; sources stand right above the first that reads them."""
    rank: dict[Key, int] = {}
    for number, layer in enumerate(nx.topological_generations(graph)):
        rank |= dict.fromkeys(layer, number)
    for node in graph:
        if not graph.in_degree(node) and graph.out_degree(node):
            rank[node] = min(rank[reader] for reader in graph.successors(node)) - 1
    return rank


def _chain(edge: tuple[Key, Key], rank: Mapping[Key, int]) -> list[Key]:
    start, end = edge
    return [start, *(("corner", edge, layer) for layer in range(rank[start] + 1, rank[end])), end]


def _neighbours(chains: Iterable[Sequence[Key]]) -> tuple[dict[Key, list[Key]], dict[Key, list[Key]]]:
    up: dict[Key, list[Key]] = {}
    down: dict[Key, list[Key]] = {}
    for chain in chains:
        for above, below in pairwise(chain):
            down.setdefault(above, []).append(below)
            up.setdefault(below, []).append(above)
    return up, down


def _order(layers: list[list[Key]], up: Mapping[Key, list[Key]], down: Mapping[Key, list[Key]]) -> None:
    """Sort each layer by where its neighbours stand, from above and from below in turn."""
    place: dict[Key, float] = {}
    for layer in layers:
        place |= {node: index for index, node in enumerate(layer)}
    for sweep in range(SWEEPS):
        downwards = sweep % 2 == 0
        neighbours = up if downwards else down
        for layer in layers if downwards else reversed(layers):
            middle = {n: _mean([place[m] for m in neighbours.get(n, [])], place[n]) for n in layer}
            layer.sort(key=middle.__getitem__)
            place |= {node: index for index, node in enumerate(layer)}


def _abscissas(
    layers: list[list[Key]], up: Mapping[Key, list[Key]], down: Mapping[Key, list[Key]], widths: Mapping[Key, float]
) -> dict[Key, float]:
    x: dict[Key, float] = {}
    for layer in layers:
        x |= dict(zip(layer, _spread([0.0] * len(layer), layer, widths), strict=True))
    for sweep in range(SWEEPS + 1):  # the last one goes down: chains hang straight under what they read
        neighbours = up if sweep % 2 == 0 else down
        for layer in layers if sweep % 2 == 0 else reversed(layers):
            wanted = [_mean([x[m] for m in neighbours.get(n, [])], x[n]) for n in layer]
            x |= dict(zip(layer, _spread(wanted, layer, widths), strict=True))
    return x


def _spread(wanted: Sequence[float], layer: Sequence[Key], widths: Mapping[Key, float]) -> list[float]:
    """The places nearest to those wanted, in order and without overlap: isotonic regression by pooling."""
    shift, offsets = 0.0, []
    for index, node in enumerate(layer):
        if index:
            shift += (widths[layer[index - 1]] + widths[node]) / 2 + GAP
        offsets.append(shift)
    pools: list[tuple[float, int]] = []  # (mean of wanted − offset, how many)
    for want, offset in zip(wanted, offsets, strict=True):
        mean, count = want - offset, 1
        while pools and pools[-1][0] >= mean:
            other, more = pools.pop()
            mean, count = (mean * count + other * more) / (count + more), count + more
        pools.append((mean, count))
    bases = [mean for mean, count in pools for _ in range(count)]
    return [base + offset for base, offset in zip(bases, offsets, strict=True)]


def _way(
    chain: Sequence[Key],
    places: Mapping[Key, Point],
    sizes: Mapping[Key, tuple[float, float]],
    heights: Sequence[float],
    rank: Mapping[Key, int],
) -> tuple[Point, ...]:
    """From under the first box to the top of the last; through a layer it goes straight down."""
    points = [(places[chain[0]][0], places[chain[0]][1] + sizes[chain[0]][1])]
    for corner in chain[1:-1]:
        across, top = places[corner]
        points += [(across, top), (across, top + heights[rank[corner]])]
    return (*points, places[chain[-1]])


def _mean(values: Sequence[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise
