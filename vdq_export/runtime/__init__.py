"""Runs bundles: `load` gives a drop-in for a diffusers pipeline's transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vdq_export.bundle import Bundle
from vdq_export.runtime.session import SessionFactory
from vdq_export.runtime.transformer import Transformer
from vdq_export.schedule import Uncalibrated


def load(
    path: str | Path,
    *,
    providers: Sequence[Any] | None = None,
    session_options: Mapping[str, str] | None = None,
    threads: int | None = None,
    prefetch: bool = True,
    uncalibrated: Uncalibrated | None = None,
    verify_hashes: bool = True,
) -> Transformer:
    """Open the bundle at `path` and return a drop-in for `pipe.transformer`.

    providers: onnxruntime execution providers; default: the target's. session_options: onnxruntime config entries,
    which win over the bundle's. threads: of one operator. prefetch: load the next graph in the background.
    uncalibrated: what a timestep nobody calibrated gets ("nearest" or "refuse"); default: what the bundle says.
    Raises BundleError when the bundle is damaged.
    """
    bundle = Bundle.open(path, verify_hashes=verify_hashes)
    schedule = bundle.schedule
    if uncalibrated is not None:
        schedule = msgspec.structs.replace(schedule, uncalibrated=uncalibrated)
    options = {**bundle.manifest.session, **(session_options or {})}
    factory = SessionFactory(providers or bundle.manifest.providers, options, threads)
    return Transformer(bundle, schedule, factory, prefetch=prefetch)
