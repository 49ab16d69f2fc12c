"""torch's exporters, made to write a static graph whose names are module paths.

torch.export traces the module, torch.onnx lowers it without its optimizer (which merges equal initializers and so loses
whose they are), and the values are renamed from the module stack each node carries. Weights are not copied: the graph's
large constants are views of the module's own tensors, or are left out where the module has none.
"""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import onnx
import onnx_ir as ir
import onnx_ir.passes.common as ir_passes
import torch
from onnxscript.optimizer import fold_constants

from vdq_export.errors import TraceError
from vdq_export.graph import INLINE_BYTES, OUTPUT, Array, Graph, Unbound
from vdq_export.model import first_tensor
from vdq_export.tracing.program import mended

OPSET = 21
PREFIX = "network"  # attribute name of the wrapped module; stripped from every name
_SCOPES = "pkg.torch.onnx.name_scopes"
_BARE = "vdq_export.bare"  # of a model's meta: Graph.bare


class _Wrapper(torch.nn.Module):
    """The user's module with a single tensor as its output. see: called with what the module answered."""

    def __init__(self, network: torch.nn.Module, see: Callable[[Any], None]) -> None:
        super().__init__()
        self.network, self._see = network, see

    def forward(self, **inputs: torch.Tensor) -> torch.Tensor:
        answer = self.network(**inputs)
        self._see(answer)
        return first_tensor(answer)


def to_onnx(name: str, network: torch.nn.Module, inputs: Mapping[str, torch.Tensor]) -> ir.Model:
    """What torch's exporter makes of `network`. Raises TraceError, which calls it `name`."""
    answers = list[Any]()
    with _quiet(), torch.no_grad():
        try:
            wrapped = _Wrapper(network, answers.append)
            program = mended(torch.export.export(wrapped, (), dict(inputs), strict=False))
            exported = torch.onnx.export(
                program, (), dynamo=True, opset_version=OPSET, optimize=False, verbose=False, output_names=[OUTPUT]
            )
        except TraceError:
            raise
        except Exception as error:  # the exporters raise whatever their internals raise
            first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise TraceError(f"{name} cannot be exported by torch {torch.__version__}: {first_line}") from error
    assert exported is not None
    exported.model.meta[_BARE] = isinstance(answers[0], torch.Tensor)
    return exported.model


def tidy(intermediate: ir.Model) -> None:
    """Fold, mend and name what the exporter made. No parameter's data is read: there may be none yet."""
    # Sequence ops (from split/unbind) have no place in a static graph; what reads weights stays for the passes.
    with _quiet():
        fold_constants(
            intermediate, onnx_shape_inference=False, should_fold=lambda n: False if _reads_weights(n) else None
        )
    _mend(intermediate)
    for step in (
        ir_passes.LiftConstantsToInitializersPass(lift_all_constants=True),
        ir_passes.IdentityEliminationPass(),
        ir_passes.RemoveUnusedNodesPass(),
    ):
        step(intermediate)
    _name_by_module(intermediate)


def to_graph(intermediate: ir.Model, source: str = "") -> Graph:
    """The graph of a tidied model."""
    arrays = _detach_weights(intermediate)
    proto = onnx.shape_inference.infer_shapes(ir.to_proto(intermediate), data_prop=True)
    graph = Graph.from_proto(proto, arrays, source=source)
    graph.bare = intermediate.meta[_BARE]
    graph.cleanup()
    return graph


def _reads_weights(node: ir.Node) -> bool:
    return any(v is not None and v.is_initializer() and str(v.name).startswith(PREFIX + ".") for v in node.inputs)


