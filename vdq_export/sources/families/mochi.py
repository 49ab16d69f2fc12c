"""Mochi: joint attention of two widths, learned rotary frequencies, masked text tokens left out of the attention."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from vdq_export.sources.families._family import Family, Published, Tiny, text_and_mask


class _MaskedAttention:
    """Attention of video and text tokens [B, S, *] to each other, without the keys that the mask [B, L] excludes.

    diffusers' own takes masked tokens out, so that its shapes depend on the mask. The rows of masked tokens differ from
    it; no other token ever reads them. Masks must exclude the end of the text, as tokenizers pad it.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        video, words = hidden_states.shape[1], encoder_hidden_states.shape[1]
        query, key, value = (
            torch.cat([_heads(attn, one(hidden_states), norm, image_rotary_emb),
                       _heads(attn, other(encoder_hidden_states), added)], dim=2)
            for one, other, norm, added in (
                (attn.to_q, attn.add_q_proj, attn.norm_q, attn.norm_added_q),
                (attn.to_k, attn.add_k_proj, attn.norm_k, attn.norm_added_k),
                (attn.to_v, attn.add_v_proj, None, None),
            )
        )  # fmt: skip
        if image_rotary_emb is None:
            raise ValueError("Mochi's blocks give rotary tables")
        everywhere = torch.ones(attention_mask.shape[0], video, dtype=torch.bool)
        kept = torch.cat([everywhere, attention_mask.bool()], dim=1)[:, None, None]
        joined = scaled_dot_product_attention(query, key, value, attn_mask=kept)
        seen, said = joined.transpose(1, 2).flatten(2, 3).split_with_sizes((video, words), dim=1)
        if hasattr(attn, "to_add_out"):
            said = attn.to_add_out(said)
        return attn.to_out[1](attn.to_out[0](seen)), said


def _heads(attn: Any, x: torch.Tensor, norm: Any, tables: Any = None) -> torch.Tensor:
    """[B, S, heads·D] -> [B, heads, S, D], normed; rotated where there are tables and a norm (queries and keys)."""
    x = x.reshape(*x.shape[:2], attn.heads, -1)
    if norm is not None:
        x = norm(x)
        if tables is not None:
            x = _rotate(x, *tables)
    return x.transpose(1, 2)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each pair of neighbours (a, b) in the last axis, turned: (a·cos - b·sin, a·sin + b·cos)."""
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1).flatten(-2)


def _prepare(network: torch.nn.Module) -> None:
    blocks: Any = network.get_submodule("transformer_blocks")
    for block in blocks:
        block.attn1.processor = _MaskedAttention()


def _sigmas(steps: int) -> list[float]:
    """A straight line to 1 - 0.025, then a parabola, as the pipeline has it."""
    from diffusers.pipelines.mochi import pipeline_mochi

    schedule: Any = pipeline_mochi.linear_quadratic_schedule
    return [float(one) for one in schedule(steps, 0.025)]


FAMILY = Family(
    name="Mochi",
    class_name="MochiTransformer3DModel",
    pipelines=("MochiPipeline",),
    video=(85, 480, 848),
    steps=64,
    guidance=4.5,
    temporal=6,
    sigmas=_sigmas,
    scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True},
    inputs=text_and_mask,
    prepare=_prepare,
    published=(Published("Mochi 1 preview", {}, 10.028e9, 677),),
    tiny=(
        Tiny(
            {
                "num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "in_channels": 4,
                "pooled_projection_dim": 16, "text_embed_dim": 32, "time_embed_dim": 16, "max_sequence_length": 8,
            },
            (7, 64, 64),
        ),
    ),
)  # fmt: skip
