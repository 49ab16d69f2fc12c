"""Units to tables: mean ± standard error over seeds, differences to bases and to the papers' orders, pair by pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from benchmarks import common
from benchmarks.common import mean_error, plus_minus
from benchmarks.fidelity import targets
from benchmarks.fidelity.notes import why, why_out_of_order
from benchmarks.fidelity.rows import TABLES, Row, Table
from benchmarks.fidelity.run import Plan, error_file
from benchmarks.fidelity.setting import Setting
from benchmarks.fidelity.units import Measured, load

JUDGED = ("digit", "direction", "speed")
Found = Mapping[str, list[Measured]]  # row label -> one entry a seed


def write_tables(plan: Plan, samples: Sequence[str], seeds: int) -> None:
    """One pair of result files a table; with all tables also what they have to show."""
    settings = {sample: [Setting(sample, seed, plan.calibration) for seed in range(seeds)] for sample in samples}
    measured: dict[str, dict[str, Found]] = {}
    for table in plan.chosen():
        tables: list[common.Table] = []
        data: dict[str, Any] = {"source": table.source, "rows": {}}
        texts = [_how(plan, seeds, table), *([table.note] if table.note else [])]
        for sample, several in settings.items():
            found, errors = _collect(plan, table, several)
            if not any(found.values()):
                texts.append(f"{sample}: nothing measured. {'; '.join(sorted(set(errors.values())))}")
                continue
            tables.append((sample, *_body(table, sample, found, errors, seeds)))
            texts += _order(table, sample, found)
            data["rows"][sample] = {label: [asdict(one) for one in many] for label, many in found.items()}
            measured.setdefault(table.name, {})[sample] = found
        commits = sorted({one["commit"] for rows in data["rows"].values() for many in rows.values() for one in many})
        texts.append(f"Commits measured at: {', '.join(commits)}.")
        data |= {"seeds": seeds, "clips": plan.clips, "judged": plan.judged, "calibration": plan.calibration}
        data["peer_versions"] = _versions(data["rows"])
        name = f"fidelity-{table.name}"
        notes = "\n\n".join(texts)
        common.write(name, table.title, tables, data, notes, small=plan.partial, module="fidelity")
    if len(plan.tables) == len(TABLES):
        _write_targets(plan, measured)


def _write_targets(plan: Plan, measured: Mapping[str, Mapping[str, Found]]) -> None:
    found = targets.checks(targets.Results(TABLES, measured))
    data = {"checks": [one._asdict() for one in found]}
    notes = "PSNR: means over seeds, as in the tables. Comparisons are paired by seed and allow one standard error."
    rows = [one.cells for one in found]
    common.write(
        "fidelity-targets", "Targets", [("", targets.HEADS, rows)], data, notes, small=plan.partial, module="fidelity"
    )


def _collect(plan: Plan, table: Table, settings: Sequence[Setting]) -> tuple[dict[str, list[Measured]], dict[str, str]]:
    """What was measured of each row, and why the others were not."""
    found: dict[str, list[Measured]] = {}
    errors: dict[str, str] = {}
    for row in table.rows:
        found[row.label] = []
        for setting in settings:
            try:
                unit = plan.unit(table, row, setting)
                measured = load(unit) if unit else None
            except Exception as error:  # a sample or recipe that does not exist
                errors[row.label] = str(error)
                continue
            if measured is not None:
                found[row.label].append(measured)
            elif unit is not None and error_file(unit).exists():
                errors[row.label] = error_file(unit).read_text()
    return found, errors


def _body(
    table: Table, sample: str, found: Found, errors: Mapping[str, str], seeds: int
) -> tuple[list[str], list[list[str]]]:
    policies = any(one.policy for many in found.values() for one in many)
    heads = ["row", "PSNR dB", "SSIM", "temporal error ×1000", *(f"{name} %" for name in JUDGED), "MB"]
    heads += ["bits", "computed %"] if policies else []
    rows = []
    reference = max((many[0] for many in found.values() if many), key=lambda one: one.judged)
    for row in table.rows:
        many = found[row.label]
        if not many:
            rows.append([row.label, "not run", *[""] * (len(heads) - 2), _short(errors.get(row.label, "yet"))])
            continue
        cells = [row.label, *_numbers(many)]
        cells += [_bits(many), _computed(many)] if policies else []
        rows.append([*cells, _note(table, row, sample, found, seeds)])
    exact = [f"{100 * reference.float_judge[name]:.0f}" for name in JUDGED] if reference.float_judge else [""] * 3
    rows.insert(0, ["float", "", "", "", *exact, *[""] * (len(heads) - 6)])
    return [*heads, "note"], rows


def _numbers(many: Sequence[Measured]) -> list[str]:
    judged = [plus_minus([100 * one.judge[name] for one in many], 1) if many[0].judge else "" for name in JUDGED]
    if many[0].judged > len(many[0].psnr):
        judged = [f"{cell} ({sum(one.judged for one in many)})" for cell in judged]
    return [
        plus_minus([one.mean_psnr for one in many], 2),
        plus_minus([sum(one.ssim) / len(one.ssim) for one in many], 4),
        plus_minus([1000 * sum(one.temporal) / len(one.temporal) for one in many], 2),
        *judged,
        f"{many[0].bundle_bytes / 1e6:.1f}" if many[0].bundle_bytes else "",
    ]


def _bits(many: Sequence[Measured]) -> str:
    bits = [one.runtime["average_bits"] for one in many if "average_bits" in one.runtime]
    return f"{mean_error(bits)[0]:.2f}" if bits else ""


def _computed(many: Sequence[Measured]) -> str:
    """Percentage of the steps that ran instead of reusing an output."""
    shares = [1 - one.runtime["reused_steps"] / one.runtime["steps"] for one in many if one.runtime.get("steps")]
    return f"{100 * mean_error(shares)[0]:.0f}" if shares else ""


def _note(table: Table, row: Row, sample: str, found: Found, seeds: int) -> str:
    told = []
    if len(found[row.label]) < seeds:
        told.append(f"{len(found[row.label])} of {seeds} seeds")
    if row.base and (difference := _difference(found, row.base, row.label)):
        mean, error = mean_error(difference)
        if mean < 0 and not abs(mean) <= error:
            reason = why(table.name, row.label, sample)
            told.append(f"below its base {row.base} by {-mean:.2f} ± {error:.2f} dB: {reason}")
        else:
            told.append(f"{mean:+.2f} ± {error:.2f} dB on {row.base}")
    return "; ".join(told)


def _order(table: Table, sample: str, found: Found) -> list[str]:
    """A sentence on each step of the paper's order."""
    told = []
    for chain in table.order:
        for worse, better in pairwise(chain):
            if difference := _difference(found, worse, better):
                mean, error = mean_error(difference)
                holds = mean > 0 if not error >= abs(mean) else None
                verdict = {True: "holds", None: "within error", False: "does not hold"}[holds]
                reason = f": {why_out_of_order(table.name)}" if holds is False else ""
                told.append(f"{worse} < {better} {verdict} ({mean:+.2f} ± {error:.2f} dB){reason}")
    return [f"{sample}, the order of {table.source}: {'; '.join(told)}."] if told else []


