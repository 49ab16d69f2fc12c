"""The measured tables of README.md and samples/README.md, from benchmarks/results/*.json."""

from __future__ import annotations

from math import floor
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from docs.site import ROOT, recipes
from vdq_export import recipe

README = ROOT / "README.md"
SAMPLES = ROOT / "samples/README.md"
_CHOSEN = ("static-minmax", "static-asq", "static-tsq-tsw", "rtn", "wan22-w4a4", "static-w4a4")
_CONTESTANTS = {
    "vdq-export, 4 bins": "vdq-export, 4 bins",
    "quantize_static, onnxruntime": "onnxruntime `quantize_static`",
    "quantize_static, x64quantprecision=1": "the same, `x64quantprecision=1`",
    "NNCF quantize, OpenVINO": "NNCF `quantize` in OpenVINO",
}


def tables() -> dict[str, str]:
    """Markdown by the name that README.md calls it by: tables, and lists of single measurements."""
    return {
        "quality": _quality(),
        "recipes": _recipes(),
        "peers": _peers(),
        "speed": _speed(),
        "cost": _cost(),
        "handoff": _handoff(),
        "wan": _wan(),
        "scale": _scale(),
        "families": _families(),
    }


def sample_tables() -> dict[str, str]:
    """The same for samples/README.md."""
    return {"samples": _samples()}


def pages() -> dict[Path, dict[str, str]]:
    """{file: its tables}."""
    return {README: tables(), SAMPLES: sample_tables()}


def _table(head: str, align: str, rows: list[str]) -> str:
    return "\n".join([head, align, *rows]) + "\n"


def _list(*items: str) -> str:
    return "".join(f"- {item}\n" for item in items)


def _read(name: str) -> dict[str, Any]:
    return recipes.read(name)


def _quality() -> str:
    found = _read("quality")
    held = {(one["sample"], one["recipe"]): one for one in found["results"] if one["bins"] == 4}
    rows = []
    for sample, judge in found["float_judge"].items():
        ours, plain = held[sample, "static-asq"], held[sample, "static-minmax"]
        digits = f"{judge['digit']:.1%} → {ours['judge']['digit']:.1%}".replace("%", " %")
        kernels = f"{ours['executed']} of {ours['planned']}"
        psnr = f"{mean(ours['psnr']):.1f} dB | {mean(plain['psnr']):.1f} dB"
        rows.append(f"| `{sample}` | {psnr} | {digits} | {kernels} |")
    head = "| | PSNR | without smoothing | digits read right, float → bundle | integer kernels |"
    return _table(head, "|---|--:|--:|--:|--:|", rows)


def _recipes() -> str:
    held = _read("fidelity-recipes")["rows"]
    rows = []
    for name in _CHOSEN:
        known = recipe.load(name)
        shown = " | ".join(_psnr(held[sample][name]) for sample in recipes.SAMPLES)
        bits = f"W{known.weights.bits}A{known.activations.bits}"
        rows.append(f"| {bits} `{name}` | {recipes.bins(known)} | {shown} |")
    return _table("| | bins | `digits` | `digits-hard` |", "|---|--:|--:|--:|", rows)


def _seeds(runs: list[dict[str, Any]]) -> list[float]:
    """Clip PSNR in dB of each seed's run."""
    return [mean(one["psnr"]) for one in runs]


def _psnr(runs: list[dict[str, Any]]) -> str:
    """Mean and standard error over seeds."""
    seeds = _seeds(runs)
    return f"{mean(seeds):.1f} ± {stdev(seeds) / len(seeds) ** 0.5:.1f} dB"


def _peers() -> str:
    """Every quantizer that was measured, the best in bold."""
    held = _read("fidelity-peers")["rows"]
    rows = []
    for name in held[recipes.SAMPLES[0]]:
        shown = []
        for sample in recipes.SAMPLES:
            best = max(mean(_seeds(runs)) for runs in held[sample].values())
            text = _psnr(held[sample][name])
            shown.append(f"**{text}**" if mean(_seeds(held[sample][name])) == best else text)
        rows.append(f"| {name} | {' | '.join(shown)} |")
    return _table("| W8A8 | `digits` | `digits-hard` |", "|---|--:|--:|", rows)


