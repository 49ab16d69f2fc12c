"""`python -m benchmarks.scale_resume`: an export that is killed at random moments, again and again.

The digits sample with few calibration cases, --tsw 4, recipe svdquant-gptq (calibration, then groups of layers whose
solving is worth keeping). Three things are measured:

1. KILLS times: an export is killed (SIGKILL) at a random moment of its life, seeded, and started again with the same
   arguments until it ends by itself. Its bundle must be that of an export nobody killed, byte for byte.
2. What is saved: the seconds that the last of these starts takes, by how far the killed one had come.
3. What keeping finished work costs: exports with a store and without, alternately.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import statistics
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import common

KILLS, SEED, CASES, PAIRS = 30, 5, 3, 2
RECIPE = "svdquant-gptq"
QUARTERS = 4
MODEL: tuple[Any, Any] = (None, None)  # and its graph: what forked processes have from the start


def run(arguments: argparse.Namespace) -> None:
    kills = arguments.kills or (3 if arguments.small else KILLS)
    global MODEL
    MODEL = prepare(arguments.small, arguments.threads)
    with tempfile.TemporaryDirectory(prefix="vdq-resume-") as temporary:
        folder = Path(temporary)
        whole = _export(folder / "whole", small=arguments.small)
        wanted = contents(folder / "whole")
        print(f"uninterrupted: {whole['seconds']:.1f} s, {len(wanted)} files", flush=True)
        trials = _kill(folder, wanted, whole["seconds"], kills, small=arguments.small)
        pairs = _pairs(folder, wanted, 1 if arguments.small else PAIRS, small=arguments.small)
    _write(arguments, trials, pairs, whole)
    if failures := sum(not one["identical"] for one in trials):
        raise SystemExit(f"{failures} of {len(trials)} bundles differ")


def prepare(small: bool, threads: int) -> tuple[Any, Any]:
    """(the model, its graph). Exports are forked from this process, so that imports and tracing are none of theirs and
    all moments fall into work that is kept or written."""
    os.environ.update(common.limited(threads))
    from vdq_export import compiler
    from vdq_export.calib import group
    from vdq_export.samples import digits
    from vdq_export.trace import trace
    from vdq_export.work import store as work_store

    if small:
        from tests import tiny_model

        model = tiny_model.build()
    else:
        model = digits.load(calibration_cases=CASES)
    work_store.code_version()
    compiler.targets.load("ort-int8")
    group.LIGHT = 0  # groups of so small layers would be solved here, and not kept
    return model, trace(model)


def export(out: Path, *, small: bool, keep: bool = True) -> dict[str, float]:
    """The seconds it took, what it took from the store, and the seconds it spent there."""
    from vdq_export import compiler
    from vdq_export.work.place import Work, at_work

    model, graph = MODEL
    began = time.monotonic()
    with at_work(out, workers=1) as place:
        work = place if keep else Work(place.engine)
        compiler.export(model, traced={"": graph.copy()}, out=out, work=work, tsw=2 if small else 4, recipe=RECIPE)
        store = place.store
        assert store is not None
    return {"seconds": time.monotonic() - began, "taken": store.hits, "store_s": store.seconds}


def contents(bundle: Path) -> dict[str, str]:
    """{file: sha256} of everything in it, the manifest too."""
    files = sorted(place for place in bundle.rglob("*") if place.is_file())
    return {str(one.relative_to(bundle)): hashlib.sha256(one.read_bytes()).hexdigest() for one in files}


def _start(out: Path, **settings: bool) -> int:
    """The process of an export; it writes what export() says to "OUT.answer"."""
    if not (child := os.fork()):
        try:
            answer = export(out, **settings)
            out.with_name(f"{out.name}.answer").write_text(json.dumps(answer))
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    return child


def _answer(out: Path) -> dict[str, float]:
    place = out.with_name(f"{out.name}.answer")
    if not place.is_file():
        raise SystemExit("an export failed")
    answer: dict[str, float] = json.loads(place.read_text())
    place.unlink()
    return answer


def _export(out: Path, **settings: bool) -> dict[str, float]:
    os.waitpid(_start(out, **settings), 0)
    return _answer(out)


def _killed(out: Path, moment: float, small: bool) -> bool:
    """Whether SIGKILL at that moment came before the end."""
    child, deadline = _start(out, small=small), time.monotonic() + moment
    while time.monotonic() < deadline:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def _kill(folder: Path, wanted: dict[str, str], seconds: float, kills: int, *, small: bool) -> list[dict[str, Any]]:
    """Trials until `kills` processes were killed; each start goes on where the one before it was killed."""
    rng, trials, killed = random.Random(SEED), list[dict[str, Any]](), 0
    while killed < kills:
        out, moments, stages = folder / "out", list[float](), list[str]()
        while killed < kills and (not moments or rng.random() < 0.5):  # as a rule two kills a trial
            moment = rng.uniform(0.0, seconds)
            if not _killed(out, moment, small):
                break
            moments.append(moment)
            stages.append(_stage(folder))
            killed += 1
        there = (out / "manifest.json").is_file()  # an export was faster, or killed with the bundle in place
        answer = {"seconds": 0.0, "taken": 0.0} if there else _export(out, small=small)
        identical = contents(out) == wanted
        (folder / "out.answer").unlink(missing_ok=True)
        left = sorted(one.name for one in folder.iterdir() if one.name.startswith("out."))
        trials.append({"moments": moments, "stages": stages, "identical": identical, "left": left, **answer})
        print(json.dumps(trials[-1]), flush=True)
        for name in ("out", *left):
            shutil.rmtree(folder / name)
    return [one for one in trials if one["moments"]]


def _stage(folder: Path) -> str:
    """How far a killed export had come, by what it left."""
    units = len(list(folder.glob("out.work/units/*/*")))
    graphs = len(list(folder.glob("out.partial-*/graphs/*.onnx")))
    if (folder / "out").exists():
        return "bundle in place"
    return f"{graphs} graphs" if graphs else f"{units} units"


def _pairs(folder: Path, wanted: dict[str, str], count: int, *, small: bool) -> list[dict[str, float]]:
    pairs = []
    for number in range(count):
        pair = {}
        for keep in (True, False) if number % 2 else (False, True):
            out = folder / "pair"
            answer = _export(out, small=small, keep=keep)
            if contents(out) != wanted:
                raise SystemExit(f"the bundle made {'with' if keep else 'without'} a store differs")
            shutil.rmtree(out)
            pair["with" if keep else "without"] = answer["seconds"]
            pair |= {"store_s": answer["store_s"]} if keep else {}
        pairs.append(pair)
        print(json.dumps(pair), flush=True)
    return pairs


def _write(
    arguments: argparse.Namespace,
    trials: Sequence[dict[str, Any]],
    pairs: Sequence[dict[str, float]],
    whole: dict[str, float],
) -> None:
    seconds = whole["seconds"]
    kills = sum(len(one["moments"]) for one in trials)
    seen = [stage for one in trials for stage in one["stages"]]
    rows = [
        ("random kills", str(kills)),
        ("exports that were killed, once or more", str(len(trials))),
        (
            "of those, in the end identical to the uninterrupted one, every file",
            str(sum(one["identical"] for one in trials)),
        ),
        (
            "killed processes that had finished units, or were writing graphs",
            str(sum(one != "0 units" for one in seen)),
        ),
        (
            "work left beside a bundle that was complete when the kill came",
            str(sum(bool(one["left"]) for one in trials)),
        ),
        ("seconds without interruption", f"{seconds:.1f}"),
    ]
    with_store, without = ([one[name] for one in pairs] for name in ("with", "without"))
    share = statistics.fmean(one["store_s"] for one in pairs) / statistics.fmean(with_store)
    cost = [
        ("seconds of an export, finished work kept", common.plus_minus(with_store, 1)),
        ("seconds, nothing kept", common.plus_minus(without, 1)),
        ("ratio", f"{statistics.fmean(with_store) / statistics.fmean(without):.3f}"),
        ("share of the time in the store, measured inside", f"{share:.2%}"),
    ]
    tables: list[common.Table] = [
        (f"{kills} times SIGKILL, seed {SEED}", ["", ""], rows),
        (
            "Time saved: seconds of the run that ended by itself",
            ["last killed at", "exports", "mean seconds", "saved"],
            _saved(trials, seconds),
        ),
        ("What it costs", ["", ""], cost),
    ]
    notes = (
        f"The {'tiny test model' if arguments.small else f'digits sample with {CASES} calibration cases'}, recipe "
        f"{RECIPE}, one process for groups of layers, all of which are kept. Exports are forked from a process that "
        "has imported and traced everything, so that all moments fall into calibration, solving and writing."
    )
    data = {"seconds": seconds, "whole": whole, "trials": list(trials), "pairs": list(pairs), "seed": SEED}
    title = "Exports killed at random moments"
    common.write("scale-resume", title, tables, data, notes, small=arguments.small, module="scale_resume")


def _saved(trials: Sequence[dict[str, Any]], seconds: float) -> list[tuple[str, ...]]:
    rows = []
    for quarter in range(QUARTERS):
        low, high = (seconds * edge / QUARTERS for edge in (quarter, quarter + 1))
        mine = [one["seconds"] for one in trials if low <= max(one["moments"]) < high and one["seconds"]]
        if mine:
            mean = statistics.fmean(mine)
            rows.append((f"{low:.0f} … {high:.0f} s", str(len(mine)), f"{mean:.1f}", f"{1 - mean / seconds:.0%}"))
    return rows


def main() -> None:
    made = common.parser(__doc__)
    made.add_argument("--kills", type=int, help=f"random kills in all (default {KILLS}, with --small 3)")
    common.main(made, run, {})


if __name__ == "__main__":
    main()
