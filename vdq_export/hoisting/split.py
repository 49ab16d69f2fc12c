"""Denoising-loop-invariant code motion: what does not change from step to step leaves the graph that runs at each.

Every value depends on some of the graph's inputs, and these on the latents, the timestep or the prompt (*roles*):

    depends on            goes to    runs                                   its values reach the body as
    nothing               –          –                                      (constants: stay with their readers)
    prompt                prompt     once a video and guidance branch       inputs, the same at every step
    timestep              step       once an export: tables()               rows of tables; step.onnx for other t
    timestep and prompt   mixed      once a video, branch and step          inputs; all steps can be run ahead
    latents               body       every step

What may move is a dataflow analysis; what does move is the cheapest cut (hoisting_cut). The class of its own for
timestep *and* prompt is what makes it worth while for models that add the pooled prompt to the timestep's embedding
(HunyuanVideo, Mochi): all their modulations depend on both. It saves no operations of a video, but their weights are
not loaded while the body runs, and before its first step all steps can be run, one after another, by one graph.

Exact: every node keeps its operator, attributes and operands, only the graph it stands in changes; without fusions by
the runtime the outputs are equal to the last bit (`error` says so). Nodes, values and weights keep their names, so a
plan made for the whole graph finds its layers in the parts. The nodes that make the graph's outputs stay in the body.

`prompt` is every input known before the first step; a runtime has to run prompt and mixed again when one changes.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnxruntime

from vdq_export import ort
from vdq_export.errors import PassError
from vdq_export.graph import Array, Graph, Node, Value, is_constant
from vdq_export.hoisting import cut as hoisting_cut
from vdq_export.plan import HoistedPart

Role = Literal["latents", "timestep", "prompt"]
Part = HoistedPart
Feeds = Mapping[str, Array]
_BITS: Mapping[Role, int] = {"latents": 1, "timestep": 2, "prompt": 4}
_PARTS: Mapping[int, Part] = {2: "step", 4: "prompt", 6: "mixed"}
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli"}


@dataclass(frozen=True)
class Work:
    """What a graph holds. multiply_adds: of one run. weight_bytes: each constant once."""

    nodes: int
    weight_bytes: int
    multiply_adds: int


@dataclass(frozen=True)
class Crossing:
    """A value that `part` makes and the body (or `mixed`) takes under the same name."""

    name: str
    part: Part
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True)
class Hoisted:
    """A graph in parts; those that would be empty are None. `whole`: the work of the graph before.

    crossings: in the order of the parts' outputs. `mixed` may take values of `prompt` and of the tables, the body
    values of all three; beside them each takes those of the graph's own inputs that it still reads.
    """

    prompt: Graph | None
    step: Graph | None
    mixed: Graph | None
    body: Graph
    whole: Work
    crossings: tuple[Crossing, ...]

    def parts(self) -> dict[str, Graph]:
        """The graphs there are, in the order in which they run; "body" is the last."""
        return {**dict[str, Graph](self.ahead().items()), "body": self.body}

    def ahead(self) -> dict[Part, Graph]:
        """Those of the graphs that run before the body."""
        named: dict[Part, Graph | None] = {"prompt": self.prompt, "step": self.step, "mixed": self.mixed}
        return {name: graph for name, graph in named.items() if graph is not None}

    def moved(self) -> float:
        """Share of the weight bytes that left the body."""
        return 1.0 - work(self.body).weight_bytes / self.whole.weight_bytes if self.whole.weight_bytes else 0.0


def roles(inputs: Iterable[str], timestep: str, constant: Collection[str]) -> dict[str, Role]:
    """The role of each of a model's inputs. constant: those that no step of a guidance branch changes."""
    found: dict[str, Role] = {name: "prompt" if name in constant else "latents" for name in inputs}
    return {**found, timestep: "timestep"}


def layers(graph: Graph, roles: Mapping[str, Role]) -> dict[str, Part]:
    """{linear that is best computed ahead: the part it is in}, in graph order. Raises what split() raises."""
    hoisted = split(graph, roles)
    body = {linear.name for linear in hoisted.body.linears()}
    found = {x.name: part for part, one in hoisted.ahead().items() for x in one.linears() if x.name not in body}
    return {linear.name: found[linear.name] for linear in graph.linears() if linear.name in found}


