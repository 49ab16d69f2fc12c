"""Runs bundles: `load` gives a drop-in for a diffusers pipeline's transformer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from vdq_export.bundle import Bundle
from vdq_export.runtime import families
from vdq_export.runtime import providers as backends
from vdq_export.runtime.ahead import Ahead
from vdq_export.runtime.engine import Engine
from vdq_export.runtime.probes import Probes
from vdq_export.runtime.providers import Backend
from vdq_export.runtime.session import SessionFactory
from vdq_export.runtime.transformer import Transformer
from vdq_export.schedule import Schedule, Uncalibrated


def load(
    path: str | Path,
    *,
    providers: str | Sequence[Any] | None = None,
    session_options: Mapping[str, str] | None = None,
    threads: int | None = None,
    prefetch: bool = True,
    share: bool = True,
    uncalibrated: Uncalibrated | None = None,
    policy: str | None = None,
    verify_hashes: bool = True,
    device: str | None = None,
    dtype: str = "float16",
) -> Transformer:
    """Open the bundle at `path` and return a drop-in for `pipe.transformer`.

    providers: a recipe, "ort-qnn-ep" or "ort-openvino-ep" (runtime/providers.py), or onnxruntime execution providers by
    name; default: the target's. session_options: onnxruntime config entries, which win over the bundle's. threads: of
    one operator. prefetch: load the next session in the background. share: one session for all bins whose graphs differ
    in small constants only (CPU provider). uncalibrated: what a timestep nobody calibrated gets ("nearest" or
    "refuse"); default: what the bundle says. policy: otherwise than the bundle says, for example "delta=0.3",
    "static:low" or "delta=0.3+cache=0.1" (docs/schedule.md). device: "cuda", "cuda:1" …: run the programs of a bundle
    made for `cuda` there; "cpu" runs them in plain torch, slowly. dtype: of the floats between their kernels,
    "bfloat16", "float16" or "float32". What is onnxruntime's alone means nothing to them.
    Raises BundleError when the bundle is damaged, ScheduleError or UnknownNameError for a policy it cannot follow,
    MissingToolError when the package of a provider recipe is not installed.
    """
    bundle = Bundle.open(path, verify_hashes=verify_hashes)
    schedule = bundle.schedule
    if uncalibrated is not None:
        schedule = msgspec.structs.replace(schedule, uncalibrated=uncalibrated)
    if policy is not None:
        schedule = schedule.with_policy(policy)
    if device is not None:
        return _on_device(bundle, schedule, device, dtype)
    backend = backends.choose(providers, bundle)
    options = backend.settings(bundle, session_options or {})
    graphs = [backend.graph(bundle, bundle.graph_path(index)) for index in range(len(schedule.bins))]
    # Other providers compile a graph for their device, where scales have to be constants.
    found = families.find(graphs) if share and backend.on_cpu else families.alone(graphs)
    factory = SessionFactory(backend, options, threads, several=len(found) > 1)
    ahead = Ahead(bundle, schedule, threads)
    probes = Probes(bundle.path, schedule.reuse, bundle.manifest.signature, factory, ahead)
    return Transformer(bundle, schedule, Engine(found, schedule, factory, ahead, prefetch=prefetch), probes)


def _on_device(bundle: Bundle, schedule: Schedule, device: str, dtype: str) -> Transformer:
    from vdq_export.runtime import device as devices  # torch, which onnxruntime does without

    on = devices.checked(device, dtype)
    ahead = devices.DeviceAhead(bundle, schedule, on)
    engine = devices.DeviceEngine(bundle, schedule, ahead, on, dtype)
    host = SessionFactory(Backend(), {}, None)
    probes = Probes(bundle.path, schedule.reuse, bundle.manifest.signature, host, Ahead(bundle, schedule))
    return Transformer(bundle, schedule, engine, probes)
