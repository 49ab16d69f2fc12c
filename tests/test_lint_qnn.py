"""What lint says of a graph, and what the real compiler and its emulator then do: they must agree, row by row.

One compilation takes 0.1 to 0.3 s and there is a graph or two for each row; hence more seconds than other files.
"""

from __future__ import annotations

from functools import cache

import pytest

from tests import qnn_trial
from tests.lint_cases import CASES, Case, Maker
from vdq_export.graph import Graph
from vdq_export.lint import LintReport, lint_graphs
from vdq_export.lint.table import tables
from vdq_export.targets.qnn import hexagon

ARCH = "v75"
RULES = {rule.id: rule for rule in tables()["qnn"].rule}
# Wrong: this much worse than the same operator in its clean form. The weakest row is the 8-bit operand beside a 16-bit
# one, 30 dB; emulator and reference evaluator agree to within a quantization step on all clean forms.
WORSE_DB = 20.0
NEEDS_QNN = pytest.mark.skipif(not hexagon.available(), reason="onnxruntime-qnn is not installed")
each_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.rule)


@cache
def outcome(maker: Maker) -> qnn_trial.Outcome:
    return qnn_trial.outcome(*maker(), ARCH)


def linted(maker: Maker) -> LintReport:
    return lint_graphs({"g.onnx": Graph.from_proto(maker()[0])}, f"qnn-{ARCH}")


def test_every_rule_has_a_case() -> None:
    assert {f"qnn/{case.rule}" for case in CASES} == set(RULES)


@each_case
def test_lint_finds_the_planted_fault(case: Case) -> None:
    assert f"qnn/{case.rule}" in {finding.rule for finding in linted(case.planted).findings}


@each_case
def test_lint_is_silent_on_the_clean_form(case: Case) -> None:
    assert linted(case.clean).findings == ()


@NEEDS_QNN
@each_case
def test_the_compiler_agrees(case: Case) -> None:
    """Refused where the row says so; wrong by more than WORSE_DB (or a crash), or in float, where it says that.

    And the other way, whichever row speaks: what the compiler refuses has an error that says so, what it takes none.
    """
    clean, planted = outcome(case.clean), outcome(case.planted)
    assert (clean.refused, clean.crashed, clean.floats) == ("", False, 0)
    kind = RULES[f"qnn/{case.rule}"].kind
    if kind in ("refused", "fallback"):
        assert planted.refused
    elif kind == "wrong":
        assert planted.crashed or planted.sqnr_db < clean.sqnr_db - WORSE_DB
    else:
        assert kind == "slow" and planted.floats > 0
    predicted = [one.rule for one in linted(case.planted).errors if one.kind in ("refused", "fallback")]
    assert bool(planted.refused) == bool(predicted), (planted, predicted)
