"""fold_constants: shapes that depend on constants become static, and so does what is computed from them."""

from __future__ import annotations

import numpy as np

from tests.hexagon_cases import graph, noise, with_form
from vdq_export import ort

TOKENS, WIDTH = 6, 4
KEPT = np.array([1, 1, 0, 1, 0, 0])


def test_tokens_taken_out_by_a_fixed_mask_have_a_static_shape() -> None:
    """Mochi's prompt tokens: x[mask], then as many zeros as were taken out."""
    nodes = [
        ("NonZero", ["mask"], "places", {}),
        ("Transpose", ["places"], "rows", {"perm": [1, 0]}),
        ("GatherND", ["x", "rows"], "kept", {}),
        ("Shape", ["kept"], "size", {"end": 1}),
        ("Sub", ["all", "size"], "missing", {}),
        ("Concat", ["zeros", "missing", "zero"], "pads", {"axis": 0}),
        ("Pad", ["kept", "pads"], "padded", {}),
        ("Mul", ["padded", "two"], "y", {}),
    ]
    constants = {"mask": KEPT, "all": np.array([TOKENS]), "zeros": np.array([0, 0]), "zero": np.array([0])}
    made = graph({"x": (TOKENS, WIDTH)}, nodes, two=np.float32(2), **constants)
    folded = with_form(made, "fold_constants")
    assert [node.op for node in folded.nodes] == ["GatherND", "Pad", "Mul"]
    assert list(folded.values()["kept"].shape) == [int(KEPT.sum()), WIDTH]
    assert list(folded.values()["padded"].shape) == [TOKENS, WIDTH]
    feeds = {"x": noise(TOKENS, WIDTH)}
    assert np.array_equal(ort.run(made, feeds)["y"], ort.run(folded, feeds)["y"])
