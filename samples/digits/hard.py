"""`sample:digits-hard`: the sample's function with the outlier channels of billion-parameter models, by exact algebra.

A small trained network has linear inputs whose channels range alike (max/median 3); large ones have channels 10 to 100
times the median and a few massive activations on a few tokens. Each edit below is exact in real arithmetic; x̂ is a
normalised token, f a positive vector (log-normal, a few of 30 to 100), ⊙ per channel:

1. AdaLN before self-attention and FFN:  f ⊙ (x̂(1+γ)+β) = x̂(1+γ')+β' with γ' = fγ + (f−1), β' = fβ. γ and β are a row of
   the block's scale_shift_table plus rows of the time projection, so f is one vector for all blocks (the projection is
   shared), the rows are multiplied by f and the table takes f−1. The linears that read it are divided by f.
2. Affine norm before cross-attention: weight and bias times f, to_q divided by f; f of its own in each block. The
   prompt projection's outputs likewise, with one f, since to_k and to_v of every block read them.
3. Values: to_v's output channels times f, to_out's input channels divided by f, since attention mixes tokens, not
   channels. These vary with the token.
4. FFN: the hidden width grows by EXTRA. Most new units are twins: unit i's output weights w become w/4 and 3w/4 over
   two equal units. MASSIVE pairs are new units that fire on few tokens with values near GAIN, with output weights
   w and −w: they cancel in the sum, and still stretch the range of the FFN's second linear's input.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch

SEED = 31
EXTRA, MASSIVE = 64, 4  # new FFN units, and how many of them are massive pairs
GAIN, THRESHOLD = 160.0, 1.0  # a massive unit is GELU(GAIN · (projection − THRESHOLD)); the projection is near N(0, 1)
SIGMA, OUTLIERS = 0.6, 4  # of log f, and how many channels are raised to 30 … 100


def harden(base: torch.nn.Module) -> torch.nn.Module:
    """A new network that computes what `base` (a WanTransformer3DModel) does; `base` is not changed. Deterministic."""
    config = dict(cast(Mapping[str, Any], base.config))
    state = {name: tensor.detach().to(torch.float64, copy=True) for name, tensor in base.state_dict().items()}
    rng = np.random.Generator(np.random.PCG64(SEED))
    width = state["proj_out.weight"].shape[1]
    before_attention, before_ffn = _factors(rng, width), _factors(rng, width)
    for row, factor in ((0, before_attention), (3, before_ffn)):
        for name in ("weight", "bias"):
            rows = state[f"condition_embedder.time_proj.{name}"].unflatten(0, (6, width))  # views: edited in place
            rows[row : row + 2].mul_(factor.view(-1, *(1,) * (rows.ndim - 2)))
    for index in range(config["num_layers"]):
        block = f"blocks.{index}."
        for row, factor in ((0, before_attention), (3, before_ffn)):
            table = state[f"{block}scale_shift_table"]
            table[:, row : row + 2].mul_(factor)
            table[:, row + 1].add_(factor - 1)
        for name in ("to_q", "to_k", "to_v"):
            state[f"{block}attn1.{name}.weight"].div_(before_attention)
        state[f"{block}ffn.net.0.proj.weight"].div_(before_ffn)
        if config["cross_attn_norm"]:
            _scale(state, f"{block}norm2", [f"{block}attn2.to_q"], _factors(rng, width))
        for attention in ("attn1", "attn2"):
            _scale(state, f"{block}{attention}.to_v", [f"{block}{attention}.to_out.0"], _factors(rng, width))
        _widen(state, f"{block}ffn.net", before_ffn, rng)
    readers = [f"blocks.{index}.attn2.{name}" for index in range(config["num_layers"]) for name in ("to_k", "to_v")]
    _scale(state, "condition_embedder.text_embedder.linear_2", readers, _factors(rng, width))
    config["ffn_dim"] += EXTRA
    network = type(base)(**{name: value for name, value in config.items() if not name.startswith("_")})
    network.load_state_dict({name: tensor.float() for name, tensor in state.items()})
    return network.eval()


def _factors(rng: np.random.Generator, width: int) -> torch.Tensor:
    """[width] log-normal channel factors, OUTLIERS of them uniform in 30 … 100."""
    factors = np.exp(SIGMA * rng.standard_normal(width))
    factors[rng.choice(width, OUTLIERS, replace=False)] = rng.uniform(30, 100, OUTLIERS)
    return torch.from_numpy(factors)


def _scale(state: dict[str, torch.Tensor], producer: str, consumers: list[str], factor: torch.Tensor) -> None:
    """Outputs of `producer` (linear or norm) times factor, inputs of the linears `consumers` divided by it."""
    weight = state[f"{producer}.weight"]
    weight.mul_(factor if weight.ndim == 1 else factor[:, None])
    state[f"{producer}.bias"].mul_(factor)
    for consumer in consumers:
        state[f"{consumer}.weight"].div_(factor)


def _widen(state: dict[str, torch.Tensor], ffn: str, factor: torch.Tensor, rng: np.random.Generator) -> None:
    """Edit 4; `factor` is the one the FFN's input already carries."""
    into, bias, out = (state[f"{ffn}.{name}"] for name in ("0.proj.weight", "0.proj.bias", "2.weight"))
    hidden, width = into.shape
    massive = GAIN * _directions(rng, width) / factor
    fires = torch.full((MASSIVE,), -GAIN * THRESHOLD, dtype=into.dtype)
    copied = out[:, torch.from_numpy(rng.choice(hidden, MASSIVE, replace=False))]
    twins = torch.from_numpy(rng.choice(hidden, EXTRA - 2 * MASSIVE, replace=False))
    part = out[:, twins] * 0.25
    out[:, twins] *= 0.75
    state[f"{ffn}.0.proj.weight"] = torch.cat([into, into[twins], massive, massive])
    state[f"{ffn}.0.proj.bias"] = torch.cat([bias, bias[twins], fires, fires])
    state[f"{ffn}.2.weight"] = torch.cat([out, part, copied, -copied], 1)


def _directions(rng: np.random.Generator, width: int) -> torch.Tensor:
    """[MASSIVE, width] unit vectors: the projection of a normalised token onto one has a variance near 1."""
    vectors = rng.standard_normal((MASSIVE, width))
    return torch.from_numpy(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
