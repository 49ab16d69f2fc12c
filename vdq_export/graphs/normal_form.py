"""A graph as deterministic text, weights left out: small enough to commit, readable in a review."""

from __future__ import annotations

from vdq_export.diff.values import SMALL, describe
from vdq_export.graphs.view import GraphView, Param


def normal_form(view: GraphView, *, values: bool = True) -> str:
    """One line an operator, in topological order with ties by name, whatever the order in the file.

    blocks.0.to_q/MatMul: MatMul(x f32[1,128,192], blocks.0.to_q.weight=f32[192,192]) -> f32[1,128,192]

    values: print single numbers (scales) to 4 significant digits, so that a golden tells when one changed but not on
    which machine it was computed, and short integer vectors (shapes); False leaves them out too. Ends in a newline.
    """
    opsets = ", ".join(f"{domain} {version}" for domain, version in sorted(view.opsets.items()))
    lines = [f"opset {opsets}"]
    lines += [f"input {name} {view.types.get(name, '?')}" for name in view.inputs]
    for op in view.ops:
        read = ", ".join(_operand(view, name, values) for name in op.inputs)
        attrs = "".join(f" {name}={value}" for name, value in op.attrs)
        made = ", ".join(_result(view, name, op.name) for name in op.outputs)
        lines.append(f"{op.name}: {op.type}({read}){attrs} -> {made}")
    lines += [f"output {name} {view.types.get(name, '?')}" for name in view.outputs]
    return "\n".join(lines) + "\n"


def _operand(view: GraphView, name: str, values: bool) -> str:
    param = view.params.get(name)
    if param is None:
        return f"{name} {view.types[name]}" if name in view.types else name or "absent"
    return f"{name}={_constant(param, values)}"


def _constant(param: Param, values: bool) -> str:
    shown = param.elements == 1 or (param.type.dtype == "int64" and param.elements <= SMALL)
    return describe(param, digits=4) if values and shown else str(param.type)


def _result(view: GraphView, name: str, op: str) -> str:
    kind = str(view.types.get(name, "?"))
    return kind if name in (op, "") else f"{name} {kind}"
