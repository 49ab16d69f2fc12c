"""JoyImage-Edit Plus: patches of a target and of the images it is made from, one row; each has its own time."""

from __future__ import annotations

from math import prod
from typing import Any

from vdq_export.sources.families._family import Config, Family, Input, Size, Tiny, channels, mask, text


def _grid(config: Config, size: Size) -> tuple[int, int]:
    """Rows and columns of patches of one image."""
    return size.h // int(config["patch_size"][1]), size.w // int(config["patch_size"][2])


def _hidden_states(config: Config, size: Size) -> tuple[int, ...]:
    """[1, patches of all images, C, 1, p, p]."""
    return (1, size.t * prod(_grid(config, size)), channels(config), *config["patch_size"])


def _inputs(config: Config, size: Size) -> dict[str, Input]:
    return {**text(config, size), "encoder_hidden_states_mask": mask(size)}


def _fixed(config: Config, size: Size) -> dict[str, Any]:
    """All images are as large as the target."""
    return {"shape_list": [[(1, *_grid(config, size))] * size.t]}


FAMILY = Family(
    name="JoyImage-Edit Plus",
    class_name="JoyImageEditPlusTransformer3DModel",
    pipelines=("JoyImageEditPlusPipeline",),
    video=(2, 1024, 1024),
    steps=30,
    guidance=4.0,
    text_tokens=1024,
    temporal=1,  # a "frame" is an image
    hidden_states=_hidden_states,
    inputs=_inputs,
    fixed=_fixed,
    tiny=(
        Tiny(
            {
                "in_channels": 4, "hidden_size": 32, "num_attention_heads": 2, "text_dim": 32, "num_layers": 2,
                "rope_dim_list": [4, 6, 6],
            },
            (2, 64, 64),
        ),
    ),
)  # fmt: skip
