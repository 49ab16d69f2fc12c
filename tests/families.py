"""Tiny video DiTs of the families in diffusers, with random weights, as vdq_export.Model: name -> build().

Norms, biases, modulations and tables are away from their neutral initial values, so that no rewrite can hide behind a
one or a zero. Trajectories are random: 4 timesteps, both guidance branches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from vdq_export.model import Model, Step, Trajectory

TIMESTEPS = (999.0, 700.0, 350.0, 20.0)
Shapes = Mapping[str, tuple[int, ...]]


def _fix(network: torch.nn.Module, **fixed: Any) -> torch.nn.Module:
    """`network` with arguments that no step changes (sizes, tables) given once."""
    network.forward = partial(network.forward, **fixed)  # type: ignore[method-assign]
    return network


def _network(name: str, seed: int = 0, **settings: Any) -> torch.nn.Module:
    import diffusers.models.transformers as transformers

    torch.manual_seed(seed)
    network: torch.nn.Module = getattr(transformers, name)(**settings)
    with torch.no_grad():
        for path, parameter in network.named_parameters():
            if "table" in path:
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif parameter.ndim == 1:  # biases start at zero, norm weights at one: equal ones could be confused
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif not parameter.any():  # what starts as zero (last layers)
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return network.eval()


def _model(
    name: str, network: torch.nn.Module, shapes: Shapes, *, integer_time: bool = False, masks: Shapes | None = None
) -> Model:
    """`shapes`: of the float inputs beside the timestep, the latent first. masks: 0/1 inputs, the last token masked."""

    def inputs(seed: int, t: float, scale: float) -> dict[str, torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        made = {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}
        made[next(iter(shapes))] *= scale
        made["timestep"] = torch.tensor([int(t)] if integer_time else [t])
        for key, shape in (masks or {}).items():
            made[key] = torch.ones(shape, dtype=torch.int64)
            made[key][..., -1] = 0
        return made

    def trajectory(seed: int) -> Trajectory:
        steps: list[Step] = []
        for index, t in enumerate(TIMESTEPS):
            for offset, branch in enumerate(("cond", "uncond")):
                made = inputs(1000 * seed + 2 * index + offset, t, 1.0 - 0.1 * index)
                steps.append({"t": t, "branch": branch, "inputs": made})  # type: ignore[typeddict-item]
        return steps

    return Model(network, inputs(7, 500.0, 1.0), [trajectory(s) for s in range(2)], name=f"tiny-{name}")


def wan() -> Model:
    """Cross-attention, rotary embedding by strided assignment, unpatchify of rank 8."""
    network = _network(
        "WanTransformer3DModel", num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4,
        text_dim=32, freq_dim=32, ffn_dim=96, num_layers=2, cross_attn_norm=True, rope_max_seq_len=16,
    )  # fmt: skip
    return _model("wan", network, {"hidden_states": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, 8, 32)})


def cogvideox() -> Model:
    """Joint attention over text and video, learned positions, integer timesteps."""
    network = _network(
        "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=16, text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=9,
        max_text_seq_length=8,
    )  # fmt: skip
    shapes = {"hidden_states": (1, 3, 4, 8, 8), "encoder_hidden_states": (1, 8, 32)}
    return _model("cogvideox", network, shapes, integer_time=True)


def cogvideox_rotary() -> Model:
    """The 5B form: rotary embedding of the video tokens, tables given from outside."""
    network = _network(
        "CogVideoXTransformer3DModel", num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=16, text_embed_dim=32, num_layers=2, sample_width=8, sample_height=8, sample_frames=9,
        max_text_seq_length=8, use_rotary_positional_embeddings=True,
    )  # fmt: skip
    angles = torch.outer(torch.arange(48.0), 0.5 ** torch.arange(8)).repeat_interleave(2, dim=1)
    network = _fix(network, image_rotary_emb=(angles.cos(), angles.sin()))
    shapes = {"hidden_states": (1, 3, 4, 8, 8), "encoder_hidden_states": (1, 8, 32)}
    return _model("cogvideox-rotary", network, shapes, integer_time=True)


def ltx() -> Model:
    """Norms without gain, RMS norm across heads, a mask over the prompt; the latent is a row of tokens."""
    network = _network(
        "LTXVideoTransformer3DModel", num_attention_heads=2, attention_head_dim=24, in_channels=8, out_channels=8,
        cross_attention_dim=48, num_layers=2, caption_channels=32,
    )  # fmt: skip
    shapes = {"hidden_states": (1, 32, 8), "encoder_hidden_states": (1, 8, 32)}
    fixed = _fix(network, num_frames=2, height=4, width=4)
    return _model("ltx", fixed, shapes, masks={"encoder_attention_mask": (1, 8)})


def latte() -> Model:
    """Spatial and temporal blocks in turn: frames, then patches, are the batch. Unpatchify by Einsum."""
    network = _network(
        "LatteTransformer3DModel", num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=8,
        num_layers=2, cross_attention_dim=48, attention_bias=True, sample_size=8, patch_size=2, caption_channels=32,
        activation_fn="gelu-approximate", norm_type="ada_norm_single", norm_elementwise_affine=False, norm_eps=1e-6,
        num_embeds_ada_norm=1000, video_length=4,
    )  # fmt: skip
    shapes = {"hidden_states": (1, 4, 4, 8, 8), "encoder_hidden_states": (1, 8, 32)}
    return _model("latte", network, shapes, integer_time=True)


def mochi() -> Model:
    """Joint attention of two widths, learned rotary frequencies. It takes masked tokens out, so the mask is fixed."""
    network = _network(
        "MochiTransformer3DModel", num_attention_heads=2, attention_head_dim=16, num_layers=2, in_channels=4,
        pooled_projection_dim=16, text_embed_dim=32, time_embed_dim=16, max_sequence_length=8,
    )  # fmt: skip
    shapes = {"hidden_states": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, 8, 32)}
    mask = torch.ones(1, 8, dtype=torch.int64)
    mask[:, -1] = 0
    return _model("mochi", _fix(network, encoder_attention_mask=mask), shapes)


def allegro() -> Model:
    """Rotary embedding of three axes computed from positions, cross-attention to a masked prompt."""
    network = _network(
        "AllegroTransformer3DModel", num_attention_heads=2, attention_head_dim=24, num_layers=2, in_channels=4,
        out_channels=4, cross_attention_dim=48, sample_height=8, sample_width=8, sample_frames=2, caption_channels=32,
    )  # fmt: skip
    shapes = {"hidden_states": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, 8, 32)}
    return _model("allegro", network, shapes, integer_time=True, masks={"encoder_attention_mask": (1, 8)})


def hunyuan_video() -> Model:
    """Dual- and single-stream blocks, a token refiner, a masked prompt, embedded guidance."""
    network = _network(
        "HunyuanVideoTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        num_layers=1, num_single_layers=1, num_refiner_layers=1, text_embed_dim=32, pooled_projection_dim=16,
        rope_axes_dim=(4, 6, 6), patch_size=2,
    )  # fmt: skip
    shapes = {
        "hidden_states": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, 8, 32), "pooled_projections": (1, 16),
    }  # fmt: skip
    fixed = _fix(network, guidance=torch.tensor([6000.0]))
    return _model("hunyuan-video", fixed, shapes, masks={"encoder_attention_mask": (1, 8)})


def cosmos() -> Model:
    """Rotary and learned positions, low-rank modulation."""
    network = _network(
        "CosmosTransformer3DModel", in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16,
        num_layers=2, text_embed_dim=32, adaln_lora_dim=8, max_size=(4, 16, 16), concat_padding_mask=False,
    )  # fmt: skip
    shapes = {"hidden_states": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, 8, 32)}
    return _model("cosmos", network, shapes)


def skyreels() -> Model:
    """Wan's blocks under another name, complex rotary tables."""
    network = _network(
        "SkyReelsV2Transformer3DModel", num_attention_heads=2, attention_head_dim=24, in_channels=4, out_channels=4,
        text_dim=32, freq_dim=32, ffn_dim=96, num_layers=2, rope_max_seq_len=16,
    )  # fmt: skip
    return _model("skyreels", network, {"hidden_states": (1, 4, 2, 8, 8), "encoder_hidden_states": (1, 8, 32)})


FAMILIES: dict[str, Callable[[], Model]] = {
    "Wan": wan, "CogVideoX": cogvideox, "CogVideoX-rotary": cogvideox_rotary, "LTX": ltx, "Latte": latte,
    "Mochi": mochi, "Allegro": allegro, "HunyuanVideo": hunyuan_video, "Cosmos": cosmos, "SkyReelsV2": skyreels,
}  # fmt: skip
