"""What stands in for msgspec on machines without it reads and writes what msgspec does."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.staging import ROOT

SCRIPT = """
import sys
if {stand_in}:
    from benchmarks.cuda import _msgspec
    _msgspec.stand_in()
import msgspec
from vdq_export import recipe, targets
from vdq_export.errors import RecipeError
from vdq_export.jsonfile import decode, encode
from vdq_export.plan import Bin, LayerPlan, QuantPlan, Range, WeightPlan
from vdq_export.schedule import Schedule
from vdq_export.target_spec import TargetSpec

for name in recipe.names():
    one = recipe.load(name)
    assert msgspec.convert(msgspec.to_builtins(one), recipe.Recipe) == one
    print(encode(one, name).decode())
for name in ("cuda", "qnn"):
    made = msgspec.json.encode(targets.load(name).spec())
    assert decode(made, TargetSpec, name, RecipeError) == targets.load(name).spec()
    print(made.decode())
weight = WeightPlan(dtype="int8", qmax=127, why="", scale=(0.5,))
layer = LayerPlan(name="a", value="x", rows=2, shape=(2, 1), weight=weight,
                  activation=(Range(lo=-1.0, hi=1, scale=0.5, zero_point=3, why="é"),))
plan = QuantPlan(model="m", graph_hash="", target="cuda", recipe=recipe.load("rtn"),
                 bins=(Bin(index=0, t=(0.0, 1.0), steps=(1.0,)),), layers=(layer,), bins_why="")
assert QuantPlan.from_json(plan.to_json()) == plan
print(plan.to_json().decode())
for wrong in ('{{"a": 1}}', '[]', '{{', plan.to_json().decode().replace("0.5", '"0.5"', 1)):
    try:
        QuantPlan.from_json(wrong.encode())
    except Exception as error:
        print(type(error).__name__)
"""


def told(stand_in: bool) -> str:
    script = SCRIPT.format(stand_in=stand_in)
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_reads_and_writes_what_msgspec_does() -> None:
    assert told(True) == told(False)


@pytest.mark.parametrize("wrong", ["int", "float", "str"])
def test_it_refuses_wrong_types(wrong: str) -> None:
    script = f"from benchmarks.cuda._msgspec import convert\nconvert([], {wrong})"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "ValidationError" in done.stderr
