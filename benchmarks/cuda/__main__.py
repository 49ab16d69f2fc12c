"""The CUDA target on one GPU: checked, then timed, in one call. `python -m benchmarks.cuda`

Needs torch with CUDA, triton, onnx, onnxruntime, networkx, click, rich and safetensors, and besides these only
onnx-graphsurgeon and diffusers; msgspec and psutil are stood in for where they are missing. What needs a package that
is not there says so in its table. cuda.md holds the predictions that were written down first.
"""

from __future__ import annotations

import argparse
import traceback
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.cuda import _msgspec

STOOD_IN = [name for name, install in (("msgspec", _msgspec.install), ("psutil", _msgspec.install_psutil)) if install()]

import torch  # noqa: E402

from benchmarks import common  # noqa: E402

FOLDER = common.WORK / "cuda" / "gpu"
PARTS = ("checks", "linears", "steps", "quality", "switching")


def main() -> None:
    """Check the kernels against plain torch on this GPU, then time them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cuda", description=main.__doc__)
    parser.add_argument("--only", choices=PARTS, action="append", help="Some parts; by default all.")
    parser.add_argument("--network", action="append", help="Networks to run steps of; by default all.")
    parser.add_argument("--no-torchao", action="store_true", help="Without torchao, whose compilation takes minutes.")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU that torch can use; tests/test_cuda_*.py check the kernels without one")
    tables: list[common.Table] = []
    failed = []
    for part in chosen.only or PARTS:
        try:
            tables += RUNS[part](chosen)
        except Exception as error:  # what is measured before a part fails is kept; the failure is told and is the exit
            traceback.print_exc()
            failed.append(part)
            tables.append((f"{part}: failed", ("why",), ((f"{type(error).__name__}: {error}",),)))
        print(common.markdown(*tables[-1]))
        if part == "checks" and failed:  # times of wrong kernels are worth nothing
            break
    told = facts()
    notes = "GPU: " + ", ".join(f"{name} {value}" for name, value in told.items()) + "."
    data = {"gpu": told, "failed": failed, "tables": tables}
    common.write("cuda", "The CUDA target", tables, data, notes, small=bool(chosen.only), module="cuda")
    if failed:
        raise SystemExit(1)


def facts() -> dict[str, Any]:
    """Card, driver, versions."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name, "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": ".".join(map(str, torch.cuda.get_device_capability())), "driver": _driver(),
        "cuda": torch.version.cuda, "torch": torch.__version__, "triton": __import__("triton").__version__,
        "stood in for": ", ".join(STOOD_IN) or "nothing",
    }  # fmt: skip


def _driver() -> str:
    place = Path("/proc/driver/nvidia/version")
    return place.read_text().splitlines()[0].strip() if place.is_file() else "unknown"


def _checks(_: argparse.Namespace) -> list[common.Table]:
    from benchmarks.cuda import checks

    rows = [(row["kernel"], row["case"], f"{row['error']:.1e}", f"≤ {row['bound']:.0e}", row["verdict"])
            for row in checks.measure()]  # fmt: skip
    if any(row[-1] != "right" for row in rows):
        print(
            common.markdown("Kernels on this GPU against plain torch", ("kernel", "case", "error", "bound", ""), rows)
        )
        raise RuntimeError("a kernel is wrong on this GPU: nothing else is worth timing")
    return [("Kernels on this GPU against plain torch", ("kernel", "case", "error", "bound", ""), rows)]


def _linears(_: argparse.Namespace) -> list[common.Table]:
    from benchmarks.cuda import linears

    peak = linears.INT8_PEAK.get(torch.cuda.get_device_name())
    rows = []
    for one in linears.measure():
        share = f"{one['product_tops'] * 1e12 / peak:.0%}" if peak else "unknown"
        rows.append((
            f"{one['k']} × {one['n']}", f"{one['ms']['bf16']:.3f}", f"{one['ms']['int8']:.3f}",
            f"{one['ms']['int8 product']:.3f}", f"{one['ratio']:.2f}", f"≥ {one['goal']}",
            f"{one['product_tops']:.0f}", share, f"{one['bf16_tflops']:.0f}", f"{one['error']:.1e}",
        ))  # fmt: skip
    heads = ("K × N", "bf16 ms", "int8 ms", "product alone ms", "× bf16", "goal", "int8 TOPS", "of peak", "bf16 TFLOPS",
             "relative error")  # fmt: skip
    return [(f"INT8 linear with the quantization of its input, M = {linears.ROWS}", heads, rows)]


def _steps(chosen: argparse.Namespace) -> list[common.Table]:
    from benchmarks.cuda import steps

    rows = []
    for name in chosen.network or steps.NETWORKS:
        for one in steps.measure(name, FOLDER / name, torchao=not chosen.no_torchao):
            goal = "" if one["goal"] is None else f"≥ {one['goal']}"
            rows.append((
                one["network"], one["way"], f"{one['ms']:.1f}", f"{one['ratio']:.2f}", goal,
                f"{one['weight_bytes'] / 1e6:.0f}", f"{one['peak_bytes'] / 1e9:.2f}", one["attention"],
            ))  # fmt: skip
    if not find_spec("torchao"):
        rows.append(("", "torchao", "not installed here", "", "", "", "", ""))
    heads = ("network", "way", "ms", "× bf16", "goal", "weights MB", "peak GB", "attention")
    return [("A step, one guidance branch", heads, rows)]


def _quality(_: argparse.Namespace) -> list[common.Table]:
    from benchmarks.cuda import bundle

    found = bundle.quality(bundle.export(FOLDER / "digits"))
    rows = [(one["dtype"], f"{one['psnr_db']:.1f}", f"≥ {one['goal']:.0f}") for one in found]
    return [("sample:digits, clips against onnxruntime's of the same bundle", ("floats", "PSNR dB", "goal"), rows)]


def _switching(_: argparse.Namespace) -> list[common.Table]:
    from benchmarks.cuda import bundle

    place = FOLDER / "digits"
    one = bundle.switching(place if (place / "manifest.json").is_file() else bundle.export(place))
    row = (
        f"{one['same']:.4f}",
        f"{one['switch']:.4f}",
        f"{one['spread']:.4f}",
        str(one["captures"]),
        str(one["grown"]),
    )
    heads = ("same bin ms", "another bin ms", "spread ms", "captured graphs", "bytes allocated")
    return [("Going to another bin, one program of four bins", heads, [row])]


RUNS: dict[str, Callable[[argparse.Namespace], Sequence[common.Table]]] = {
    "checks": _checks, "linears": _linears, "steps": _steps, "quality": _quality, "switching": _switching,
}  # fmt: skip


if __name__ == "__main__":
    main()
