"""Does a hand-off's consumer take these graphs? Answered from a table of rules, before any vendor tool is at hand.

table.py      targets/tables/*.toml: one file a consumer, its rules and the operators it runs, each with its source
view.py       a graph as a consumer sees it: operators whose operands carry the encoding of the Q/DQ around them
signature.py  the little language for operand types, "u16, const s8/c -> u16"
checks_*.py   the primitives that rules are made of; a rule names one and gives its parameters
report.py     findings; sarif.py writes them for code-review tools
"""

from vdq_export.lint.engine import lint_bundle, lint_file, lint_graphs
from vdq_export.lint.report import Finding, LintReport
from vdq_export.lint.table import profiles

__all__ = ["Finding", "LintReport", "lint_bundle", "lint_file", "lint_graphs", "profiles"]