def split(graph: Graph, roles: Mapping[str, Role], chosen: Collection[str] | None = None) -> Hoisted:
    """`graph` (left as it is; weights are shared) in the parts that run once a video, once an export, and every step.

    roles: of every input of the graph; further names are ignored. chosen: the linears that are computed ahead, no other
    ones (what layers() gave, of this graph or of one it was rewritten from); None: those worth it. Raises PassError for
    an input without a role, and for graphs with If, Loop or Scan, whose reads it does not follow.
    """
    whole = graph.copy()
    whole.cleanup()
    depends = _dependencies(whole, roles)
    nodes = {bits: [n for n in whole.nodes if _bits(n, depends) == bits] for bits in range(8)}
    early = [node for node in whole.nodes if _bits(node, depends) in _PARTS]
    body = [node for bits in range(1, 8, 2) for node in nodes[bits]]
    inputs = [value for value in whole.gs.inputs if depends[value.name] in _PARTS]
    constants = {name for name, bits in depends.items() if bits == 0}
    kept = {str(value.name) for value in whole.gs.outputs}
    settled = set[str]()
    for linear in whole.linears() if chosen is not None else ():
        if linear.name in (chosen or ()):
            settled.add(str(linear.matmul.name))
        else:
            kept.add(str(linear.matmul.outputs[0].name))
    ahead = hoisting_cut.cheapest(early, inputs, body, constants=constants, kept=kept, settled=settled)
    crossing = _crossing(early, ahead, [n for n in [*early, *body] if n.name not in ahead])
    # Of what is computed ahead, the same question again: what mixed reads is either handed to it or computed in it.
    mixed = [node for node in nodes[6] if node.name in ahead]
    simple = [node for node in early if node.name in ahead and _bits(node, depends) != 6]
    before = hoisting_cut.cheapest(simple, inputs, mixed, constants=constants, crossing=crossing)
    inside = [node for node in [*simple, *mixed] if node.name not in before]
    handed = _crossing(simple, before, inside) | {v for v in crossing if depends[v] != 6}
    made = {part: {v for v in crossing | handed if depends[v] == bits} for bits, part in _PARTS.items()}
    parts = {part: _part(whole, part, made[part], handed if part == "mixed" else ()) for part in made}
    return Hoisted(
        prompt=parts["prompt"],
        step=parts["step"],
        mixed=parts["mixed"],
        body=_cut(whole, None, crossing),
        whole=work(whole),
        crossings=tuple(
            Crossing(value.name, part, tuple(map(int, value.shape)), hoisting_cut.nbytes(value))
            for part in ("prompt", "step", "mixed")
            if (one := parts[part]) is not None
            for value in one.gs.outputs
        ),
    )


def _dependencies(graph: Graph, roles: Mapping[str, Role]) -> dict[str, int]:
    """The bits of what each value depends on; 0 for what constants alone give."""
    missing = [value.name for value in graph.gs.inputs if value.name not in roles]
    if missing:
        raise PassError(f"no role for the input {missing[0]!r}", hint="say latents, timestep or prompt for every input")
    found = {str(value.name): _BITS[roles[value.name]] for value in graph.gs.inputs}
    for node in graph.nodes:
        if node.op in ("If", "Loop", "Scan"):
            raise PassError(f"{node.name}: invariants are not looked for around {node.op}", hint="export without them")
        bits = _BITS["latents"] if node.op in _RANDOM else 0  # drawn anew at every step
        for value in node.inputs:
            bits |= 0 if is_constant(value) or not value.name else found[value.name]
        found.update((str(value.name), bits) for value in node.outputs)
    return found


def _bits(node: Node, depends: Mapping[str, int]) -> int:
    return depends[node.outputs[0].name]


