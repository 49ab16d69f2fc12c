"""single_precision, rotary_pairs and onnxruntime's kernel behind them, on every form in which torch writes rotation."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.families import OTHERS
from vdq_export import ort, pipeline
from vdq_export.contract import PassContext
from vdq_export.graph import Graph
from vdq_export.model import Model
from vdq_export.trace import trace

TOKENS, HEADS, WIDTH = 6, 2, 8
ANGLES = torch.outer(torch.arange(TOKENS) + 0.5, 0.7 ** torch.arange(WIDTH // 2))  # [S, D/2]
TOLERANCE = 1e-6  # float32 rounding of a few sums
BEFORE = pipeline.CANONICAL[: pipeline.CANONICAL.index("single_precision")]


def complex_numbers(x: Tensor) -> Tensor:
    """[B, H, S, D], as AnyFlow and SkyReels-V2 write it."""
    table = torch.polar(torch.ones_like(ANGLES, dtype=torch.float64), ANGLES.double())
    pairs = torch.view_as_complex(x.transpose(1, 2).to(torch.float64).unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(3).type_as(x).transpose(1, 2)


def swapped_pairs(x: Tensor) -> Tensor:
    """[B, S, H, D], as HunyuanVideo, CogVideoX and LTX write it."""
    cos, sin = (table.repeat_interleave(2, dim=-1)[:, None] for table in (ANGLES.cos(), ANGLES.sin()))
    a, b = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    return x * cos + torch.stack([-b, a], dim=-1).flatten(3) * sin


def products(x: Tensor) -> Tensor:
    """[B, S, H, D], each element of a pair by itself."""
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = ANGLES.cos()[:, None], ANGLES.sin()[:, None]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(3)


def matrices(x: Tensor) -> Tensor:
    """[B, S, H, D], as Kandinsky writes it."""
    cos, sin = ANGLES.cos(), ANGLES.sin()
    turn = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))[:, None]
    return (turn * x.reshape(*x.shape[:-1], -1, 1, 2)).sum(dim=-1).reshape(x.shape)


FORMS = {one.__name__: one for one in (complex_numbers, swapped_pairs, products, matrices)}


class Net(nn.Module):
    """A projection, rotated; joint attention, so to speak: the first two tokens are not."""

    def __init__(self, rotate: Any) -> None:
        super().__init__()
        self.to_q = nn.Linear(5, HEADS * WIDTH)
        self.rotate = rotate

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        q = self.to_q(x).unflatten(-1, (HEADS, WIDTH)) + timestep
        return torch.cat([q[:, :2], self.rotate(q[:, 2:])], dim=1)


def traced(rotate: Any) -> tuple[Graph, dict[str, np.ndarray[Any, Any]]]:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(1, TOKENS + 2, 5), "timestep": torch.tensor([0.3])}
    model = Model(Net(rotate), inputs, [], name="net")
    return trace(model), {name: tensor.numpy() for name, tensor in inputs.items()}


def difference(graph: Graph, reference: Graph, feeds: dict[str, np.ndarray[Any, Any]]) -> float:
    expected, found = ort.run(reference, feeds)["sample"], ort.run(graph, feeds)["sample"]
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("form", FORMS)
def test_every_form_becomes_the_same_one(form: str) -> None:
    graph, feeds = traced(FORMS[form])
    reference = graph.copy()
    reports = {r.name: r for r in pipeline.run_passes(graph, pipeline.CANONICAL, PassContext())}
    assert reports["rotary_pairs"].applied == 1
    assert reports["rotary_pairs"].skipped == []
    assert difference(graph, reference, feeds) <= TOLERANCE
    ops = Counter(node.op for node in graph.nodes)
    assert ops["Gather"] == 1
    assert not {"Neg", "Sub", "Squeeze", "ReduceSum"} & set(ops)
    assert max(len(v.shape) for node in graph.nodes for v in node.outputs) == 4
    assert all(np.dtype(v.dtype) == np.float32 for node in graph.nodes for v in node.outputs)
    again = graph.hash()
    repeated = pipeline.run_passes(graph, ("single_precision", "rotary_pairs"), PassContext())
    assert [r.applied for r in repeated] == [0, 0]
    assert graph.hash() == again


@pytest.mark.parametrize("form", FORMS)
def test_onnxruntime_has_a_kernel_for_it(form: str) -> None:
    graph, feeds = traced(FORMS[form])
    reference = graph.copy()
    pipeline.run_passes(graph, (*pipeline.CANONICAL, "ort_rotary"), PassContext())
    (kernel,) = [node for node in graph.nodes if node.op == "RotaryEmbedding"]
    assert kernel.attrs["interleaved"] == 1
    assert difference(graph, reference, feeds) <= TOLERANCE


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_table_is_seen(form: str) -> None:
    """The comparison has teeth: one angle of one pair, 1 % off."""
    graph, feeds = traced(FORMS[form])
    reference = graph.copy()
    pipeline.run_passes(graph, pipeline.CANONICAL, PassContext())
    swap = next(node for node in graph.nodes if node.op == "Gather")
    product = swap.outputs[0].outputs[0]
    table = next(t for t in product.inputs if t is not swap.outputs[0])
    values = np.array(table.values)
    values.reshape(-1)[WIDTH] *= 1.01  # the second token's first pair
    table.values = values
    assert difference(graph, reference, feeds) > 10 * TOLERANCE


def test_pairs_that_turn_by_computed_angles_are_left() -> None:
    class Computed(nn.Module):
        def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
            a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
            return x + torch.stack([-b, a], dim=-1).flatten(1) * timestep

    inputs = {"x": torch.randn(3, 8), "timestep": torch.tensor([0.3])}
    graph = trace(Model(Computed(), inputs, [], name="computed"))
    report = pipeline.run_passes(graph, pipeline.CANONICAL, PassContext())[-1]
    assert report.name == "rotary_pairs"
    assert report.applied == 0
    assert [skip.why for skip in report.skipped] == ["the swapped pairs are not only multiplied by constants"]


def test_ort_rotary_says_when_a_pair_turns_by_two_angles() -> None:
    def uneven(x: Tensor) -> Tensor:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        cos, sin = ANGLES.cos()[:, None], ANGLES.sin()[:, None]
        return torch.stack([a * cos - b * sin, a * sin + b * (cos + 0.1)], dim=-1).flatten(3)

    graph, feeds = traced(uneven)
    reference = graph.copy()
    report = pipeline.run_passes(graph, (*pipeline.CANONICAL, "ort_rotary"), PassContext())[-1]
    assert [skip.why for skip in report.skipped] == ["the two channels of a pair turn differently"]
    assert difference(graph, reference, feeds) <= TOLERANCE


# -- doubles ---------------------------------------------------------------------------------------------------------


class Doubles(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.function((x * timestep).double()).float() + 1


def of_doubles(function: Any) -> tuple[Graph, Any]:
    inputs = {"x": torch.randn(3, 8), "timestep": torch.tensor([0.3])}
    graph = trace(Model(Doubles(function), inputs, [], name="doubles"))
    reference = graph.copy()
    pipeline.run_passes(graph, BEFORE, PassContext())
    (report,) = pipeline.run_passes(graph, ["single_precision"], PassContext())
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    assert difference(graph, reference, feeds) <= TOLERANCE
    return graph, report


def test_sums_and_products_of_doubles_become_single() -> None:
    table = torch.randn(8, dtype=torch.float64)
    graph, report = of_doubles(lambda x: torch.cat([-x[:, :4], x[:, 4:] * table[:4]], dim=1) - table)
    assert report.applied == 1
    assert "float64" not in {str(v.dtype) for node in graph.nodes for v in [*node.inputs, *node.outputs]}
    assert "Cast" not in {node.op for node in graph.nodes}


@pytest.mark.parametrize("function", [torch.sin, lambda x: x.long().double(), lambda x: x.half().double()])
def test_what_may_need_its_digits_keeps_them(function: Any) -> None:
    graph, report = of_doubles(function)
    assert report.applied == 0
    assert report.skipped
    assert any(str(v.dtype) == "float64" for node in graph.nodes for v in node.outputs)


def test_families_with_complex_tables_lose_doubles_from_their_blocks() -> None:
    graph = trace(OTHERS["AnyFlow"]())
    pipeline.run_passes(graph, pipeline.CANONICAL, PassContext())
    doubles = [n.name for n in graph.nodes if any(str(v.dtype) == "float64" for v in n.outputs)]
    assert [name for name in doubles if name.startswith("blocks")] == []
    assert Counter(n.op for n in graph.nodes if n.name.startswith("blocks"))["Gather"] == 4
