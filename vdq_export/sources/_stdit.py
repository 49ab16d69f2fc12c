"""Open-Sora's STDiT (v1), which diffusers does not have: written from its published description.

Shapes: B batch, T latent frames, S = H/p · W/p patches of a frame, N = T·S tokens, L text tokens, C width.

A block is spatial attention (within frames), temporal attention (within patches), cross-attention to the text and a
GELU FFN; one projection of the timestep gives all blocks their six modulations, each block adds a table of its own
(AdaLN-single). Parameters carry the names of the published checkpoints, so that their tensors bind as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

FREQUENCIES = 256  # of the timestep's embedding


def sinusoids(positions: Tensor, width: int, *, cosines_first: bool = False) -> Tensor:
    """[…] -> […, width]: sines, then cosines, of `positions` at width/2 frequencies from 1 down to 1/10000."""
    half = width // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * (-math.log(10000.0) / half))
    angles = positions.float()[..., None] * frequencies
    parts = [angles.cos(), angles.sin()] if cosines_first else [angles.sin(), angles.cos()]
    return torch.cat(parts, dim=-1)


def spatial_positions(rows: int, columns: int, width: int, scale: float) -> Tensor:
    """[rows · columns, C]: the column's sinusoids, then the row's."""
    row, column = (torch.arange(n, dtype=torch.float32) / scale for n in (rows, columns))
    grid = torch.meshgrid(row, column, indexing="ij")
    return torch.cat([sinusoids(grid[1], width // 2), sinusoids(grid[0], width // 2)], dim=-1).reshape(-1, width)


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


class _Mlp(nn.Module):
    def __init__(self, width: int, hidden: int, out: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = nn.Linear(hidden, out)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class _Attention(nn.Module):
    """Self-attention over the second axis of [batch, tokens, C]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return out


class _CrossAttention(nn.Module):
    """Attention of [B, N, C] to [B, L, C]; masked text tokens are not seen."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, seen: Tensor | None) -> Tensor:
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(text).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out: Tensor = self.proj(scaled_dot_product_attention(q, k, v, attn_mask=seen).transpose(1, 2).flatten(2))
        return out


class _Block(nn.Module):
    def __init__(self, width: int, heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = _Attention(width, heads)
        self.attn_temp = _Attention(width, heads)
        self.cross_attn = _CrossAttention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = _Mlp(width, int(width * mlp_ratio), width)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / width**0.5)

    def forward(
        self, x: Tensor, text: Tensor, t: Tensor, seen: Tensor | None, frames: int, temporal: Tensor | None
    ) -> Tensor:
        """x [B, N, C], text [B, L, C], t [B, 6·C]; temporal [T, C]: positions, where they are added."""
        table = self.scale_shift_table + t.reshape(len(t), 6, -1)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table.chunk(6, dim=1)
        batch, tokens, width = x.shape
        patches = tokens // frames
        inside = modulated(self.norm1(x), shift, scale)
        x = x + gate * self.attn(inside.reshape(batch * frames, patches, width)).reshape(x.shape)
        along = x.reshape(batch, frames, patches, width).transpose(1, 2)  # [B, S, T, C]
        if temporal is not None:
            along = along + temporal
        moved = self.attn_temp(along.flatten(0, 1)).reshape(batch, patches, frames, width).transpose(1, 2)
        x = x + gate * moved.flatten(1, 2)
        x = x + self.cross_attn(x, text, seen)
        out: Tensor = x + mlp_gate * self.mlp(modulated(self.norm2(x), mlp_shift, mlp_scale))
        return out


class _FinalLayer(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = nn.Linear(width, out)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / width**0.5)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + t[:, None]).chunk(2, dim=1)
        out: Tensor = self.linear(modulated(self.norm_final(x), shift, scale))
        return out


class STDiT(ModelMixin, ConfigMixin):  # type: ignore[misc]  # untyped there
    """[B, in_channels, T, H, W] -> [B, out_channels, T, H, W]: the noise and, behind it, its variance.

    space_scale, time_scale: what positions are divided by, 1 for the resolution a network was trained at first.
    """

    _keys_to_ignore_on_load_unexpected: Any = (r"^y_embedder\.y_embedding$", r"^pos_embed", r"^rope")

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self, in_channels: int = 4, out_channels: int = 8, patch_size: tuple[int, int, int] = (1, 2, 2),
        hidden_size: int = 1152, num_attention_heads: int = 16, num_layers: int = 28, mlp_ratio: float = 4.0,
        caption_channels: int = 4096, model_max_length: int = 120, space_scale: float = 1.0, time_scale: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__()  # type: ignore[no-untyped-call]
        patch = (patch_size[0], patch_size[1], patch_size[2])  # a list where it was read from a file
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv3d(in_channels, hidden_size, patch, stride=patch)})
        mlp = nn.Sequential(nn.Linear(FREQUENCIES, hidden_size), nn.SiLU(), nn.Linear(hidden_size, hidden_size))
        self.t_embedder = nn.ModuleDict({"mlp": mlp})
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = nn.ModuleDict({"y_proj": _Mlp(caption_channels, hidden_size, hidden_size)})
        self.blocks = nn.ModuleList(_Block(hidden_size, num_attention_heads, mlp_ratio) for _ in range(num_layers))
        self.final_layer = _FinalLayer(hidden_size, math.prod(patch) * out_channels)

    def forward(
        self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor,
        encoder_attention_mask: Tensor | None = None, return_dict: bool = True,
    ) -> Any:  # fmt: skip
        """timestep [B]; encoder_hidden_states [B, L, D]; encoder_attention_mask [B, L] of 0 and 1."""
        frames, rows, columns = (
            n // p for n, p in zip(hidden_states.shape[2:], self.config["patch_size"], strict=True)
        )
        width = self.config["hidden_size"]
        x = self.x_embedder["proj"](hidden_states).flatten(3).permute(0, 2, 3, 1)  # [B, T, S, C]
        x = (x + spatial_positions(rows, columns, width, self.config["space_scale"])).flatten(1, 2)
        temporal = sinusoids(torch.arange(frames, dtype=torch.float32) / self.config["time_scale"], width)
        t = self.t_embedder["mlp"](sinusoids(timestep, FREQUENCIES, cosines_first=True))
        modulations = self.t_block(t)
        text = self.y_embedder["y_proj"](encoder_hidden_states)
        seen = None if encoder_attention_mask is None else encoder_attention_mask[:, None, None, :].bool()
        for index, block in enumerate(self.blocks):
            x = block(x, text, modulations, seen, frames, temporal if index == 0 else None)
        sample = self._unpatchify(self.final_layer(x, t), frames, rows, columns)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)

    def _unpatchify(self, x: Tensor, frames: int, rows: int, columns: int) -> Tensor:
        """[B, N, pt·ph·pw·C'] -> [B, C', T, H, W]."""
        x = x.reshape(len(x), frames, rows, columns, *self.config["patch_size"], -1)
        return x.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