def _speed() -> str:
    found = _read("speed")
    speed = {name: median(found["ratio"][name]) for name in _CONTESTANTS}
    noise = {name: found["sqnr_db"][name] for name in _CONTESTANTS}
    rows = []
    for name, words in _CONTESTANTS.items():
        fast = f"**{speed[name]:.2f}**" if speed[name] == max(speed.values()) else f"{speed[name]:.2f}"
        exact = f"**{noise[name]:.1f} dB**" if noise[name] == max(noise.values()) else f"{noise[name]:.1f} dB"
        rows.append(f"| {words} | {fast} | {exact} |")
    return _table("| | speed, × float in onnxruntime | noise, SQNR |", "|---|--:|--:|", rows)


def _cost() -> str:
    foot, cost = _read("footprint"), _read("export_cost")["medians"]
    size = foot["bundle_bytes"]["4"] / foot["bundle_bytes"]["1"]
    memory = foot["above_imports"]["4 bins, whole schedule"] / foot["above_imports"]["4 bins, only the first"]
    ours, theirs = cost["vdq-export, 4 bins"], cost["quantize_static"]
    before = cost["quantize_static's preprocessing"]
    return _list(
        f"Four bins take {size:.3f} × the bytes of one bin and {memory:.2f} × the memory of running only the first; a "
        f"switch of bins\n  waits {foot['stall']['mean_wait']:.2%} of a step "
        "([footprint](benchmarks/results/footprint.md)).".replace("%", " %"),
        f"An export of these blocks takes {ours['seconds']:.1f} s and at most {_mb(ours)}; `quantize_static` takes "
        f"{theirs['seconds']:.1f} s and {_mb(theirs)},\n  after {before['seconds']:.1f} s and {_mb(before)} of its "
        "preprocessing; calibration excluded ([export cost](benchmarks/results/export_cost.md)).",
    )


def _mb(run: dict[str, float]) -> str:
    return f"{run['peak'] / 1e6:.0f} MB"


def _handoff() -> str:
    wanted = {
        "hexagon-v75": "Hexagon v75, compiled and emulated, 16-bit activations, 8-bit weights",
        "hexagon-mixed": "the same, activations mixed",
        "hexagon-a8": "the same, 8-bit activations everywhere",
    }
    units = _read("handoff")["units"]
    rows = []
    for unit, words in wanted.items():
        most = max(units[unit]["device"]["bins"], key=lambda one: float(one["drop_db"]))
        clips = units[unit]["psnr_db"]
        rows.append(f"| {words} | {most['device_db']:.1f} dB | {most['exact_db']:.1f} dB | {clips:.1f} dB |")
    (openvino,) = (
        row for row in units["openvino"]
        if row[0].endswith("--isa avx2") and row[1].endswith("on this machine, settings: hand-off")
    )  # fmt: skip
    consumer, exact = (f"{float(value):.1f} dB" for value in openvino[3:5])
    rows.append(f"| OpenVINO on a CPU, `--isa avx2` | {consumer} | {exact} | {openvino[5]} |")
    return _table("| | consumer | exact | clips against float |", "|---|--:|--:|--:|", rows)


def _wan() -> str:
    units = _read("handoff")["units"]
    hexagon = [one for name, unit in units.items() if name.startswith("hexagon") for one in unit["device"]["bins"]]
    left = sum(len(one["off_device"]) for one in hexagon)
    found = _read("hexagon-wan")
    whole, share = found["deep_compile"], found["all_bins"]["bytes"] / found["one_bin"]["bytes"]
    contexts = "one context" if whole["parts"] == 1 else f"{whole['parts']} contexts"
    return _list(
        f"{left or 'No'} nodes of these Hexagon graphs are left to the CPU.",
        f"All 30 blocks of Wan-1.3B at 512 tokens compile into {contexts} of {sum(whole['bytes']) / 1e6:.0f} MB;\n"
        f"  four bins of two such blocks take {share:.2f} × the bytes of one bin "
        "([Wan-1.3B](benchmarks/results/hexagon-wan.md)).",
    )