def _crossing(nodes: Sequence[Node], ahead: Collection[str], readers: Sequence[Node]) -> set[str]:
    """Values that those of `nodes` that are `ahead` make for `readers`."""
    at = {id(node) for node in readers}
    made = (value for node in nodes if node.name in ahead for value in node.outputs)
    return {str(value.name) for value in made if any(id(reader) in at for reader in value.outputs)}


def _part(whole: Graph, part: Part, outputs: Collection[str], handed: Collection[str]) -> Graph | None:
    made = _cut(whole, outputs, handed) if outputs else None
    if made is not None:
        made.gs.name = part
    return made


def _cut(whole: Graph, outputs: Collection[str] | None, inputs: Collection[str]) -> Graph:
    """What `outputs` (None: the graph's own) need of `whole` if `inputs` are given, in its order, as its own graph."""
    made = whole.copy()
    values: list[Value] = [value for node in made.nodes for value in node.outputs]
    if outputs is not None:
        made.gs.outputs = [value for value in values if value.name in outputs]
    given = [value for value in values if value.name in inputs]
    for value in given:
        value.inputs.clear()
    made.cleanup()
    finals = {value.name for value in made.gs.outputs}
    made.gs.inputs = [value for value in [*made.gs.inputs, *given] if value.outputs or value.name in finals]
    return made


def work(graph: Graph) -> Work:
    """What `graph` holds and does; weights are not read."""
    nodes = graph.nodes
    held = sum(hoisting_cut.nbytes(constant) for constant in graph.constants())
    return Work(len(nodes), held, sum(hoisting_cut.multiply_adds(node) for node in nodes))


def tables(step: Graph, timesteps: Sequence[float]) -> dict[str, Array]:
    """{output of the `step` graph: [steps, …], a row for each of `timesteps`}, operators run as they stand.

    Raises PassError for a timestep that the input's type cannot carry.
    """
    made = ort.session(step, exact=True)
    names = [str(value.name) for value in step.gs.outputs]
    rows = [made.run(names, _timestep(step, t)) for t in timesteps]
    return {name: np.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def _timestep(step: Graph, t: float) -> dict[str, Array]:
    """The timestep input of `step`, filled with t."""
    (value,) = step.gs.inputs
    kind = hoisting_cut.element_type(value)
    if np.issubdtype(kind, np.integer) and t != int(t):
        raise PassError(f"the timestep {t} is no {kind}, as the input {value.name!r} is", hint="give integer timesteps")
    return {str(value.name): np.full(tuple(value.shape), t, kind)}


def recompose(hoisted: Hoisted, steps: Sequence[Feeds]) -> list[dict[str, Array]]:
    """The outputs of the parts put together, at each of `steps` (inputs of the untouched graph) of one branch.

    As a host runs them: prompt once, on the first step's inputs; the others at each step.
    """
    sessions = {name: ort.session(graph, exact=True) for name, graph in hoisted.parts().items()}
    outputs: list[dict[str, Array]] = []
    once = _run(sessions["prompt"], steps[0]) if "prompt" in sessions else {}
    for feeds in steps:
        values = {**feeds, **once}
        for name in ("step", "mixed"):
            if name in sessions:
                values |= _run(sessions[name], values)
        outputs.append(_run(sessions["body"], values))
    return outputs


def error(graph: Graph, hoisted: Hoisted, steps: Sequence[Feeds]) -> float:
    """max|parts − graph| / max|graph| over the outputs at `steps` of one branch; 0.0 where all bits are equal."""
    whole = ort.session(graph, exact=True)
    worst = 0.0
    for feeds, made in zip(steps, recompose(hoisted, steps), strict=True):
        for name, expected in _run(whole, feeds).items():
            if not np.array_equal(made[name], expected, equal_nan=True):
                scale = float(np.abs(expected).max()) or 1.0
                found = float(np.abs(made[name] - expected).max()) / scale
                worst = max(worst, found if np.isfinite(found) else np.inf)
    return worst


def _run(session: onnxruntime.InferenceSession, values: Feeds) -> dict[str, Array]:
    names = [value.name for value in session.get_outputs()]
    feeds = {value.name: values[value.name] for value in session.get_inputs()}
    return dict(zip(names, session.run(names, feeds), strict=True))