def _mend(model: ir.Model) -> None:
    """Replace what the exporter writes and no runtime takes.

    Squeeze(x) of an axis that is not 1 long     ->  Identity(x)                    what torch.squeeze does
    Where(c, a, b) of booleans (masked_fill)     ->  Or(And(c, a), And(Not(c), b))
    """
    for node in list(model.graph):
        if node.op_type == "Squeeze" and len(node.inputs) == 2 and _keeps_its_shape(node):
            node.op_type = "Identity"
            node.resize_inputs(1)
        elif node.op_type == "Where" and node.outputs[0].dtype == ir.DataType.BOOL:
            condition, chosen, other = node.inputs
            made = [ir.node("And", [condition, chosen]), ir.node("Not", [condition])]
            made.append(ir.node("And", [made[1].outputs[0], other]))
            for new in made:
                new.metadata_props.update(node.metadata_props)
                new.outputs[0].type = node.outputs[0].type
            model.graph.insert_before(node, made)
            node.op_type = "Or"
            node.resize_inputs(2)
            node.replace_input_with(0, made[0].outputs[0])
            node.replace_input_with(1, made[2].outputs[0])


def _keeps_its_shape(node: ir.Node) -> bool:
    before, after = node.inputs[0], node.outputs[0]
    return before is not None and before.shape is not None and before.shape == after.shape


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Exporters print and warn about their own internals; errors still raise."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)


def _module_path(node: ir.Node) -> str | None:
    """The innermost module a node was traced in, from the scopes torch recorded; None where it recorded none."""
    scopes = node.metadata_props.get(_SCOPES)
    if scopes is None:
        return None
    parts = [p.strip().strip("'\"") for p in scopes.strip("[]").split(",")] if isinstance(scopes, str) else list(scopes)
    return strip(parts[-2]) if len(parts) > 1 else ""


def strip(name: str) -> str:
    """The module path of what torch names by its place in the wrapper."""
    return "" if name == PREFIX else name.removeprefix(PREFIX + ".")


def _name_by_module(model: ir.Model) -> None:
    """Rename nodes to "<module path>/<Op>" and their first outputs alike; initializers to their parameter's path."""
    taken: defaultdict[str, int] = defaultdict(int)
    outputs = {id(value) for value in model.graph.outputs}
    inputs = {value.name for value in model.graph.inputs}

    def unique(name: str) -> str:
        count = taken[name]
        taken[name] += 1
        return f"{name}_{count}" if count else name

    for name in inputs:
        taken[str(name)] = 1
    named: set[int] = set()
    for name, value in list(model.graph.initializers.items()):
        if name.startswith(PREFIX + "."):
            value.name = unique(strip(name))
            named.add(id(value))
    for node in model.graph:
        path = _module_path(node)
        if path is None:  # made by a decomposition: it belongs where its first reader does
            readers = [r for o in node.outputs for r in o.consumers()]
            path = next((p for r in readers if (p := _module_path(r)) is not None), "")
        node.name = unique(f"{path}/{node.op_type}".lstrip("/"))
        for index, output in enumerate(node.outputs):
            if id(output) not in outputs:
                output.name = node.name if index == 0 else f"{node.name}:{index}"
        for index, operand in enumerate(node.inputs):
            if operand is not None and operand.is_initializer() and id(operand) not in named:
                operand.name = unique(f"{node.name}.{index}")  # the exporter's own: called after its first reader
                named.add(id(operand))


def _detach_weights(model: ir.Model) -> dict[str, Array | Unbound]:
    """Take large initializers out of the model: {name: array that shares the parameter's memory}.

    One that is out already, named by its parameter's path, becomes Unbound.
    """
    arrays: dict[str, Array | Unbound] = {}
    for name, value in model.graph.initializers.items():
        tensor: Any = value.const_value
        if isinstance(tensor, ir.ExternalTensor):
            arrays[name] = Unbound(str(tensor.name), tensor.shape.numpy(), tensor.dtype.numpy())
        elif tensor is not None and tensor.nbytes >= INLINE_BYTES:
            arrays[name] = tensor.numpy()
            value.const_value = left_out(tensor, name)
    return arrays


def left_out(tensor: Any, name: str) -> ir.ExternalTensor:
    """Stands for `tensor` where its data is elsewhere."""
    return ir.ExternalTensor("unset", 0, 0, tensor.dtype, shape=tensor.shape, name=name)
