"""What leaves the graph of a step: every published model of the registry, traced without weights and cut in parts.

Nothing is run: shares follow from the graphs. Weights count as float32, as traced. Prompts are as long as published;
latents are small (a family's smallest video in the tests): shares of weights do not depend on that, those of operations
fall as the clip grows.
"""

from __future__ import annotations

import argparse
import inspect
import json
import resource
import time
from functools import partial
from typing import Any

import torch

from benchmarks import common
from vdq_export import pipeline
from vdq_export.contract import PassContext
from vdq_export.hoisting import split as hoisting
from vdq_export.sources import registry
from vdq_export.sources.families import Family, Published
from vdq_export.tracing.weightless import trace_weightless

PARTS = ("prompt", "step", "mixed", "body")
ONE_SIZE = ("CogVideoX", "Latte")  # their position embeddings are weights of the published size
_DEPTHS = ("num_layers", "num_single_layers", "num_refiner_layers")


def models() -> dict[str, tuple[Family, Published]]:
    """Published name -> its family and settings; of families with a configuration in the tests."""
    return {one.name: (family, one) for family in registry.FAMILIES if family.tiny for one in family.published}


def measured(settings: dict[str, Any]) -> dict[str, Any]:
    """Parts of one model: work of each, values that cross, seconds and peak memory of the process.

    small: one block of each kind.
    """
    family, published = models()[settings["model"]]
    kind: Any = family.network_class()
    config = _config(kind, {**published.settings, **(dict.fromkeys(_DEPTHS, 1) if settings["small"] else {})})
    video = family.video if family.name in ONE_SIZE and family.video else family.tiny[0].video
    size = family.size(video, family.text_tokens)
    inputs = {"hidden_states": torch.zeros(family.latent(config, size))}
    inputs |= {name: torch.zeros(shape) for name, shape in (family.also(config, size) if family.also else {}).items()}
    latents = set(inputs)
    weights = family.times(config, size) if family.times else None
    weights = torch.ones(1) if weights is None else weights
    inputs["timestep"] = (500 * weights).to(torch.int64 if family.integer_time else torch.float32)
    inputs |= {name: one.make() for name, one in family.inputs(config, size).items()}

    def make() -> torch.nn.Module:
        module: Any = kind(**config)
        if family.prepare is not None:
            family.prepare(module)
        module.forward = partial(module.forward, **family.fixed(config, size))
        return module

    begin = time.perf_counter()
    graph = trace_weightless(make, inputs, name=settings["model"])
    pipeline.run_passes(graph, pipeline.CANONICAL, PassContext())
    traced = time.perf_counter()
    hoisted = hoisting.split(graph, hoisting.roles(inputs, "timestep", inputs.keys() - latents))
    work = {name: hoisting.work(part) for name, part in hoisted.parts().items()}
    return {
        "seconds": {"trace": traced - begin, "split": time.perf_counter() - traced},
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "weight_bytes": {name: one.weight_bytes for name, one in work.items()},
        "multiply_adds": {name: one.multiply_adds for name, one in work.items()},
        "whole": {"multiply_adds": hoisted.whole.multiply_adds, "weight_bytes": hoisted.whole.weight_bytes},
        "nodes": {name: one.nodes for name, one in work.items()},
        "crossing_bytes": [one.nbytes for one in hoisted.crossings],
    }


def _config(kind: Any, chosen: dict[str, Any]) -> dict[str, Any]:
    """The class's own defaults under the chosen settings that it has."""
    parameters = inspect.signature(kind).parameters.values()
    defaults = {one.name: one.default for one in parameters if one.default is not one.empty}
    return defaults | {name: value for name, value in chosen.items() if name in defaults}


def run(arguments: argparse.Namespace) -> None:
    data = {
        name: common.in_child("hoisting", "measured", {"model": name, "small": arguments.small}, arguments.threads)
        for name in arguments.models or models()
    }
    data = _kept(arguments.small) | data
    heads = ["model", "weights GB", *(f"{part} %" for part in PARTS), "multiply-adds saved %", "values cross", "MB"]
    rows = []
    for name, one in data.items():
        weights, adds = one["weight_bytes"], one["multiply_adds"]
        shares = [f"{100 * weights.get(part, 0) / sum(weights.values()):.1f}" for part in PARTS]
        saved = f"{100 * (1 - (adds['body'] + adds.get('mixed', 0)) / one['whole']['multiply_adds']):.1f}"
        crossing = one["crossing_bytes"]
        rows.append(
            [name, f"{sum(weights.values()) / 1e9:.1f}", *shares, saved,
             str(len(crossing)), f"{sum(crossing) / 1e6:.1f}"]
        )  # fmt: skip
    notes = (
        "Shares of the weights' bytes by the graph they are in afterwards: `prompt` runs once a video, `step` once an "
        "export, `mixed` once a video and step, `body` at every step. Saved: what a step no longer does (`prompt`, "
        "`step`), of what it did. Rows of earlier runs are kept where this one was of some models only."
    )
    common.write("hoisting", "What leaves the graph of a step", [("", heads, rows)], data, notes, small=arguments.small)


def _kept(small: bool) -> dict[str, Any]:
    """What earlier runs found of models that are still published."""
    place = (common.WORK / "small" if small else common.RESULTS) / "hoisting.json"
    found = json.loads(place.read_text()) if place.is_file() else {}
    return {name: found[name] for name in models() if name in found}


def parse() -> argparse.ArgumentParser:
    made = common.parser(__doc__)
    made.add_argument("--models", nargs="*", help="published names (default: all)")
    return made


if __name__ == "__main__":
    common.main(parse(), run, {"measured": measured})
