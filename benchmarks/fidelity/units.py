"""One row on one setting: what it is named by, running it, and the JSON that stays.

A unit's name is a hash of: FORMAT; the row's recipe as it stands after its changes, without names, texts, thresholds
and what is at its default; target, bins, policy or peer; the sample's weights; the cases calibrated and evaluated on.
Not of the compiler's code: whoever changes what a recipe computes raises FORMAT, or runs with --fresh. The commit a
unit was measured at stands in it and in the tables.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import vdq_export
from benchmarks.common import ROOT
from benchmarks.fidelity import peers
from benchmarks.fidelity.rows import Row, merged
from benchmarks.fidelity.setting import FOLDER, Clip, Setting, write_atomically
from vdq_export import recipe as recipes
from vdq_export.bundle import Bundle
from vdq_export.errors import VdqError
from vdq_export.metrics import psnr_db, ssim, temporal_difference_error
from vdq_export.recipe import Recipe

FORMAT = 2  # 1: before hoisting
TEXTS = ("name", "summary", "source", "verify", "format")  # of a recipe: no number follows from them


@dataclass(frozen=True)
class Unit:
    """clips: compared one by one with the float model's; judged: how many the judge sees, at least as many."""

    row: Row
    setting: Setting
    clips: int
    judged: int
    policy: str = ""  # the row's, with the share filled in

    @property
    def count(self) -> int:
        return max(self.clips, self.judged)

    @property
    def bundle_key(self) -> str:
        """Of what an export depends on: rows that differ in their policy alone share one."""
        return _digest({**self._made_of(), "policy": ""})

    @property
    def path(self) -> Path:
        measured = {"first": self.setting.first_case, "clips": self.clips}
        return FOLDER / "units" / f"{_digest({**self._made_of(), **measured, 'policy': self.policy})}.json"

    def _made_of(self) -> dict[str, Any]:
        row, setting = self.row, self.setting
        made = {
            "format": FORMAT,
            "weights": setting.weights,
            "calibration": [setting.first_calibration, setting.calibration],
        }
        if row.peer:
            return {**made, "peer": peers.identity(row.peer)}
        tsw = recipe_of(row).tsw if row.tsw is None else row.tsw
        return {**made, "recipe": essence(recipe_of(row)), "target": row.target, "tsw": tsw, "optimal": row.optimal}


@dataclass(frozen=True)
class Measured:
    """psnr, ssim, temporal: one number a clip. judge: {measure: fraction right of `judged`}. runtime: what a policy
    did. seconds: of CPU time of this process, for the export and for the clips."""

    label: str
    sample: str
    seed: int
    commit: str
    psnr: list[float]
    ssim: list[float]
    temporal: list[float]
    judged: int
    judge: dict[str, float]
    float_judge: dict[str, float]
    bundle_bytes: int = 0
    policy: str = ""
    runtime: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def mean_psnr(self) -> float:
        return sum(self.psnr) / len(self.psnr)

    @property
    def high_share(self) -> float:
        """Share of steps in high precision, to four digits: it goes into the policies that take it over."""
        high = self.runtime["high_steps"]
        return round(high / (self.runtime["low_steps"] + high), 4)


def recipe_of(row: Row) -> Recipe:
    """The row's recipe with its changes. Raises RecipeError."""
    plain = msgspec.to_builtins(recipes.load(row.recipe))
    return msgspec.convert(merged(plain, row.settings), Recipe)


def essence(recipe: Recipe) -> dict[str, Any]:
    """The settings that differ from a recipe's defaults, so that a new key with a default makes nothing stale."""
    default = msgspec.to_builtins(Recipe(name="", summary=""))
    different = _difference(msgspec.to_builtins(recipe), default)
    for text in (*TEXTS, "tsw"):  # bins are named beside the recipe
        different.pop(text, None)
    different["keep_float"] = [rule["match"] for rule in different.get("keep_float", [])]
    different["override"] = [{**rule, "why": ""} for rule in different.get("override", [])]
    return different


