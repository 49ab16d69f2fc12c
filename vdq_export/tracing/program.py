"""What torch.export made of a network, mended where the exporter to ONNX has no answer.

Legend: k what depends on no input: buffers, constants, and what is computed from them.

    complex k (rotary tables as exp(iθ))              ->  a constant, computed here
    linalg_qr(p), p made of weights and constants     ->  a constant, computed here

Exact: torch computes the values, as it would when the network is called. Only these are touched: what ONNX can say is
left to it, and to the passes behind it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, InputSpec, TensorArgument
from torch.fx import Node

from vdq_export.errors import TraceError

_UNSAYABLE = (torch.ops.aten.linalg_qr.default,)  # no operator of ONNX; networks ask for it of weights only
_RANDOM = torch.Tag.nondeterministic_seeded


def mended(program: ExportedProgram) -> ExportedProgram:
    """`program` itself where nothing is amiss, else a functional one with the constants in place.

    Raises TraceError for such a value that depends on weights which are not there.
    """
    if not any(_is_complex(node) or node.target in _UNSAYABLE for node in program.graph.nodes):
        return program
    program = program.run_decompositions({})  # functional: no node changes what another one made
    known = _Known(program)
    values = {node: known.value(node) for node in known.frontier()}
    for number, (node, value) in enumerate(values.items()):
        _replace(program, node, value, f"mended_{number}")
    for node in list(program.graph.nodes):
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            program.graph.erase_node(node)  # they keep alive what nothing else reads
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


class _Known:
    """The nodes of a program that depend on no input, and their values."""

    def __init__(self, program: ExportedProgram) -> None:
        signature = program.graph_signature
        weights, buffers = signature.inputs_to_parameters, signature.inputs_to_buffers
        tensors = {**program.constants, **program.state_dict}
        paths = {**weights, **buffers, **signature.inputs_to_lifted_tensor_constants}
        self._given = {name: tensors[path] for name, path in paths.items()}
        self._held: dict[Node, Any] = {}
        self._paths: set[Node] = set()  # made of buffers and constants
        self._weighty: set[Node] = set()  # made of weights too
        self._amiss: set[Node] = set()  # cannot be left to the exporter, or made of such
        self._order = list(program.graph.nodes)
        for node in self._order:
            self._sort(node, weights)

    def _sort(self, node: Node, weights: dict[str, str]) -> None:
        sources = set(node.all_input_nodes)
        if node.op == "placeholder":
            known = node.name in self._given
            weighty = node.name in weights
        else:
            known = node.op == "call_function" and sources <= (self._paths | self._weighty)
            known &= _RANDOM not in getattr(node.target, "tags", ())
            weighty = bool(sources & self._weighty)
        if known:
            (self._weighty if weighty else self._paths).add(node)
            if (_is_complex(node) and not weighty) or node.target in _UNSAYABLE or sources & self._amiss:
                self._amiss.add(node)

    def frontier(self) -> list[Node]:
        """What is amiss and read by what is not, in the order of the program."""
        return [n for n in self._order if n in self._amiss and n.op != "placeholder" and set(n.users) - self._amiss]

    def value(self, node: Node) -> Any:
        """What `node` computes."""
        if node not in self._held:
            self._held[node] = self._given[node.name] if node.op == "placeholder" else self._computed(node)
        return self._held[node]

    def _computed(self, node: Node) -> Any:
        for source in node.all_input_nodes:
            if isinstance(self.value(source), FakeTensor):
                raise TraceError(f"{node.name} depends on weights", hint="load them and use trace()")
        args = torch.fx.map_arg(node.args, self.value)
        kwargs = torch.fx.map_arg(node.kwargs, self.value)
        with unset_fake_temporarily(), torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]


def _is_complex(node: Node) -> bool:
    value = node.meta.get("val")
    parts = value if isinstance(value, tuple | list) else [value]
    return any(isinstance(part, torch.Tensor) and part.is_complex() for part in parts)


def _replace(program: ExportedProgram, node: Node, value: torch.Tensor, name: str) -> None:
    """Let the readers of `node` read a constant of the program."""
    specs = program.graph_signature.input_specs
    place = next((i for i, spec in enumerate(specs) if spec.kind == InputKind.USER_INPUT), len(specs))
    before = [n for n in program.graph.nodes if n.op == "placeholder"][place]
    with program.graph.inserting_before(before):
        made = program.graph.placeholder(name)
    made.meta = dict(node.meta)
    specs.insert(place, InputSpec(InputKind.CONSTANT_TENSOR, TensorArgument(name), name, None))
    program.constants[name] = value.contiguous()
    node.replace_all_uses_with(made)
