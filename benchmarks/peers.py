"""The peers' own environment, .venv-peers: they pin versions of what we use, so they get their own."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from pathlib import Path

from benchmarks.common import ROOT

PLACE = ROOT / ".venv-peers"
REQUIREMENTS = ROOT / "benchmarks" / "requirements-peers.txt"


def python() -> Path:
    """The interpreter of .venv-peers; installs it on first use and whenever the requirements changed."""
    interpreter = PLACE / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    stamp = PLACE / "requirements.txt"
    wanted = REQUIREMENTS.read_text()
    if not stamp.exists() or stamp.read_text() != wanted:
        print("installing the peers into .venv-peers", file=sys.stderr)
        venv.create(PLACE, with_pip=True, clear=True)
        (PLACE / ".gitignore").write_text("*\n")
        subprocess.run([interpreter, "-m", "pip", "install", "-q", "-r", REQUIREMENTS], check=True)
        stamp.write_text(wanted)
    return interpreter
