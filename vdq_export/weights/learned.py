"""Scales that quantization-aware training left in a checkpoint, beside the weights they belong to.

Read are, for a linear at the module path L (docs/bring-your-own-model.md has the table):

    L.weight_scale                         one number, or one an output channel; a level is round(w / scale)
    L.weight_fake_quant.scale              torch.ao's FakeQuantize: round(w · (1 / scale))
    L.weight_fake_quantizer.scale          torchao's FakeQuantizedLinear: the same
    L.weight_quantizer._amax               Model Optimizer and pytorch-quantization (also L._weight_quantizer._amax):
                                           round(w · (largest level / amax))
    L.input_scale, L.input_zero_point      of what L reads; also L.activation_fake_quantizer.scale and .zero_point,
                                           L.input_quantizer._amax, L._input_quantizer._amax

Weights are symmetric: a zero point other than 0 is refused. What such modules keep beside (observers, switches) is
left out.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np

from vdq_export.errors import ModelError
from vdq_export.weights.promise import Array

Kind = Literal["divided", "multiplied", "amax"]
_WEIGHTS: Mapping[str, Kind] = {
    "weight_scale": "divided",
    "weight_fake_quant.scale": "multiplied",
    "weight_fake_quantizer.scale": "multiplied",
    "weight_quantizer._amax": "amax",
    "_weight_quantizer._amax": "amax",
}
_INPUTS: Mapping[str, Kind] = {
    "input_scale": "divided",
    "activation_fake_quantizer.scale": "multiplied",
    "input_quantizer._amax": "amax",
    "_input_quantizer._amax": "amax",
}
_ZEROS = {
    "weight_scale": "weight_zero_point",
    "weight_fake_quant.scale": "weight_fake_quant.zero_point",
    "weight_fake_quantizer.scale": "weight_fake_quantizer.zero_point",
    "input_scale": "input_zero_point",
    "activation_fake_quantizer.scale": "activation_fake_quantizer.zero_point",
}
_QUANTIZERS = "weight_fake_quant|weight_fake_quantizer|activation_fake_quantizer|activation_post_process"
_OURS = re.compile(
    rf"(.+)\.({'|'.join(re.escape(one) for one in (*_WEIGHTS, *_INPUTS, *_ZEROS.values()))}"
    rf"|(?:{_QUANTIZERS}|_?(?:weight|input|output)_quantizer)\..+)"
)


@dataclass(frozen=True)
class LearnedLayer:
    """Of one linear: scale (or amax), float32 [1] or [N], and of its input (scale or amax, zero point), if there."""

    scale: Array
    kind: Kind
    origin: str  # name of the tensor
    input: tuple[float, int] | None = None
    input_kind: Kind = "divided"

    def grid(self, weight: Array, order: Array, levels: int) -> tuple[Array, Array]:
        """(scales float32 [N], the levels [K, N] that training rounded `weight` [K, N] to, as floats).

        order: each channel's number in the checkpoint. The arithmetic is that of the training's own modules, whose
        products round otherwise than quotients do.
        """
        told = np.broadcast_to(self.scale, (weight.shape[1],))[order]
        if self.kind == "amax":
            scale, found = told / np.float32(levels), np.rint(weight * (np.float32(levels) / told))
        else:
            scale = told
            found = np.rint(weight / told if self.kind == "divided" else weight * (np.float32(1) / told))
        return np.ascontiguousarray(scale), np.clip(found, -levels - 1, levels)

    def input_parameters(self) -> tuple[float, int] | None:
        """(scale, zero point as of a signed 8-bit integer) of the layer's input."""
        if self.input is None or self.input_kind != "amax":
            return self.input
        return float(np.float32(self.input[0]) / np.float32(127)), 0


