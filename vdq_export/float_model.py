"""The float model that a bundle was made from, found again; another one would give wrong numbers without a word."""

from __future__ import annotations

from vdq_export import sources
from vdq_export.bundle import Bundle
from vdq_export.errors import ModelError
from vdq_export.model import Model


def find(bundle: Bundle, model: Model | str | None = None, *, clips: bool = False) -> Model:
    """The model of `bundle`: `model`, or by default the one that the manifest names. clips: it must make clips.

    Raises ModelError for one with other weights, without a sampler where clips are wanted, or that is not found.
    """
    found = sources.of_bundle(bundle.manifest.model.name, model)
    if clips and found.sampler is None:
        raise ModelError(f"{found.name} has no sampler", hint="give the Model one to generate clips with it")
    check(bundle, found, found.weight_hash())
    return found


def check(bundle: Bundle, model: Model, weight_hash: str) -> None:
    """Raises ModelError where a model of that Model.weight_hash() is not the one `bundle` was made from."""
    if weight_hash != bundle.manifest.model.weight_hash:
        raise ModelError(f"{model.name} has other weights than the model of {bundle.path}", hint="pass its own model")
