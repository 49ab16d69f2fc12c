"""`sample:digits-moe`: two copies of the sample's network, each fine-tuned on one range of noise, as Wan2.2's two are.

The ranges meet at BOUNDARY, which is the higher one's. Wan2.2's boundary is 0.875 of the noise schedule for
text-to-video and 0.9 for image-to-video; what counts is how a sampler's steps fall: with the shifts these use (12 and
5) the high-noise expert serves about 26 and 15 of 40. Our shift is 2: 0.875 would leave it 5 steps of 20; 0.7 gives
each expert 10, and lies between two steps (709.7 and 666.7), so no rounding of t decides whose one is.

An expert is stored as its difference from the base network: matrices as int8 with one scale an output row, all else in
fp16. base + difference *is* the expert: every score and every comparison is of these weights.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

BOUNDARY = 700.0
RANGES: dict[str, tuple[float, float]] = {"high": (BOUNDARY, 1000.0), "low": (0.0, BOUNDARY)}
_SCALE = "#scale"  # suffix of the scales of a matrix's codes

State = Mapping[str, torch.Tensor]


def weights_name(expert: str) -> str:
    """File name of an expert's difference, beside weights.safetensors."""
    return f"weights-{expert}.safetensors"


def encode(base: State, tuned: State) -> dict[str, torch.Tensor]:
    """The difference as it is stored; float32 in. A matrix row whose values are equal in both gets codes of zero."""
    stored: dict[str, torch.Tensor] = {}
    for name, tensor in tuned.items():
        difference = (tensor - base[name]).float()
        if difference.ndim != 2:
            stored[name] = difference.half().contiguous()
            continue
        scale = difference.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        stored[name] = torch.round(difference / scale[:, None]).to(torch.int8).contiguous()
        stored[name + _SCALE] = scale.contiguous()
    return stored


def decode(base: State, stored: State) -> dict[str, torch.Tensor]:
    """The expert's float32 weights. Raises KeyError when `stored` lacks one of the base's tensors or a scale."""
    tuned: dict[str, torch.Tensor] = {}
    for name, tensor in base.items():
        difference = stored[name].float()
        if stored[name].dtype == torch.int8:
            difference = difference * stored[name + _SCALE][:, None]
        tuned[name] = tensor.float() + difference
    return tuned
