"""The measured tables of docs/choosing-a-recipe.md, from benchmarks/results/*.json; the sources of docs/methods.md.

They stand in the pages between two comments, so that these can be read without building anything; a test compares.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from docs.site import ROOT
from vdq_export import recipe

RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/choosing-a-recipe.md"
METHODS = ROOT / "docs/methods.md"
SAMPLES = ("sample:digits", "sample:digits-hard")
_PLACE = re.compile(r"(<!-- (?:measured|made): (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_PAPER = re.compile(r"arXiv (\d{4}\.\d{5})")


class _Clips(NamedTuple):
    """A recipe on a sample: clip PSNR in dB, mean over seeds and its standard error; size of the bundle."""

    mean: float
    error: float
    megabytes: float


def tables() -> dict[str, str]:
    """Markdown tables by the name that the page calls them by."""
    return {
        "w8a8": _table(8, 8),
        "lower": _table(4, 4, 6, 8),
        "formats": _formats(),
        "unmeasured": _unmeasured(),
        "speed": _speed(),
        "targets": _targets(),
    }


def written(text: str, made: dict[str, str]) -> str:
    """The page's text with its tables as they are `made`. Raises KeyError for a table that nobody makes."""
    return _PLACE.sub(lambda found: found[1] + made[found[2]] + found[3], text)


def _table(weights: int, *activations: int) -> str:
    """The recipes of these bits with their clip PSNR on two samples, the best on the hard one first."""
    measured = list[tuple[str, recipe.Recipe, _Clips, _Clips]]()
    for name in recipe.names():
        known = recipe.load(name)
        easy, hard = (_clips(sample, name) for sample in SAMPLES)
        if easy and hard and known.weights.bits == weights and known.activations.bits in activations:
            measured.append((name, known, easy, hard))
    measured.sort(key=lambda row: -row[3].mean)
    lines = ["| recipe | bits | bins | `digits` | `digits-hard` | MB |", "|---|---|--:|--:|--:|--:|"]
    for name, known, easy, hard in measured:
        bits = f"W{known.weights.bits}A{known.activations.bits}"
        bits += f"/{known.schedule.high}" if known.schedule.delta is not None else ""
        bits += " MX" if known.weights.grid.startswith("mx") else ""
        shown = " | ".join(f"{one.mean:.1f} ± {one.error:.1f}" for one in (easy, hard))
        lines.append(f"| `{name}` | {bits} | {bins(known)} | {shown} | {easy.megabytes:.1f} |")
    return "\n".join(lines) + "\n"


def bins(known: recipe.Recipe) -> str:
    """How many, as the recipe has them; the samples' clips have 20 steps."""
    return str(len(known.tsw) + 1 if isinstance(known.tsw, tuple) else known.tsw)


def _clips(sample: str, name: str) -> _Clips | None:
    """None for what was not measured."""
    runs: list[dict[str, Any]] = read("fidelity-recipes")["rows"][sample].get(name, [])
    if not runs:
        return None
    seeds = [mean(one["psnr"]) for one in runs]
    return _Clips(mean(seeds), stdev(seeds) / len(seeds) ** 0.5, mean(one["bundle_bytes"] for one in runs) / 1e6)


def _formats() -> str:
    """What TensorRT's formats give in float16 on onnxruntime; the bin that loses most."""
    lines = ["| `--target tensorrt` | weights × activations | output against float |", "|---|---|--:|"]
    for what, _, _, consumer, *_, remark in read("handoff")["units"]["tensorrt"]:
        name = what.removeprefix("tensorrt, ")
        lines.append(f"| `{name}` | {remark.split(';')[0]} | {float(consumer):.1f} dB |")
    return "\n".join(lines) + "\n"


def _unmeasured() -> str:
    """The recipes that no table has on clips."""
    held = read("fidelity-recipes")["rows"]
    names = [name for name in recipe.names() if name != "auto" and not any(name in held[one] for one in SAMPLES)]
    return ", ".join(f"`{name}`" for name in names) + "\n"


def _sources() -> str:
    """Which recipes come from where, papers linked."""
    by_source = dict[str, list[str]]()
    for name in recipe.names():
        by_source.setdefault(recipe.load(name).source, []).append(f"`{name}`")
    lines = ["| source | recipes |", "|---|---|"]
    for source, names in sorted(by_source.items()):
        if source not in ("", "baseline"):
            linked = _PAPER.sub(r"[arXiv \1](https://arxiv.org/abs/\1)", source)
            lines.append(f"| {linked} | {', '.join(names)} |")
    return "\n".join(lines) + "\n"


def _speed() -> str:
    found = read("speed")
    lines = ["| | speed, × float in onnxruntime | SQNR |", "|---|--:|--:|"]
    for name, ratio in found["ratio"].items():
        noise = found["sqnr_db"].get(name)
        lines.append(f"| {name} | {_median(ratio):.2f} | {'–' if noise is None else f'{noise:.1f} dB'} |")
    return "\n".join(lines) + "\n"


def _median(values: Any) -> float:
    held = sorted(values) if isinstance(values, list) else [float(values)]
    middle = len(held) // 2
    return float(held[middle] if len(held) % 2 else (held[middle - 1] + held[middle]) / 2)


def _targets() -> str:
    """What Hexagon bundles of the sample gave, in its compiler's emulator."""
    wanted = {
        "hexagon-v75": "16-bit activations, 8-bit weights",
        "hexagon-mixed": "`--activations mixed`",
        "hexagon-a8": "`--activations 8`",
        "hexagon-w4": "16-bit activations, 4-bit weights",
    }
    units = read("handoff")["units"]
    lines = ["| `--target qnn` | clips against float |", "|---|--:|"]
    lines += [f"| {words} | {units[name]['psnr_db']:.1f} dB |" for name, words in wanted.items()]
    return "\n".join(lines) + "\n"


def read(name: str) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return held


def pages() -> dict[Path, dict[str, str]]:
    """{file: its tables}."""
    return {PAGE: tables(), METHODS: {"sources": _sources()}}
