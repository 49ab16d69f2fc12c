"""Checkpoints of quantization-aware training: the integers in the bundle are those that training rounded to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.ao.quantization import FakeQuantize, MovingAverageMinMaxObserver, PerChannelMinMaxObserver

import vdq_export
from tests import diffusers_folders as folders
from vdq_export import recipe as recipes
from vdq_export.bundle import Bundle
from vdq_export.errors import ModelError, RecipeError
from vdq_export.sources import resolve
from vdq_export.weights.learned import is_learned

WEIGHTS = "diffusion_pytorch_model.safetensors"


def linears(network: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    return {name: one for name, one in network.named_modules() if isinstance(one, torch.nn.Linear)}


def trained(folder: Path, form: str) -> dict[str, torch.Tensor]:
    """A Wan with the scales of `form` beside its weights; {layer: the integers its own arithmetic gives, [N, K]}.

    The scales are not what a search would find: 0.9 to 1.1 of the largest weight.
    """
    network = folders.network("Wan")
    network.save_pretrained(folder)
    held, integers = load_file(folder / WEIGHTS), dict[str, torch.Tensor]()
    generator = torch.Generator().manual_seed(0)
    for name, layer in linears(network).items():
        weight = layer.weight.detach()
        peaks = weight.abs().amax(1) * (0.9 + 0.2 * torch.rand(len(weight), generator=generator))
        if form == "FakeQuantize":
            made = FakeQuantize(
                PerChannelMinMaxObserver, quant_min=-128, quant_max=127, dtype=torch.qint8,
                qscheme=torch.per_channel_symmetric, ch_axis=0,
            )  # fmt: skip
            made(weight)
            made.disable_observer()
            with torch.no_grad():
                made.scale.mul_(0.9)
                levels = made(weight) / made.scale[:, None]
            held |= {f"{name}.weight_fake_quant.{key}": x.clone() for key, x in made.state_dict().items()}
        elif form == "amax":
            levels = (weight * (127 / peaks[:, None])).round().clamp(-128, 127)
            held[f"{name}.weight_quantizer._amax"] = peaks[:, None].clone()
            held[f"{name}.input_quantizer._amax"] = torch.tensor(4.0)
        else:
            levels = (weight / (peaks / 127)[:, None]).round().clamp(-128, 127)
            held[f"{name}.weight_scale"] = peaks / 127
            held[f"{name}.input_scale"] = torch.tensor([0.03])
            held[f"{name}.input_zero_point"] = torch.tensor([100], dtype=torch.uint8)
        integers[name] = levels.round().to(torch.int8)
    save_file({key: x.contiguous() for key, x in held.items()}, folder / WEIGHTS)
    return integers


def weights_of(bundle: Bundle) -> dict[str, np.ndarray]:
    """{layer: its integers [K, N]} in all graphs."""
    found: dict[str, Any] = {}
    for path in sorted((bundle.path / "graphs").glob("*.onnx")):
        for tensor in onnx.load(path).graph.initializer:
            if tensor.name.endswith(".weight.int8"):
                found[tensor.name.removesuffix(".weight.int8")] = onnx.numpy_helper.to_array(tensor)
    return found


@pytest.mark.parametrize("form", ["FakeQuantize", "amax", "weight_scale"])
def test_integers_are_those_of_training(form: str, tmp_path: Path) -> None:
    """Also where a canonical pass put the channels of q and k into another order."""
    integers = trained(tmp_path / "model", form)
    spec = folders.spec(tmp_path / "model", steps=2, guidance=1)
    bundle = vdq_export.export(spec, target="ort-int8", isa="avx512_vnni", tsw=1, out=tmp_path / "b")
    stored = weights_of(bundle)
    (plan,) = bundle.plans
    layers = {one.name: one for one in plan.layers if one.quantized}
    assert stored.keys() == layers.keys()
    moved = 0
    for name, values in stored.items():
        ours, theirs = values.T, integers[name].numpy()
        same = np.array_equal(ours, theirs)
        moved += not same
        assert same or sorted(map(bytes, ours)) == sorted(map(bytes, theirs)), name
        weight = layers[name].weight
        assert weight is not None
        assert "learned in training" in weight.why
        assert layers[name].smoothing is None
        if form == "weight_scale" and layers[name].activation:
            assert (layers[name].activation[0].scale, layers[name].activation[0].zero_point) == (np.float32(0.03), 100)
        if form == "amax" and layers[name].activation:
            assert layers[name].activation[0].zero_point == 128
    assert 0 < moved < len(stored)  # q and k of the self-attention: rotary embedding in halves


def test_a_moved_channel_keeps_its_scale(tmp_path: Path) -> None:
    """Dequantized, the weights of the bundle are the fake-quantized ones of training, up to that order."""
    integers = trained(tmp_path / "model", "weight_scale")
    held = load_file(tmp_path / "model" / WEIGHTS)
    spec = folders.spec(tmp_path / "model", steps=2, guidance=1)
    bundle = vdq_export.export(spec, target="ort-int8", isa="avx512_vnni", tsw=1, out=tmp_path / "b")
    codes = weights_of(bundle)
    for layer in bundle.plans[0].layers:
        if layer.weight is not None and layer.name in codes:
            ours = codes[layer.name].T * np.array(layer.weight.scale, np.float32)[:, None]
            theirs = integers[layer.name].numpy() * held[f"{layer.name}.weight_scale"].numpy()[:, None]
            assert sorted(map(bytes, ours.astype(np.float32))) == sorted(map(bytes, theirs.astype(np.float32)))


def test_they_are_said_and_can_be_ignored(tmp_path: Path) -> None:
    trained(tmp_path / "model", "amax")
    model = resolve(folders.spec(tmp_path / "model", steps=2, guidance=1))
    assert any("layers have scales learned in training" in note for note in model.metadata["notes"])
    plain = recipes.load("static-asq")
    ignoring: Any = msgspec.structs.replace(plain, weights=msgspec.structs.replace(plain.weights, learned="ignore"))
    bundle = vdq_export.export(model, recipe=ignoring, target="ort-int8", tsw=1, out=tmp_path / "b")
    layers = [one for one in bundle.plans[0].layers if one.weight is not None]
    assert not any("learned" in one.weight.why for one in layers if one.weight is not None)
    assert any(one.smoothing is not None for one in layers)


def test_grids_that_a_target_lacks_are_refused(tmp_path: Path) -> None:
    """±127 on kernels that saturate beyond ±63."""
    trained(tmp_path / "model", "weight_scale")
    spec = folders.spec(tmp_path / "model", steps=2, guidance=1)
    with pytest.raises(RecipeError, match=r"learned integers.*avx2.*±63.*--isa"):
        vdq_export.export(spec, target="ort-int8", isa="avx2", tsw=1, out=tmp_path / "b")
    assert not (tmp_path / "b").exists()


BAD = {
    "weight_zero_point": ({"weight_scale": torch.ones(48), "weight_zero_point": torch.ones(48)}, "zero_point is not 0"),
    "groups": ({"weight_scale": torch.ones(48, 2)}, "scales of groups"),
    "negative": ({"weight_scale": -torch.ones(48)}, "not positive"),
    "input channels": ({"weight_scale": torch.ones(48), "input_scale": torch.ones(48)}, "one scale a tensor"),
}


@pytest.mark.parametrize("name", BAD)
def test_scales_that_cannot_be(name: str, tmp_path: Path) -> None:
    tensors, words = BAD[name]
    folders.transformer("Wan", tmp_path)
    held = load_file(tmp_path / WEIGHTS)
    save_file(held | {f"blocks.0.attn1.to_q.{key}": x for key, x in tensors.items()}, tmp_path / WEIGHTS)
    with pytest.raises(ModelError, match=words):
        resolve(folders.spec(tmp_path, steps=2))


def test_other_activations_observers_are_left_out() -> None:
    """What torch.ao and Model Optimizer keep beside scales is no weight of a network, and no other tensor is theirs."""
    observer = FakeQuantize(MovingAverageMinMaxObserver).state_dict()
    assert all(is_learned(f"blocks.0.ffn.activation_post_process.{key}") for key in observer)
    assert is_learned("a.output_quantizer._amax")
    assert not any(
        is_learned(name) for name in ("a.weight", "a.scale", "scale_shift_table", "a.weight_g", "weight_scale")
    )
