"""What a bundle for somebody else's toolchain carries beside its graphs: encodings, and what lint says of them."""

from __future__ import annotations

from collections.abc import Mapping

from vdq_export import targets
from vdq_export.bundle_writer import BundleWriter
from vdq_export.errors import StrictError
from vdq_export.graph import Graph
from vdq_export.lint.engine import lint_graphs
from vdq_export.lint.sarif import to_sarif
from vdq_export.lint.table import default_profile, has_rules
from vdq_export.progress import Reporter
from vdq_export.target_spec import TargetSpec

SHOWN = 5  # findings told one by one


def write(
    writer: BundleWriter, graphs: Mapping[str, Graph], spec: TargetSpec, *, strict: bool, reporter: Reporter
) -> None:
    """The target's own files, and what lint says of `graphs` {bundle path: the graph there} where it has rules for it.

    A target that hands over other graphs than these returns them from its hand_off(): they are linted. Findings are
    told. Raises StrictError with `strict` when one of them is an error.
    """
    own = getattr(targets.load(spec.name), "hand_off", None)
    if own is not None:
        graphs = own(writer, graphs, spec, reporter) or graphs
    if not has_rules(spec.name):
        return
    found = lint_graphs(graphs, default_profile(spec.name, spec.isa))
    writer.add_file("handoff/lint.json", found.to_json())
    writer.add_file("handoff/lint.sarif", to_sarif(found))
    reporter.note(f"lint for {found.profile}: {len(found.errors)} errors, {len(found.warnings)} warnings")
    for one in (*found.errors, *found.warnings)[:SHOWN]:
        reporter.note(f"  {one.rule} at {one.node}: {one.message}")
    if strict and found.errors:
        first = found.errors[0]
        raise StrictError(
            f"--strict: lint for {found.profile} has {len(found.errors)} errors, first {first.rule} at {first.node}: "
            f"{first.message}",
            hint=first.fix,
        )
