"""The graphs look as they did when somebody last looked at them; `make goldens` accepts what they look like now."""

from __future__ import annotations

import random
from difflib import unified_diff

import onnx
import pytest

from tests.goldens import FOLDER, GOLDENS, current
from tests.graphs import quantized_linear, transformer
from vdq_export.graphs.normal_form import normal_form
from vdq_export.graphs.view import from_proto


@pytest.mark.parametrize("name", GOLDENS)
def test_golden(name: str) -> None:
    path = FOLDER / f"{name}.txt"
    assert path.is_file(), "no golden yet: run `make goldens` and read what it wrote"
    golden, now = path.read_text(encoding="utf-8"), current(name)
    lines = unified_diff(golden.splitlines(), now.splitlines(), "golden", "now", lineterm="")
    assert golden == now, "run `make goldens` if this is meant\n" + "\n".join(lines)


def test_no_golden_without_a_graph() -> None:
    assert {path.stem for path in FOLDER.glob("*.txt")} == set(GOLDENS)


def test_order_of_nodes_in_the_file_does_not_matter() -> None:
    model, other = transformer(2), onnx.ModelProto()
    other.CopyFrom(model)
    nodes = list(other.graph.node)
    random.Random(1).shuffle(nodes)
    del other.graph.node[:]
    other.graph.node.extend(nodes)
    assert normal_form(from_proto(model)) == normal_form(from_proto(other))


def test_a_scale_shows_unless_values_are_left_out() -> None:
    a, b = (from_proto(quantized_linear(scale)) for scale in (0.05, 0.06))
    assert normal_form(a) != normal_form(b)
    assert normal_form(a, values=False) == normal_form(b, values=False)
