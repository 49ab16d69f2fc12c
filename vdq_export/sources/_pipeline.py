"""The parts of a diffusers folder, checked against each other: index, networks, scheduler, VAE, text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from vdq_export.errors import ModelError
from vdq_export.sources import _scheduling, _text, _weights, registry
from vdq_export.sources._weights import Network, read_json
from vdq_export.weights import on_demand

INDEX = "model_index.json"


@dataclass(frozen=True)
class Pipeline:
    """A folder. index: of a pipeline, None for a transformer alone. networks: the transformer, or two experts."""

    folder: Path
    index: Mapping[str, Any] | None
    networks: tuple[Network, ...]

    @property
    def vae(self) -> Path | None:
        """The VAE's config.json, where there is one."""
        path = self.folder / "vae" / "config.json"
        return path if self.index is not None and path.is_file() else None

    @property
    def schedule(self) -> tuple[Mapping[str, Any], str]:
        """(scheduler configuration, where it is from). Raises ModelError where there is none."""
        pipeline = self.folder if self.index is not None else None
        return _scheduling.config_of(pipeline, self.networks[0].class_name)

    @property
    def horizon(self) -> float:
        """The highest timestep there can be."""
        config, origin = self.schedule
        return _scheduling.Scheduler(config, origin, 1, None, 1).horizon

    @property
    def boundary(self) -> float:
        """The timestep below which the second expert serves: boundary_ratio × the horizon. Raises ModelError."""
        ratio = (self.index or {}).get("boundary_ratio")
        if not isinstance(ratio, float) or not 0 < ratio < 1:
            raise ModelError(
                f"{self.folder / INDEX}: boundary_ratio is {ratio!r}, and there are two transformers",
                hint="it says, between 0 and 1, where the second one begins",
            )
        return ratio * self.horizon

    def too_large_encoders(self) -> str:
        """What to say where the text encoders do not fit in memory; "" where they do."""
        places = [self.folder / name for name in _text.parts(self.index or {})]
        size = sum(file.stat().st_size for place in places for file in place.glob("*.safetensors"))
        if size <= on_demand.SHARE * psutil.virtual_memory().available:
            return ""
        return f"{self.folder}: text encoders of {size / 1e9:.1f} GB take more than half of the memory that is free"

    def encode(self, prompts: Sequence[str], negative: str) -> list[_text.Prompt]:
        """Prompts by the folder's own text encoders. Raises as _text.encode(), and ModelError without any."""
        if not _text.parts(self.index or {}):
            raise ModelError(f"{self.folder} has no text encoder", hint="give --prompt-embeds or --trajectories")
        if too_large := self.too_large_encoders():
            raise ModelError(too_large, hint="record on a larger machine, or give --prompt-embeds")
        first = self.networks[0]
        pipelines, tokens = registry.of(first.class_name).pipelines, first.config.get("max_text_seq_length")
        return _text.encode(self.folder, self.index or {}, pipelines, prompts, negative, tokens)


def read(folder: Path) -> Pipeline:
    """Raises ModelError for what is neither a pipeline's nor a transformer's folder, and for what does not fit."""
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        return Pipeline(folder, index, _networks(folder, index))
    if (folder / "config.json").is_file():
        return Pipeline(folder, None, (_weights.read(folder),))
    raise ModelError(
        f"{folder} is no diffusers folder: neither {INDEX} nor config.json is in it",
        hint="give a folder that save_pretrained() wrote",
    )


def _networks(folder: Path, index: Mapping[str, Any]) -> tuple[Network, ...]:
    """The transformer, or both experts, which must be alike."""
    if not _listed(index, "transformer"):
        raise ModelError(f"{folder / INDEX} names no transformer", hint="only pipelines of transformers are read")
    first = _weights.read(folder / "transformer")
    if not _listed(index, "transformer_2"):
        return (first,)
    second = _weights.read(folder / "transformer_2")
    differing = sorted(
        name
        for name in first.config.keys() | second.config.keys()
        if not name.startswith("_") or name == "_class_name"
        if first.config.get(name) != second.config.get(name)
    )
    if differing:
        raise ModelError(
            f"{folder}: config.json of transformer and transformer_2 differ in {', '.join(differing)}",
            hint="two experts must have the same configuration",
        )
    return first, second


def _listed(index: Mapping[str, Any], part: str) -> bool:
    """Whether a pipeline has this part: an index says [null, null] of one it may have and has not."""
    entry = index.get(part)
    return isinstance(entry, list) and any(one is not None for one in entry)
