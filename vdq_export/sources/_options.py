"""What a person may choose about a model of free shapes, and its form within a MODEL argument: "PATH?frames=17".

As part of the argument it is part of the model's name in a bundle: `verify` finds the same shapes again by that name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated
from urllib.parse import parse_qsl, urlencode

import msgspec

from vdq_export.errors import ModelError
from vdq_export.settings import explain

Count = Annotated[int, msgspec.Meta(ge=1)]


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """frames, height, width: of the video, in pixels. None: the family's default."""

    frames: Count | None = None
    height: Count | None = None
    width: Count | None = None
    steps: Count | None = None
    guidance: Annotated[float, msgspec.Meta(ge=0)] | None = None
    shift: Annotated[float, msgspec.Meta(gt=0)] | None = None
    prompt_embeds: str | None = None
    trajectories: str | None = None
    prompts: str | None = None
    negative_prompt: str | None = None
    guidance_2: Annotated[float, msgspec.Meta(ge=0)] | None = None
    seed: Annotated[int, msgspec.Meta(ge=0)] | None = None
    timestep_input: str | None = None

    def names(self) -> list[str]:
        """The options that were chosen, as they are typed."""
        return [f"--{name.replace('_', '-')}" for name in self.__struct_fields__ if getattr(self, name) is not None]


def join(spec: str, chosen: Mapping[str, object]) -> str:
    """`spec` with the options that are not None."""
    query = urlencode({name: str(value) for name, value in chosen.items() if value is not None}, safe="/")
    return f"{spec}?{query}" if query else spec


def split(spec: str) -> tuple[str, str]:
    """(argument, its options as text); a path that exists is left whole."""
    if "?" not in spec or Path(spec).exists():
        return spec, ""
    plain, query = spec.split("?", 1)
    return plain, query


def parse(query: str, spec: str) -> Options:
    """Raises ModelError, naming `spec`, for an option that does not exist or a value that cannot be."""
    try:
        return msgspec.convert(dict(parse_qsl(query)), Options, strict=False)
    except msgspec.ValidationError as error:
        what, instead = explain(error, Options)
        raise ModelError(f"{spec}: {what}", hint=instead or "see vdq-export export --help") from error
