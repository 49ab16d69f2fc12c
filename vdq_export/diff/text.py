"""A difference as plain text, grouped by kind."""

from __future__ import annotations

from vdq_export.diff.compare import Difference, Kind

_TITLES: dict[Kind, str] = {
    "removed": "removed (only in the first)",
    "added": "added (only in the second)",
    "retyped": "retyped",
    "rewired": "rewired",
    "parameter": "parameters",
    "schedule": "schedule",
    "plan": "plan",
    "manifest": "manifest",
}


def render(difference: Difference) -> str:
    """Text that ends in a newline: one summary line, then one line a change."""
    lines = [_summary(difference)]
    if difference.renamed_io:
        lines.append(f"inputs and outputs renamed: {', '.join(difference.renamed_io)}")
    for kind, title in _TITLES.items():
        changes = [change for change in difference.changes if change.kind == kind]
        if changes:
            lines += ["", f"{title} ({len(changes)})", *(f"  {one.where}: {one.detail}" for one in changes)]
    if difference.follow_on:
        lines += ["", f"{difference.follow_on} values changed type because their inputs did"]
    return "\n".join(lines) + "\n"


def _summary(difference: Difference) -> str:
    renamed = f" ({difference.renamed} operators renamed)" if difference.renamed else ""
    if difference.same:
        return f"same: the two {difference.what}s are equal{renamed}"
    counts = ", ".join(f"{difference.counts[kind]} {kind}" for kind in _TITLES if kind in difference.counts)
    return f"different: {counts}{renamed}"