@dataclass(frozen=True)
class Learned:
    """layers: by module path. weights: the checkpoint's own, "L.weight" [N, K], by which channels are found again."""

    layers: Mapping[str, LearnedLayer]
    weights: Mapping[str, Array]

    def digest(self) -> str:
        """sha256 over everything that was learned."""
        total = hashlib.sha256()
        for name, layer in sorted(self.layers.items()):
            total.update(f"{name}|{layer.kind}|{layer.input_kind}|{layer.input}|".encode() + layer.scale.tobytes())
        return total.hexdigest()

    def in_order(self, layer: str, weight: Array) -> tuple[Array, LearnedLayer] | None:
        """(for each output channel of `weight` [K, N] its number in the checkpoint, what was learned).

        None where a channel of `weight` is none of the checkpoint's: a pass folded something into it.
        """
        if layer not in self.layers or f"{layer}.weight" not in self.weights:
            return None
        stored = np.asarray(self.weights[f"{layer}.weight"], np.float32)
        rows = np.ascontiguousarray(np.asarray(weight, np.float32).T)
        if stored.shape != rows.shape:
            return None
        if np.array_equal(stored, rows):
            return np.arange(len(rows)), self.layers[layer]
        places: dict[bytes, list[int]] = {}
        for number in range(len(stored) - 1, -1, -1):
            places.setdefault(stored[number].tobytes(), []).append(number)
        order = [found.pop() if (found := places.get(row.tobytes())) else -1 for row in rows]
        return None if -1 in order else (np.array(order), self.layers[layer])


def is_learned(name: str) -> bool:
    """Whether a tensor of that name is a scale of training, or something its modules keep beside."""
    return _OURS.fullmatch(name) is not None


def read(names: Iterable[str], tensors: Mapping[str, Array], origin: str) -> Learned | None:
    """The scales among `names` of a checkpoint; None without any of a weight.

    origin: what the checkpoint is called. Raises ModelError for scales that cannot be: not positive, in groups, or with
    a zero point of a weight.
    """
    held = {name for name in names if is_learned(name)}
    layers: dict[str, LearnedLayer] = {}
    for name in sorted(held):
        for suffix, kind in _WEIGHTS.items():
            if not name.endswith(f".{suffix}"):
                continue
            layer = name.removesuffix(f".{suffix}")
            zero = f"{layer}.{_ZEROS[suffix]}" if suffix in _ZEROS else ""
            if zero in held and np.any(np.asarray(tensors[zero])):
                raise ModelError(
                    f"{origin}: {zero} is not 0, and weights are symmetric on every target",
                    hint="train with symmetric weights",
                )
            given, input_kind = _input(layer, held, tensors, origin)
            layers[layer] = LearnedLayer(_scale(name, tensors, origin), kind, name, given, input_kind)
    return Learned(layers, tensors) if layers else None


def _scale(name: str, tensors: Mapping[str, Array], origin: str) -> Array:
    found = np.asarray(tensors[name], np.float32)
    if found.size != max(found.shape, default=1):
        raise ModelError(
            f"{origin}: {name} is {list(found.shape)}: scales of groups are not read",
            hint="train with one scale an output channel",
        )
    if not np.all(np.isfinite(found)) or not np.all(found > 0):
        raise ModelError(f"{origin}: {name} holds scales that are not positive", hint="calibrate before saving")
    flat: Array = found.reshape(-1)
    return flat


def _input(
    layer: str, held: set[str], tensors: Mapping[str, Array], origin: str
) -> tuple[tuple[float, int] | None, Kind]:
    for suffix, kind in _INPUTS.items():
        name = f"{layer}.{suffix}"
        if name not in held:
            continue
        scale = _scale(name, tensors, origin)
        if scale.size != 1:
            raise ModelError(f"{origin}: {name} has {scale.size} scales", hint="activations have one scale a tensor")
        zero = f"{layer}.{_ZEROS[suffix]}" if suffix in _ZEROS else ""
        point = _signed(np.asarray(tensors[zero])) if zero in held else 0
        return (None if point is None else (float(scale[0]), point)), kind
    return None, "divided"


def _signed(stored: Array) -> int | None:
    """A zero point as of signed 8-bit levels; None where neither its type nor its value says what it counts from."""
    point = int(stored.reshape(-1)[0])
    if stored.dtype == np.int8 or point < 0:
        return point
    return point - 128 if stored.dtype == np.uint8 or point > 127 else None
