"""Two-block DiTs that trace and export in seconds: random weights, recorded random trajectories.

Odd on purpose: 3 heads of 12 channels, an FFN of 70, 45 latent tokens, 5 prompt tokens.
"""

from __future__ import annotations

from typing import Any

import torch

from vdq_export.experts import Expert, Experts
from vdq_export.model import Model, Step, Trajectory

WIDTH, TOKENS, CALLS = 36, 45, 6
LATENT, PROMPT = (1, 3, 3, 6, 10), (1, 5, 20)
TIMESTEPS = (1000.0, 800.0, 550.0, 300.0, 120.0, 20.0)


def wan(seed: int = 0) -> torch.nn.Module:
    """WanTransformer3DModel of width 36 whose modulations and norms are far from their neutral initial values."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    torch.manual_seed(seed)
    network: torch.nn.Module = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=3,
        attention_head_dim=12,
        in_channels=3,
        out_channels=3,
        text_dim=PROMPT[-1],
        freq_dim=32,
        ffn_dim=70,
        num_layers=2,
        cross_attn_norm=True,
        rope_max_seq_len=16,
    )
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.ndim == 1:  # biases start at zero, norm weights at one: equal ones could be confused
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif "scale_shift_table" in name:
                parameter.copy_(0.3 * torch.randn_like(parameter))
    return network.eval()


def inputs(seed: int, t: float) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(LATENT, generator=generator),
        "timestep": torch.tensor([t]),
        "encoder_hidden_states": torch.randn(PROMPT, generator=generator),
    }


def trajectory(seed: int) -> Trajectory:
    """Both guidance branches at each of TIMESTEPS; the latent shrinks on the way."""
    steps: list[Step] = []
    for index, t in enumerate(TIMESTEPS):
        for offset, branch in enumerate(("cond", "uncond")):
            made = inputs(1000 * seed + 2 * index + offset, t)
            made["hidden_states"] = made["hidden_states"] * (1.0 - 0.1 * index)
            steps.append({"t": t, "branch": branch, "inputs": made})  # type: ignore[typeddict-item]
    return steps


def build(seed: int = 0, **settings: Any) -> Model:
    made = Model(wan(seed), inputs(7, 500.0), [trajectory(s) for s in range(2)], name="tiny")
    for name, value in settings.items():
        setattr(made, name, value)
    return made


def other() -> Model:
    """The same architecture with other weights."""
    return build(seed=1)


def two_experts() -> Model:
    """Two sets of weights that meet at t = 550, one of TIMESTEPS: the higher one's."""
    experts = Experts([Expert("high", wan(0), (550.0, 1000.0)), Expert("low", wan(1), (0.0, 550.0))])
    return Model(experts, inputs(7, 500.0), [trajectory(s) for s in range(2)], name="tiny-experts")


def nan_weight() -> Model:
    network = wan()
    with torch.no_grad():
        network.get_parameter("blocks.1.ffn.net.2.weight")[3, 5] = float("nan")
    return Model(network, inputs(7, 500.0), [trajectory(0)])


def nan_step() -> Model:
    """Sound weights, and a recorded latent that is not."""
    steps = list(trajectory(0))
    steps[4]["inputs"]["hidden_states"][0, 0, 0, 0, 0] = float("inf")
    return Model(wan(), inputs(7, 500.0), [steps])


def no_model() -> str:
    return "not a Model"


not_callable = 3
