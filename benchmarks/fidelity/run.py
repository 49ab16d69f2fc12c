"""All units of one sample and seed, those that share a bundle one after the other."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.fidelity.rows import TABLES, Row, Table
from benchmarks.fidelity.setting import Setting, write_atomically
from benchmarks.fidelity.units import Exports, Measured, Unit, load, measure
from vdq_export.errors import VdqError


@dataclass(frozen=True)
class Plan:
    """What to measure: tables by name, clips compared and judged a row, cases calibrated on."""

    tables: tuple[str, ...]
    clips: int
    judged: int
    calibration: int
    fresh: bool = False
    small: bool = False  # the first rows of each table only
    partial: bool = False  # not what the committed tables are made of

    def chosen(self) -> list[Table]:
        return [table for table in TABLES if table.name in self.tables]

    def unit(self, table: Table, row: Row, setting: Setting) -> Unit | None:
        """None while the row whose share of high-precision steps it takes over is not measured. Raises RecipeError."""
        policy = row.policy
        if row.share_of:
            source = next(other for other in table.rows if other.label == row.share_of)
            unit = self.unit(table, source, setting)
            found = load(unit) if unit else None
            if found is None:
                return None
            policy = policy.format(share=found.high_share, seed=setting.seed)
        return Unit(row, setting, self.clips, self.judged if row.many else self.clips, policy)


def run_group(plan: Plan, sample: str, seed: int) -> str:
    """Measure what is missing; returns what there was to do. A row that fails is noted, and the next one begins."""
    import torch

    torch.set_num_threads(1)
    setting, start = Setting(sample, seed, plan.calibration), time.perf_counter()
    try:
        setting.weights  # noqa: B018 (loads the sample)
    except VdqError as error:
        return str(error)
    done = failed = 0
    fresh = set[Path]()
    with tempfile.TemporaryDirectory() as folder:
        exports = Exports(Path(folder) / "bundle")
        for table, row in _in_turn(plan, setting):
            try:
                unit = plan.unit(table, row, setting)
            except Exception as error:  # a recipe that does not exist (yet) has no unit to note that in
                print(f"{sample} {seed} {row.label}: {error}", file=sys.stderr, flush=True)
                failed += 1
                continue
            if unit is None or _is_done(unit, plan.fresh and unit.path not in fresh):
                continue
            fresh.add(unit.path)
            found = _run(unit, exports)
            done, failed = done + (found is not None), failed + (found is None)
            told = f"{found.mean_psnr:.2f} dB, {_seconds(found)}" if found else "failed"
            print(f"{sample} {seed} {table.name} {row.label}: {told}", file=sys.stderr, flush=True)
    return f"{done} rows measured, {failed} failed, {time.perf_counter() - start:.0f} s"


def error_file(unit: Unit) -> Path:
    """Where it says why a unit failed."""
    return unit.path.with_suffix(".error")


def _is_done(unit: Unit, fresh: bool) -> bool:
    return not fresh and load(unit) is not None


def _run(unit: Unit, exports: Exports) -> Measured | None:
    try:
        found = measure(unit, exports)
    except Exception as error:  # whatever a method or a peer dies of is that row's result, not the end of the table
        text = f"{type(error).__name__}: {error}"
        write_atomically(error_file(unit), lambda out: out.write(text.encode()))
        print(text, file=sys.stderr, flush=True)
        return None
    error_file(unit).unlink(missing_ok=True)
    return found


def _in_turn(plan: Plan, setting: Setting) -> Sequence[tuple[Table, Row]]:
    """Rows of one bundle together, what the judge sees much of first, rows that need another's share last."""
    rows = [(table, row) for table in plan.chosen() for row in (table.rows[:3] if plan.small else table.rows)]
    order: dict[str, int] = {}

    def place(entry: tuple[Table, Row]) -> tuple[int, bool, bool]:
        row = entry[1]
        try:
            key = Unit(row, setting, plan.clips, plan.clips).bundle_key
        except Exception:  # said when its turn comes
            key = row.label
        return order.setdefault(key, len(order)), bool(row.share_of), not row.many

    return sorted(rows, key=place)


def _seconds(found: Measured) -> str:
    return ", ".join(f"{name} {value:.1f} CPU s" for name, value in found.seconds.items())
