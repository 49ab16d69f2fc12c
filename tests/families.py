"""Tiny video DiTs of the families' files, with random weights, as vdq_export.Model: name -> build().

Norms, biases, modulations and tables are away from their neutral initial values, so that no rewrite can hide behind a
one or a zero. Trajectories are random: 4 timesteps, both guidance branches, each with one prompt throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from vdq_export.model import Model, Step, Trajectory
from vdq_export.sources import registry
from vdq_export.sources.families import FAMILIES as REGISTERED
from vdq_export.sources.families import Family, Input, Tiny

TIMESTEPS = (999.0, 700.0, 350.0, 20.0)


def network(family: Family, tiny: Tiny, seed: int = 0) -> torch.nn.Module:
    """The tiny network with random weights, called with all of its arguments."""
    torch.manual_seed(seed)
    made: torch.nn.Module = family.network_class()(**tiny.settings)
    with torch.no_grad():
        for path, parameter in made.named_parameters():
            if "table" in path:
                parameter.copy_(0.3 * torch.randn_like(parameter))
            elif parameter.ndim == 1:  # biases start at zero, norm weights at one: equal ones could be confused
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif not parameter.any():  # what starts as zero (last layers)
                parameter.copy_(0.1 * torch.randn_like(parameter))
    return made.eval()


def build(family: Family, tiny: Tiny) -> Model:
    """The tiny network as a Model, as a folder's would be; the last token of each mask is masked."""
    module: Any = network(family, tiny)
    config = dict(module.config)
    if family.prepare is not None:
        family.prepare(module)
    size = family.size(tiny.video, tiny.tokens)
    extra, latent = family.inputs(config, size), family.latent(config, size)
    fixed, weights = family.fixed(config, size), family.times(config, size) if family.times else None
    if fixed:
        module.forward = partial(module.forward, **fixed)

    def inputs(seed: int, t: float, scale: float, prompt: int) -> dict[str, torch.Tensor]:
        noise, words = (torch.Generator().manual_seed(one) for one in (seed, prompt))
        shapes = {"hidden_states": latent, **(family.also(config, size) if family.also else {})}
        made = {name: scale * torch.randn(shape, generator=noise) for name, shape in shapes.items()}
        made["timestep"] = _time(family, t) if weights is None else t * weights
        return made | {name: _given(name, one, words) for name, one in extra.items()}

    def trajectory(seed: int) -> Trajectory:
        steps: list[Step] = []
        for index, t in enumerate(TIMESTEPS):
            for offset, branch in enumerate(("cond", "uncond")):
                made = inputs(1000 * seed + 2 * index + offset, t, 1.0 - 0.1 * index, 500 + 2 * seed + offset)
                steps.append({"t": t, "branch": branch, "inputs": made})  # type: ignore[typeddict-item]
        return steps

    return Model(
        module, inputs(7, 500.0, 1.0, 8), [trajectory(s) for s in range(2)], name=f"tiny-{title(family, tiny)}"
    )


def _time(family: Family, t: float) -> torch.Tensor:
    return torch.tensor([int(t)] if family.integer_time else [t])


def _given(name: str, one: Input, generator: torch.Generator) -> torch.Tensor:
    made = one.make(generator)
    if "mask" in name:
        made[..., -1] = 0
    return made


def title(family: Family, tiny: Tiny) -> str:
    return f"{family.name}-{tiny.variant}" if tiny.variant else family.name


def tiny_of(name: str) -> tuple[Family, Tiny]:
    """The family and tiny configuration that a name of FAMILIES stands for."""
    return next((f, t) for f in REGISTERED for t in f.tiny if title(f, t) == name)


# Classes beyond the published families: traced and exported in test_family_generic, not compiled for every target.
OTHER_CLASSES = frozenset(
    f"{name}Transformer3DModel"
    for name in (
        "AnyFlow", "ChronoEdit", "ConsisID", "EasyAnimate", "Helios", "HunyuanVideoFramepack", "JoyImageEdit",
        "JoyImageEditPlus", "Kandinsky5", "Kandinsky6", "MiniMaxH3", "MotifVideo", "SanaVideo", "WanAnimate", "WanVACE",
    )
)  # fmt: skip
_ALL = {title(family, tiny): partial(build, family, tiny) for family in REGISTERED for tiny in family.tiny}
FAMILIES: Mapping[str, Callable[[], Model]] = {
    name: make for name, make in _ALL.items() if tiny_of(name)[0].class_name not in OTHER_CLASSES
}
OTHERS: Mapping[str, Callable[[], Model]] = {
    title(family, tiny): partial(build, family, tiny)
    for family in map(registry.of, sorted(OTHER_CLASSES))
    for tiny in family.tiny
}
