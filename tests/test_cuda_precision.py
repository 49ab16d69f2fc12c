"""Which floats of a lowered program keep float32, and what would become of them otherwise."""

from __future__ import annotations

import numpy as np
import torch
from onnx import TensorProto

from tests.cuda_models import model_of, op, stream
from vdq_export.targets.cuda.lower import lower


def test_angles_are_exact_in_sixteen_bits() -> None:
    """cos(987 · f): bfloat16 has 987 as 988 and knows f to 3 digits, which is off by radians."""
    rates = np.exp(-np.arange(32) / 4).astype(np.float32)
    nodes = [op("Unsqueeze", "t axis", "column"), op("Mul", "column rates", "angle"), op("Cos", "angle", "y")]
    model = model_of(nodes, {"t": (1,)}, {"y": (1, 32)}, {"rates": rates, "axis": np.array([1])})
    found = lower(model, dtype=torch.bfloat16)({"t": torch.tensor([987.0])})["y"].numpy()
    assert np.abs(found - np.cos(np.float32(987) * rates)).max() < 1e-5


def test_squares_do_not_overflow_in_float16() -> None:
    nodes = [
        op("Conv", "x one", "v"), op("Pow", "v two", "square"), op("ReduceMean", "square last", "mean"),
        op("Sqrt", "mean", "root"), op("Div", "v root", "y"),
    ]  # fmt: skip
    constants = {"two": np.float32(2), "last": np.array([-1]), "one": np.ones((1, 1, 1), np.float32)}
    model = model_of(nodes, {"x": (1, 1, 64)}, {"y": (1, 1, 64)}, constants)
    x = torch.linspace(300, 2000, 64).reshape(1, 1, 64)
    found = lower(model, dtype=torch.float16)({"x": x})["y"]
    assert torch.allclose(found, x / x.square().mean().sqrt(), rtol=2e-3)


def test_a_row_that_is_all_mask_is_no_nan_in_sixteen_bits() -> None:
    """−3.4·10³⁸ is −∞ in 16 bits, and the softmax of a row of it NaN."""
    lowest = np.float32(np.finfo(np.float32).min)
    nodes = [
        op("MatMul", "q k", "scores"), op("Where", "seen zero lowest", "mask"), op("Add", "scores mask", "logits"),
        op("Softmax", "logits", "y"),
    ]  # fmt: skip
    constants = {"zero": np.float32(0), "lowest": lowest, "k": np.eye(8, dtype=np.float32)}
    model = model_of(nodes, {"q": (1, 4, 8), "seen": (1, 1, 8)}, {"y": (1, 4, 8)}, constants)
    model.graph.input[1].type.tensor_type.elem_type = TensorProto.BOOL
    found = lower(model, dtype=torch.float16)
    assert found({"q": torch.ones(1, 4, 8), "seen": torch.zeros(1, 1, 8, dtype=torch.bool)})["y"].isfinite().all()


def test_the_residual_stream_is_float32_unless_told() -> None:
    x = torch.ones(1, 4, 16)
    exact = (1 + 1 / 600) ** 16
    kept = lower(stream(), dtype=torch.bfloat16)({"x": x})["y"]
    rounded = lower(stream(), dtype=torch.bfloat16, residual=torch.bfloat16)({"x": x})["y"]
    assert (kept / exact - 1).abs().max() < 1e-3
    assert (rounded / exact - 1).abs().max() > 2e-2


def test_what_a_program_takes_and_gives() -> None:
    """Large inputs and those of products have the compute type, small ones stay; outputs are as the graph says."""
    large = (1, 1024, 512)
    nodes = [op("Mul", "x gain", "scaled"), op("MatMul", "scaled w", "y")]
    shapes = {"x": large, "gain": (1, 1, 512)}
    model = model_of(nodes, shapes, {"y": (1, 1024, 8)}, {"w": np.ones((512, 8), np.float32)})
    program = lower(model, dtype=torch.bfloat16)
    assert [(one.name, one.shape, one.dtype) for one in program.inputs] == [
        ("x", large, torch.bfloat16), ("gain", (1, 1, 512), torch.float32),
    ]  # fmt: skip
    assert [(one.name, one.shape, one.dtype) for one in program.outputs] == [("y", (1, 1024, 8), torch.float32)]
    assert program.weight_bytes == 512 * 8 * 2
