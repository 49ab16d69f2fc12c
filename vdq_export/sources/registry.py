"""The registry of video transformer families: those with a file in sources/families, and what the rest asks for.

A class without a file can still be taken where its forward asks for nothing but KNOWN arguments: what each of them is
follows from the configuration (generic()).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

from vdq_export.sources.families import (
    CHANNELS,
    FAMILIES,
    TEXT_WIDTHS,
    Family,
    Input,
    Published,
    Size,
    Tiny,
    _generic,
    find,
    mask,
    text,
)

__all__ = [
    "FAMILIES",
    "Family",
    "Published",
    "Support",
    "Tiny",
    "classes",
    "example_inputs",
    "find",
    "generic",
    "of",
    "support",
]

SUFFIX = "Transformer3DModel"
KNOWN = (
    "hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask", "encoder_hidden_states_mask",
    "pooled_projections", "guidance",
)  # fmt: skip
POOLED_WIDTHS = ("pooled_projection_dim", "in_text_dim2")  # of pooled_projections; the first that is set
GUIDANCE = 6.0  # embedded guidance where nothing says another


@dataclass(frozen=True)
class Support:
    """What is known of one class. support: "registered" (a file of its own), "generic" (nothing unknown is asked for)
    or "unsupported"; detail: the video it is made for, what is taken, or what is in the way. tried: a tiny
    configuration is exported in the tests; pipelines: classes that use it."""

    name: str
    class_name: str
    support: Literal["registered", "generic", "unsupported"]
    detail: str
    published: tuple[str, ...] = ()
    tried: bool = False
    pipelines: tuple[str, ...] = ()


def of(class_name: str) -> Family:
    """The family of a transformer class; of a class without a file, what its signature says."""
    return find(class_name) or generic(class_name)


def generic(class_name: str) -> Family:
    """What the signature of a class's forward says, files left aside."""
    kind = classes().get(class_name)
    known = () if kind is None else tuple(inspect.signature(kind.forward).parameters)

    def inputs(config: Mapping[str, Any], size: Size) -> dict[str, Input]:
        """Of KNOWN arguments those that the network takes, asked for or not: pipelines give them."""
        made = text(config, size) if "encoder_hidden_states" in known or kind is None else {}
        masks = ("encoder_attention_mask", "encoder_hidden_states_mask")
        made |= {name: mask(size) for name in masks if name in known}
        width = next((config[name] for name in POOLED_WIDTHS if config.get(name)), None)
        if "pooled_projections" in known and width is not None:
            made["pooled_projections"] = Input((1, int(width)))
        if "guidance" in known and config.get("guidance_embeds"):
            made["guidance"] = Input((1,), value=1000 * GUIDANCE)
        return made

    tried = _generic.TRIED.get(class_name)
    return Family(class_name.removesuffix(SUFFIX), class_name, inputs=inputs, tiny=(tried,) if tried else ())


def classes() -> dict[str, type[torch.nn.Module]]:
    """{class name: class} of every video transformer in the installed release of diffusers."""
    import diffusers.models.transformers as transformers

    return {name: getattr(transformers, name) for name in sorted(dir(transformers)) if name.endswith(SUFFIX)}


def support() -> list[Support]:
    """What is known of each class: registered families first, by name."""
    found = classes()
    known = [_registered(one) for one in FAMILIES]
    taken = {one.class_name for one in known}
    return known + [_other(name, kind) for name, kind in found.items() if name not in taken]


def _registered(family: Family) -> Support:
    frames, height, width = family.video or (0, 0, 0)
    video = f"{frames} frames of {height}×{width}, " if family.video else ""
    return Support(
        family.name,
        family.class_name,
        "registered",
        f"{video}{family.text_tokens} text tokens",
        tuple(one.name for one in family.published),
        tried=bool(family.tiny),
        pipelines=family.pipelines,
    )


def _required(kind: type[torch.nn.Module]) -> list[str]:
    """Arguments that a class's forward must be given."""
    return [p.name for p in list(inspect.signature(kind.forward).parameters.values())[1:] if p.default is p.empty]


def _other(class_name: str, kind: type[torch.nn.Module]) -> Support:
    """A class by its signature: what forward requires, and what its configuration says of channels and text."""
    required = _required(kind)
    settings = inspect.signature(kind).parameters
    name = class_name.removesuffix(SUFFIX)
    if class_name in _generic.REFUSED:
        return Support(name, class_name, "unsupported", _generic.REFUSED[class_name])
    if unknown := [argument for argument in required if argument not in KNOWN]:
        return Support(name, class_name, "unsupported", f"forward requires {', '.join(unknown)}")
    if not any(channels in settings for channels in CHANNELS):
        return Support(name, class_name, "unsupported", f"its configuration has none of {', '.join(CHANNELS)}")
    if "encoder_hidden_states" in required and not any(width in settings for width in TEXT_WIDTHS):
        return Support(name, class_name, "unsupported", "its configuration has no width of the text")
    tried = class_name in _generic.TRIED
    detail = f"{'' if tried else 'not tried; '}forward takes {', '.join(required)}"
    return Support(name, class_name, "generic", detail, tried=tried)


def example_inputs(
    family: Family, config: Mapping[str, Any], size: tuple[int, int, int], text_tokens: int | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """(inputs by name, arguments that no step changes) of a prepared network of `family` with this configuration.

    size: (T, H, W) of the latent. Inputs are random, but for timestep 500 and what a prompt does not say. Raises
    ModelError for a configuration that does not say how wide the text is.
    """
    t, h, w = size
    frames = (t - 1) * family.temporal + 1 if family.first_alone else t * family.temporal
    whole = family.size((frames, h * family.spatial, w * family.spatial), text_tokens)
    noise = {"hidden_states": family.latent(config, whole), **(family.also(config, whole) if family.also else {})}
    inputs = {name: torch.randn(shape) for name, shape in noise.items()}
    times = None if family.times is None else family.times(config, whole)
    times = torch.ones(1) if times is None else times
    inputs["timestep"] = (500 * times).to(torch.int64 if family.integer_time else torch.float32)
    inputs |= {name: one.make() for name, one in family.inputs(config, whole).items()}
    return inputs, family.fixed(config, whole)