def _difference(found: Found, worse: str, better: str) -> list[float]:
    """PSNR of `better` less that of `worse`, seed by seed: they saw the same cases."""
    first = {one.seed: one.mean_psnr for one in found.get(worse, [])}
    return [one.mean_psnr - first[one.seed] for one in found.get(better, []) if one.seed in first]


def _how(plan: Plan, seeds: int, table: Table) -> str:
    source = f" After {table.source}." if table.source else ""
    return (
        f"Clips against the float model's, the same prompts and noise; mean ± standard error over {seeds} seeds, each "
        f"with calibration cases (10000 + 1000·seed, {plan.calibration} of them) and evaluation cases (200·seed, "
        f"{plan.clips} of them) of its own, 20 steps, both guidance branches. The judge sees the same clips, or "
        "as many as stand in parentheses. Differences are paired by seed. Temporal error: mean absolute "
        f"difference of frame-to-frame changes, pixels in [0, 1].{source}"
    )


def _versions(rows: Mapping[str, Mapping[str, list[dict[str, Any]]]]) -> dict[str, str]:
    entries = [one for by_label in rows.values() for many in by_label.values() for one in many]
    return {name: version for one in entries for name, version in one["versions"].items()}


def _short(text: str) -> str:
    line = " ".join(text.split()).replace("|", "/")
    return line if len(line) <= 200 else f"{line[:200]} …"
