"""Mapped weights: read where they lie, hashed in one pass that finds NaN and Inf, found by any of their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from vdq_export.errors import ModelError
from vdq_export.model import Model
from vdq_export.sources import _weights
from vdq_export.weights import checkpoint as checkpoints
from vdq_export.weights.checkpoint import Checkpoint

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
    "c": torch.tensor([0.5], dtype=torch.float16),
    "d": torch.tensor(3, dtype=torch.int64),
    "e": torch.empty(0, 4),
    "odd": torch.tensor([1, 2, 3], dtype=torch.uint8),
}


def saved(file: Path, **changes: torch.Tensor) -> Checkpoint:
    save_file({**TENSORS, **changes}, file)
    return Checkpoint.open([file])


def test_tensors_are_views_of_the_file(tmp_path: Path) -> None:
    found = saved(tmp_path / "w.safetensors")
    assert dict(found.items()).keys() == TENSORS.keys()
    assert found["a"] is found["a"]
    assert isinstance(found["a"], np.memmap)
    assert not found["a"].flags.writeable
    assert found["b"].dtype == ml_dtypes.bfloat16
    for name, tensor in TENSORS.items():
        np.testing.assert_array_equal(found[name].astype(np.float64), tensor.double().numpy())
    assert found.nbytes == sum(tensor.nbytes for tensor in TENSORS.values())
    assert found.nbytes_computed == found.nbytes + 2 * 2 + 2


def test_shards_are_one_checkpoint(tmp_path: Path) -> None:
    save_file({"a": TENSORS["a"]}, tmp_path / "1.safetensors")
    save_file({"b": TENSORS["b"]}, tmp_path / "2.safetensors")
    found = Checkpoint.open([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert list(found) == ["a", "b"]
    with pytest.raises(ModelError, match=r"tensor a is in .*1\.safetensors and in .*1\.safetensors"):
        Checkpoint.open([tmp_path / "1.safetensors"] * 2)


@pytest.mark.parametrize(
    "changes",
    [
        {"a": TENSORS["a"].T.contiguous()},
        {"a": TENSORS["a"].clone().index_put_((torch.tensor(1), torch.tensor(2)), torch.tensor(6.0))},
        {"b": TENSORS["b"].to(torch.float16)},
        {"odd": torch.tensor([1, 2, 4], dtype=torch.uint8)},
        {"new": torch.zeros(1)},
    ],
    ids=["shape", "value", "type", "integer", "name"],
)
def test_the_digest_sees_it(changes: dict[str, torch.Tensor], tmp_path: Path) -> None:
    digest = saved(tmp_path / "w.safetensors").digest()
    assert saved(tmp_path / "same.safetensors").digest() == digest
    assert saved(tmp_path / "other.safetensors", **changes).digest() != digest


def test_the_digest_does_not_depend_on_how_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digest = saved(tmp_path / "w.safetensors").digest()
    monkeypatch.setattr(checkpoints, "_CHUNK", 6)  # ends inside numbers of four and of eight bytes
    assert Checkpoint.open([tmp_path / "w.safetensors"]).digest() == digest


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_nan_and_inf_are_found(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    bad = torch.full((3, 700), torch.finfo(dtype).max, dtype=dtype)
    saved(tmp_path / "w.safetensors", bad=bad).digest()
    bad[2, 699] = value
    with pytest.raises(ModelError, match=r"w\.safetensors: weight bad holds NaN or Inf"):
        saved(tmp_path / "w.safetensors", bad=bad).digest()


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    saved(tmp_path / "w.safetensors")
    whole = (tmp_path / "w.safetensors").read_bytes()
    (tmp_path / "w.safetensors").write_bytes(whole[:-1])
    with pytest.raises(ModelError, match=r"w\.safetensors is no whole safetensors file"):
        Checkpoint.open([tmp_path / "w.safetensors"])


class _Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(3, 3, bias=False)
        self.second = torch.nn.Linear(3, 3, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("offset", torch.zeros(3))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.second(self.first(hidden_states)) + self.offset * timestep
        return found


@pytest.mark.parametrize("name", ["first.weight", "second.weight"])
def test_a_shared_parameter_is_stored_once_under_any_of_its_names(name: str, tmp_path: Path) -> None:
    """And its network, with a saved buffer, traces to what torch computes."""
    from vdq_export.trace import trace

    file = tmp_path / "w.safetensors"
    kept = {name: torch.randn(3, 3), "offset": torch.ones(3)}
    save_file(kept, file)
    with _weights._without_weights():
        module = _Tied()
    found, notes = _weights._checked(module, dict.fromkeys(kept, file), tmp_path, ())
    assert not notes
    assert len(found) == 2
    assert found["first.weight"] is found["second.weight"]
    network = _weights.Network(module, "_Tied", {}, (), found, _Tied)
    inputs: dict[str, Any] = {"hidden_states": torch.randn(1, 4, 3), "timestep": torch.ones(1)}
    model = Model(module, inputs, [], checkpoint=found, make=network.make)
    assert trace(model).source == model.weight_hash()  # which compares the graph with the network
    wanted = inputs["hidden_states"] @ kept[name].T @ kept[name].T + 1
    torch.testing.assert_close(model(**inputs), wanted)


def test_a_model_that_does_not_fit_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vdq_export.weights import on_demand

    file = tmp_path / "w.safetensors"
    save_file({"weight": torch.ones(3, 3)}, file)
    with torch.device("meta"):
        module = torch.nn.Linear(3, 3, bias=False)
    monkeypatch.setattr(on_demand, "fits", lambda checkpoint: False)
    inputs = {"input": torch.ones(1, 3), "timestep": torch.ones(1)}
    model = Model(module, inputs, [], name="big", checkpoint=Checkpoint.open([file]), make=lambda: module)
    with pytest.raises(ModelError, match=r"big: its weights take .* GB in float32.*calibration record"):
        model.materialized()
