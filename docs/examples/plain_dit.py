"""A plain video DiT of 60 lines, and below it what vdq-export has to be told: the sampler and the factory."""

import math
from itertools import pairwise

import numpy as np
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

import vdq_export

WIDTH, HEADS, BLOCKS = 96, 4, 3
CHANNELS, FRAMES, SIZE, PATCH = 3, 4, 16, 2  # the latent: [1, 3, 4, 16, 16]
TOKENS, TEXT_WIDTH = 8, 32  # the prompt: [1, 8, 32]


def heads(x: torch.Tensor) -> torch.Tensor:
    """[B, S, WIDTH] to [B, HEADS, S, WIDTH / HEADS]."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(WIDTH)
        self.norm3 = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.q, self.kv, self.cross = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: torch.Tensor, text: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        a, b, gate, c, d, gate2 = self.modulation(time).unsqueeze(1).chunk(6, dim=-1)
        q, k, v = (heads(one) for one in self.qkv(self.norm1(x) * (1 + a) + b).chunk(3, dim=-1))
        x = x + gate * self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        k, v = (heads(one) for one in self.kv(text).chunk(2, dim=-1))
        q = heads(self.q(self.norm2(x)))
        x = x + self.cross(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + gate2 * self.ffn(self.norm3(x) * (1 + c) + d)


class PlainDiT(nn.Module):
    """Predicts the velocity of the latent x [1, C, F, H, W] at timestep [1] under text [1, L, D]."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Linear(CHANNELS * PATCH * PATCH, WIDTH)
        self.positions = nn.Parameter(0.2 * torch.randn(1, FRAMES * (SIZE // PATCH) ** 2, WIDTH))
        self.text, self.time = nn.Linear(TEXT_WIDTH, WIDTH), nn.Sequential(nn.Linear(64, WIDTH), nn.SiLU())
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm, self.last = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, CHANNELS * PATCH * PATCH)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        side = SIZE // PATCH
        tokens = x.reshape(1, CHANNELS, FRAMES, side, PATCH, side, PATCH).permute(0, 2, 3, 5, 1, 4, 6)
        tokens = self.patches(tokens.reshape(1, FRAMES * side * side, -1)) + self.positions
        angles = timestep[:, None] * torch.exp(-math.log(10000.0) * torch.arange(32) / 32)
        time, text = self.time(torch.cat([angles.cos(), angles.sin()], dim=-1)), self.text(text)
        for block in self.blocks:
            tokens = block(tokens, text, time)
        tokens = self.last(self.norm(tokens)).reshape(1, FRAMES, side, side, CHANNELS, PATCH, PATCH)
        return tokens.permute(0, 4, 1, 2, 5, 3, 6).reshape(1, CHANNELS, FRAMES, SIZE, SIZE)


class Sampler:
    """Flow matching, Euler steps, classifier-free guidance. A case is a number that stands for a prompt and a seed."""

    steps, guidance = 8, 3.0

    def generate(self, denoiser, case, observer=None):
        """Clip number `case`, [C, F, H, W] in [0, 1]. `observer`, where there is one, is shown each call's inputs."""
        noise = torch.Generator().manual_seed(case)
        x = torch.randn(1, CHANNELS, FRAMES, SIZE, SIZE, generator=noise)
        text = {"cond": torch.randn(1, TOKENS, TEXT_WIDTH, generator=noise)}  # a real one comes from a text encoder
        text["uncond"] = torch.zeros(1, TOKENS, TEXT_WIDTH)
        sigmas = torch.linspace(1.0, 0.0, self.steps + 1).tolist()
        for sigma, following in pairwise(sigmas):
            made = {}
            for branch in ("cond", "uncond"):
                inputs = {"x": x, "timestep": torch.tensor([1000.0 * sigma]), "text": text[branch]}
                if observer is not None:
                    observer({"t": 1000.0 * sigma, "branch": branch, "inputs": inputs})
                with torch.no_grad():
                    made[branch] = denoiser(**inputs)  # the network, or a bundle, which answers as the network does
            velocity = made["uncond"] + self.guidance * (made["cond"] - made["uncond"])
            x = x + (following - sigma) * velocity
        return np.asarray((x[0] / 2 + 0.5).clamp(0, 1))

    def describe(self, case):
        return f"case {case}"

    def settings(self):
        return {"name": "euler", "steps": self.steps, "guidance": self.guidance}


def factory() -> vdq_export.Model:
    torch.manual_seed(0)
    network = PlainDiT().eval()  # yours: network.load_state_dict(safetensors.torch.load_file("weights.safetensors"))
    sampler = Sampler()

    def trajectories():
        for case in range(100, 104):  # a handful of prompts and seeds, other ones than verify takes
            calls = []
            sampler.generate(network, case, observer=calls.append)
            yield calls

    example = {
        "x": torch.zeros(1, CHANNELS, FRAMES, SIZE, SIZE),
        "timestep": torch.zeros(1),
        "text": torch.zeros(1, TOKENS, TEXT_WIDTH),
    }
    return vdq_export.Model(network, example, trajectories, name="plain_dit", sampler=sampler)
