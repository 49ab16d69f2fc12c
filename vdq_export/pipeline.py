"""The one ordered list of passes, checked at import against what each pass says must precede it."""

from __future__ import annotations

import pkgutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import ModuleType

from vdq_export import passes, targets
from vdq_export.contract import PassContext, PassReport
from vdq_export.errors import PassError, UnknownNameError
from vdq_export.graph import Graph

CANONICAL = (
    "fold_constants",  # first: everything after matches on shapes and constants that are really constant
    "linear",  # one form for every linear, so that observers and plans can name them
    "no_ops",  # exporter leftovers would hide the patterns below
    "scatter",  # no ScatterND: SoC compilers refuse it and ORT moves it element by element
    "rms_norm",  # Div form: 16-bit Reciprocal is wrong on at least one SoC, and ORT fuses this form
    "single_precision",  # doubles between two casts hide the patterns below, and no NPU has them
    "rotary",  # looks through the norm to the linear whose channels it reorders
    "rotary_pairs",  # last: the embeddings whose channels could not be reordered
)
FLOAT = (  # what a draft of the plan decides: weights are quantized, and layers compared, behind these
    "smoothing",  # before quantization: scales and ranges in the plan are those after smoothing
    "rotation",  # after smoothing: it mixes the channels that smoothing scales
)
SHARED = (  # on the weights, once for all bins
    "low_rank",  # before quantization: what is left of the weight is quantized
    "quantize_weights",  # once for all bins: their graphs then hold the same arrays
)
PER_BIN = (
    "qdq",  # last of the standard rewrites of static targets: they fuse around what it inserted
    "qdq_values",  # what is left: every other value, on targets that leave no operator in float
    "dynamic_quantize",  # the layers qdq leaves: those whose plan computes parameters at run time
)


def canonical(target: str) -> tuple[str, ...]:
    """Everybody's canonical forms and those that `target` wants beside them."""
    return (*CANONICAL, *targets.forms(target))


def load_pass(name: str) -> ModuleType:
    """The pass module passes/NAME.py."""
    known = [one.name for one in pkgutil.iter_modules(passes.__path__) if not one.name.startswith("_")]
    if name not in known:
        raise UnknownNameError("pass", name, known)
    return import_module(f"vdq_export.passes.{name}")


def check_order(order: Sequence[str], known_before: Sequence[str] = ()) -> None:
    """Raise PassError when a pass stands before one it names in AFTER."""
    done = list(known_before)
    for name in order:
        missing = [n for n in load_pass(name).AFTER if n not in done]
        if missing:
            raise PassError(f"pass {name} must come after {', '.join(missing)}")
        done.append(name)


def run_passes(
    graph: Graph, order: Sequence[str], context: PassContext, *, dump: Callable[[str, Graph], None] | None = None
) -> list[PassReport]:
    """Run `order` on `graph` in place; `dump` sees the graph after each pass."""
    reports = []
    for name in order:
        reports.append(load_pass(name).run(graph, context))
        graph.check()
        if dump:
            dump(name, graph)
    return reports


def of_network(name: str, reports: Sequence[PassReport]) -> list[PassReport]:
    """The same reports, saying whose they are."""
    return [replace(one, network=name) for one in reports]


def dump_to(folder: Path, wanted: str) -> Callable[[str, Graph], None]:
    """A dump function that writes the graph after the pass `wanted` ("all": after each) into `folder`.

    Of several graphs that a pass ran on (experts, sets of weights), the later ones get a number.
    """
    if wanted != "all":
        if wanted.lower() == "all":
            raise PassError(f"unknown pass {wanted!r}", hint="did you mean all?")
        load_pass(wanted)

    count = Counter[str]()

    def dump(name: str, graph: Graph) -> None:
        if wanted in ("all", name):
            folder.mkdir(parents=True, exist_ok=True)
            count[name] += 1
            graph.save(folder / (f"{name}.onnx" if count[name] == 1 else f"{name}-{count[name]}.onnx"))

    return dump


check_order((*CANONICAL, *FLOAT, *SHARED, *PER_BIN))
