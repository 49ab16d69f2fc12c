"""What the tables have to show, checked: thresholds on digits-hard, edges, bit switching, unexplained losses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.common import mean_error
from benchmarks.fidelity.notes import UNEXPLAINED, why
from benchmarks.fidelity.rows import GBS, PATTERNS, Row, Table
from benchmarks.fidelity.units import Measured, recipe_of

HARD, PLAIN = "sample:digits-hard", "sample:digits"
HEADS = ("target", "measured", "met")


class Check(NamedTuple):
    """met: None where something is not measured."""

    target: str
    measured: str
    met: bool | None

    @property
    def cells(self) -> list[str]:
        return [self.target, self.measured, {True: "yes", False: "**no**", None: "not measured"}[self.met]]


class Entry(NamedTuple):
    """One row of one table on one sample, measured."""

    table: str
    row: Row
    many: list[Measured]

    @property
    def psnr(self) -> float:
        return mean_error([one.mean_psnr for one in self.many])[0]

    def lost(self, measure: str) -> float:
        """Points that the judge's `measure` is below the float clips'."""
        return 100 * mean_error([one.float_judge[measure] - one.judge[measure] for one in self.many])[0]


@dataclass(frozen=True)
class Results:
    """rows: {table: {sample: {row label: one entry a seed}}}."""

    tables: Sequence[Table]
    rows: Mapping[str, Mapping[str, Mapping[str, list[Measured]]]]

    def entries(self, sample: str) -> Iterator[Entry]:
        for table in self.tables:
            for row in table.rows:
                if many := self.rows.get(table.name, {}).get(sample, {}).get(row.label, []):
                    yield Entry(table.name, row, many)

    def get(self, table: str, sample: str, label: str) -> Entry | None:
        wanted = (one for one in self.entries(sample) if (one.table, one.row.label) == (table, label))
        return next(wanted, None)

    def best(self, bits: int) -> Entry | None:
        """The static row with the highest PSNR on digits-hard."""
        return max((e for e in self.entries(HARD) if is_static(e.row, bits)), key=lambda e: e.psnr, default=None)


def is_static(row: Row, bits: int) -> bool:
    """Integers of `bits` for weights and activations of every quantized layer, nothing computed at run time."""
    if row.peer or row.policy:
        return False
    recipe = recipe_of(row)
    activations, weights = recipe.activations, recipe.weights
    plain = activations.granularity == "tensor" and activations.grid == weights.grid == "int"
    alike = not (recipe.override or recipe.allocate.size or recipe.allocate.bops) and recipe.schedule.delta is None
    return plain and alike and activations.bits == weights.bits == bits


def checks(results: Results) -> list[Check]:
    return [*_eight(results), *_four(results), *_edges(results), *_switching(results), *_losses(results)]


def _eight(results: Results) -> Iterator[Check]:
    best = results.best(8)
    peers = [one for one in results.entries(HARD) if one.row.peer]
    yield _at_least("digits-hard: best static W8A8 ≥ 40 dB", best, 40.0)
    peer = max(peers, key=lambda one: one.psnr, default=None)
    name = f" ({peer.row.label}, {peer.psnr:.2f} dB)" if peer else ""
    yield _at_least(f"digits-hard: … and ≥ 6 dB above the best peer{name}", best, peer and peer.psnr + 6)


def _four(results: Results) -> Iterator[Check]:
    best = results.best(4)
    start = results.get("w4a4", HARD, "static-minmax W4A4")
    yield _at_least("digits-hard: best static W4A4 ≥ 22 dB", best, 22.0)
    name = f" ({start.psnr:.2f} dB)" if start else ""
    yield _at_least(f"digits-hard: … and ≥ 10 dB above static-minmax at W4A4{name}", best, start and start.psnr + 10)
    plain = results.get(best.table, PLAIN, best.row.label) if best else None
    name = f" ({plain.psnr:.2f} dB)" if plain else ""
    yield _at_least(f"digits-hard: … and within 1 dB of the same on digits{name}", best, plain and plain.psnr - 1)
    target = "digits-hard: … and digit accuracy within 10 points of float"
    if best is None:
        yield Check(target, "", None)
    else:
        lost = best.lost("digit")
        yield Check(target, f"{lost:.1f} points lost on {sum(one.judged for one in best.many)} clips", lost <= 10)


def _at_least(target: str, entry: Entry | None, threshold: float | None) -> Check:
    if entry is None or threshold is None:
        return Check(target, "", None)
    return Check(target, f"{entry.psnr:.2f} dB ({entry.table}: {entry.row.label})", entry.psnr >= threshold)


def _edges(results: Results) -> Iterator[Check]:
    labels = [row.label for table in results.tables if table.name == "ranges" for row in table.rows if row.optimal]
    pairs = [(label.replace("optimal", "even"), label) for label in labels]
    yield from _compare(results, "ranges", "optimal edges ≥ even edges", pairs)


def _switching(results: Results) -> Iterator[Check]:
    pairs = [(f"{name} ({what}), bits of {GBS}", GBS) for name, what in PATTERNS.items()]
    yield from _compare(results, "switching", "δ-GBS ≥ each baseline at equal bits", pairs)


def _compare(results: Results, table: str, title: str, pairs: Sequence[tuple[str, str]]) -> Iterator[Check]:
    """One check a sample: every (lower, higher) pair of labels, within the standard error of the paired difference."""
    for sample in results.rows.get(table, {}):
        told, met = [], True
        for lower, higher in pairs:
            first, second = results.get(table, sample, lower), results.get(table, sample, higher)
            if first is None or second is None:
                continue
            seeds = {one.seed: one.mean_psnr for one in first.many}
            mean, error = mean_error([one.mean_psnr - seeds[one.seed] for one in second.many if one.seed in seeds])
            told.append(f"{higher} on {lower}: {mean:+.2f} ± {error:.2f} dB")
            met = met and (mean >= 0 or -mean <= error)
        yield Check(f"{sample.removeprefix('sample:')}: {title}", "; ".join(told), met if told else None)


def _losses(results: Results) -> Iterator[Check]:
    for sample in sorted({sample for by_sample in results.rows.values() for sample in by_sample}):
        below, unexplained = 0, []
        for entry in results.entries(sample):
            base = results.get(entry.table, sample, entry.row.base) if entry.row.base else None
            if base is not None and entry.psnr < base.psnr:
                below += 1
                if why(entry.table, entry.row.label, sample) == UNEXPLAINED:
                    unexplained.append(f"{entry.table}: {entry.row.label}")
        text = f"{below} below, {len(unexplained)} unexplained" + (
            f" ({'; '.join(unexplained)})" if unexplained else ""
        )
        target = f"{sample.removeprefix('sample:')}: no method below what it starts from without a reason"
        yield Check(target, text, not unexplained)
