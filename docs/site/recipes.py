"""The measured tables of docs/choosing-a-recipe.md, from benchmarks/results/*.json.

They stand in the page between two comments, so that the page can be read without building anything; a test compares.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from docs.site import ROOT
from vdq_export import recipe

RESULTS = ROOT / "benchmarks/results"
PAGE = ROOT / "docs/choosing-a-recipe.md"
SAMPLES = ("sample:digits", "sample:digits-hard")
_PLACE = re.compile(r"(<!-- measured: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def tables() -> dict[str, str]:
    """Markdown tables by the name that the page calls them by."""
    return {"w8a8": _table(8, 8), "lower": _table(4, 4, 6, 8), "speed": _speed(), "targets": _targets()}


def written(text: str, made: dict[str, str]) -> str:
    """The page's text with its tables as they are `made`. Raises KeyError for a table that nobody makes."""
    return _PLACE.sub(lambda found: found[1] + made[found[2]] + found[3], text)


def _table(weights: int, *activations: int) -> str:
    """The recipes of these bits with their clip PSNR on two samples, the best on the hard one first."""
    rows = [
        (name, known, [_psnr(sample, name) for sample in SAMPLES])
        for name, known in ((one, recipe.load(one)) for one in recipe.names())
        if known.weights.bits == weights and known.activations.bits in activations
    ]
    measured = [row for row in rows if all(row[2])]
    measured.sort(key=lambda row: -row[2][1][0])
    lines = ["| recipe | bits | bins | `digits` | `digits-hard` | MB |", "|---|---|--:|--:|--:|--:|"]
    for name, known, found in measured:
        bits = f"W{known.weights.bits}A{known.activations.bits}"
        bits += f"/{known.schedule.high}" if known.schedule.delta is not None else ""
        bits += " MX" if known.weights.grid.startswith("mx") else ""
        shown = [f"{value:.1f} ± {error:.1f}" for value, error, _ in found]
        lines.append(f"| `{name}` | {bits} | {bins(known)} | {shown[0]} | {shown[1]} | {found[0][2]:.1f} |")
    return "\n".join(lines) + "\n"


def bins(known: recipe.Recipe) -> str:
    """How many, as the recipe has them; the samples' clips have 20 steps."""
    return str(len(known.tsw) + 1 if isinstance(known.tsw, tuple) else known.tsw)


def _psnr(sample: str, name: str) -> tuple[float, float, float] | tuple[()]:
    """(mean over seeds, standard error, megabytes), or () for what was not measured."""
    runs: list[dict[str, Any]] = read("fidelity-recipes")["rows"][sample].get(name, [])
    if not runs:
        return ()
    seeds = [mean(one["psnr"]) for one in runs]
    return mean(seeds), stdev(seeds) / len(seeds) ** 0.5, mean(one["bundle_bytes"] for one in runs) / 1e6


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
    return {PAGE: tables()}