def _difference(settings: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in settings.items():
        other = default.get(key)
        if isinstance(value, Mapping) and isinstance(other, Mapping):
            if inner := _difference(value, other):
                found[key] = inner
        elif value != other:
            found[key] = value
    return found


def load(unit: Unit) -> Measured | None:
    """What the unit measured, if it was and the judge saw enough."""
    if not unit.path.exists():
        return None
    found = Measured(**json.loads(unit.path.read_text()))
    return found if found.judged >= unit.judged else None


class Exports:
    """The bundle of the unit at hand; the last one only is kept. One user a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._key = folder, ""
        self.seconds = 0.0
        shutil.rmtree(folder, ignore_errors=True)

    def bundle(self, unit: Unit) -> Path:
        if unit.bundle_key != self._key:
            self._key = ""
            start = time.process_time()
            self._export(unit)
            self._key, self.seconds = unit.bundle_key, time.process_time() - start
        return self._folder

    def _export(self, unit: Unit) -> None:
        row, setting = unit.row, unit.setting
        record = setting.record
        record.parent.mkdir(parents=True, exist_ok=True)
        known = all(one.exists() for one in _records(record, setting))
        vdq_export.export(
            setting.model,
            recipe=recipe_of(row),
            target=row.target,
            tsw=row.tsw,
            out=self._folder,
            force=True,
            optimal_bins=row.optimal,
            traced={name: graph.copy() for name, graph in setting.graphs.items()},
            **{"calibration" if known else "save_calibration": record},
        )


def _records(record: Path, setting: Setting) -> list[Path]:
    """The files of one calibration: one an expert."""
    names = [name for name, _ in setting.model.networks()]
    return [record.with_suffix(f".{name}{record.suffix}") if name else record for name in names]


def measure(unit: Unit, exports: Exports) -> Measured:
    """Run the unit and keep what it measured. Raises VdqError, PeerError."""
    start, runtime, versions = time.process_time(), dict[str, float](), dict[str, str]()
    if unit.row.peer:
        with peers.denoiser(unit.row.peer, unit.setting) as (denoiser, versions):
            seconds = {"export": time.process_time() - start}
            made, size = unit.setting.clips(denoiser, unit.count), 0
    else:
        path = exports.bundle(unit)
        seconds, size = {"export": exports.seconds}, Bundle.open(path, verify_hashes=False).size
        start = time.process_time() - exports.seconds
        policy: dict[str, Any] = {"policy": unit.policy} if unit.policy else {}
        with vdq_export.load(path, threads=1, verify_hashes=False, **policy) as transformer:
            made = unit.setting.clips(transformer, unit.count)
            runtime = {k: float(v) for k, v in asdict(transformer.statistics).items() if isinstance(v, int | float)}
    seconds["clips"] = time.process_time() - start - seconds["export"]
    found = _compared(unit, made, bundle_bytes=size, runtime=runtime, versions=versions, seconds=seconds)
    write_atomically(unit.path, lambda out: out.write(json.dumps(asdict(found), indent=1).encode()))
    return found


def _compared(unit: Unit, made: list[Clip], **more: Any) -> Measured:
    setting, judge = unit.setting, unit.setting.model.judge
    reference = setting.float_clips(unit.count)
    pairs = list(zip(reference, made, strict=True))[: unit.clips]
    if not all(np.isfinite(clip).all() for clip in made):
        raise VdqError(f"{unit.row.label} makes clips with NaN or Inf")
    cases = setting.cases(unit.judged)
    return Measured(
        label=unit.row.label,
        sample=setting.sample,
        seed=setting.seed,
        commit=commit(),
        psnr=[psnr_db(a, b) for a, b in pairs],
        ssim=[ssim(a, b) for a, b in pairs],
        temporal=[temporal_difference_error(a, b) for a, b in pairs],
        judged=unit.judged,
        judge=judge(made[: unit.judged], cases) if judge else {},
        float_judge=judge(reference[: unit.judged], cases) if judge else {},
        policy=unit.policy,
        **more,
    )


def commit() -> str:
    """The checkout's commit, with "+" when sources differ from it; "" without git."""
    try:
        run = {"cwd": ROOT, "capture_output": True, "text": True, "check": True}
        head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], **run).stdout.strip()  # type: ignore[call-overload]
        changed = subprocess.run(["git", "status", "--porcelain", "-uno", "*.py"], **run).stdout.strip()  # type: ignore[call-overload]
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed else "")


def _digest(settings: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
