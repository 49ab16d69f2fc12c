"""All benchmarks, one process each: python -m benchmarks [--small] [--threads N]. Results: benchmarks/results."""

from __future__ import annotations

import subprocess
import sys

from benchmarks.common import ROOT

NAMES = ("quality", "speed", "footprint", "export_cost", "solve_speed", "branch_cost")

if __name__ == "__main__":
    for name in NAMES:
        subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *sys.argv[1:]], cwd=ROOT, check=True)