def _scale() -> str:
    found = _read("scale-wan")
    rows = []
    for name in ("1.3B", "14B"):
        one, export = found[name], found[name]["export"]
        known = recipe.load(export["recipe"])
        what = f"W{known.weights.bits}A{known.activations.bits} `{known.name}`, {export['bins']} bins"
        took = f"{export['seconds']:.0f} s"
        if known.activations.bits > 8:
            what = f"{known.weights.bits}-bit weights (`{known.name}`), no data needed"
        if "copy" in one:
            copying = one["copy"]["seconds"] / export["seconds"]
            took += f", {copying:.2f} × the speed of copying the files"
        weights = one["make"]["weight_bytes"] / 1e9
        rows.append(f"| Wan2.1-{name} | {weights:.1f} GB | {what} | {took} | {export['peak_held'] / 2**30:.1f} GiB |")
    return _table("| | weights | recipe | export | memory held at most |", "|---|--:|---|--:|--:|", rows)


def _families() -> str:
    matrix, trials = _read("support-matrix")["rows"], _read("scale-resume")["trials"]
    piped = sum(bool(one["pipeline"]) for one in matrix)
    error, worst = max(one["error"] for one in matrix), floor(min(one["network_db"] for one in matrix))
    executed, planned = (sum(one[key] for one in matrix) for key in ("executed", "planned"))
    hunyuan = _read("hoisting")["HunyuanVideo"]["weight_bytes"]
    moved = 1 - hunyuan["body"] / sum(hunyuan.values())
    lower = _read("hoisting_speed")["lower"]
    rounds = f"{min(lower):.0%} to {max(lower):.0%}".replace("-", "−")
    kills = sum(len(one["moments"]) for one in trials)
    same = "every one ended" if all(one["identical"] for one in trials) else "not every one ended"
    return _list(
        f"Tiny configurations of {len(matrix)} video transformers, {piped} of them inside their own diffusers "
        f"pipelines:\n  graphs within {error:.1e} of torch, W8A8 at {worst} dB and more on random weights, "
        f"{executed} of {planned} planned linears in\n  integer kernels "
        "([matrix](benchmarks/results/support-matrix.md)).",
        f"What no denoising step changes leaves the graphs: {moved:.1%} of HunyuanVideo's weight bytes\n"
        f"  ([shares](benchmarks/results/hoisting.md)); of two Wan-1.3B-shaped blocks {median(lower):.1%} of a step's "
        f"time, in single rounds {rounds}\n  ([step time](benchmarks/results/hoisting_speed.md)).".replace("%", " %"),
        f"Exports killed at {kills} random moments: {same} in the same bundle, byte for byte\n"
        "  ([resuming](benchmarks/results/scale-resume.md)).",
    )


def _samples() -> str:
    """What W8A8 does to each sample, in the bundles that `run` makes."""
    held = _read("fidelity-recipes")["rows"]
    rows = []
    for sample, runs in held.items():
        ours, plain = runs["static-asq"], mean(_seeds(runs["static-minmax"]))
        digits = [mean(one[judge]["digit"] for one in ours) for judge in ("float_judge", "judge")]
        size = mean(one["bundle_bytes"] for one in ours) / 1e6
        shown = f"{digits[0]:.0%} → {digits[1]:.0%}".replace("%", " %")
        rows.append(f"| `{sample}` | {_psnr(ours)} | {plain:.1f} dB | {shown} | {size:.1f} |")
    head = "| | clips against float | unsmoothed, one bin | digits read right, float → bundle | MB |"
    return _table(head, "|---|--:|--:|--:|--:|", rows)
