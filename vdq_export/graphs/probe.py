"""The probe: a small graph that gives the network's timestep-modulated input, by which step reuse judges a step.

It is cut from the canonical float graph, before smoothing or rotation, so one probe serves every bin and precision.
"""

from __future__ import annotations

from vdq_export.errors import PassError
from vdq_export.graph import Graph, Node


def choose(graph: Graph, timestep: str, latent: str) -> str:
    """Name of the first value, in graph order, that a linear reads and that depends on both inputs.

    In a DiT that is x̂ · (1 + γ(t)) + β(t) ahead of the first block's attention. Raises PassError when there is none.
    """
    after_t, after_latent = _dependents(graph, timestep), _dependents(graph, latent)
    for linear in graph.linears():
        name = str(linear.value.name)
        if name in after_t and name in after_latent:
            return name
    raise PassError(f"no linear reads a value that depends on both {timestep!r} and {latent!r}: steps cannot be reused")


def cut(graph: Graph, value: str) -> Graph:
    """A copy of `graph` that computes `value` alone: nodes, constants and inputs that it does not need are gone.

    Raises PassError for a value that no node of the graph computes.
    """
    found = graph.copy()
    wanted = found.values().get(value)
    if wanted is None or not wanted.inputs:
        raise PassError(f"no node of the graph computes {value!r}")
    found.gs.outputs = [wanted]
    found.cleanup()
    found.gs.inputs = [one for one in found.gs.inputs if one.outputs]
    found.gs.name = "probe"
    return found


def _dependents(graph: Graph, name: str) -> set[str]:
    """Names of the values that depend on the graph input `name`."""
    found = {name}
    stack: list[Node] = [node for one in graph.gs.inputs if one.name == name for node in one.outputs]
    while stack:
        for tensor in stack.pop().outputs:
            if tensor.name not in found:
                found.add(tensor.name)
                stack += tensor.outputs
    return found
