"""`python -m tests.typecheck`: mypy --strict over a staged install, and over what makes the site.

At the root of the repository mypy would see only vdq_export/ and be falsely content: passes, targets, calib and samples
become subpackages by installing. How many files it checked is compared with how many there are.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.staging import ROOT, copy_sources, install


def main() -> int:
    """0 when mypy is content with every file."""
    with tempfile.TemporaryDirectory() as temporary:
        sources, stage = copy_sources(Path(temporary) / "sources"), Path(temporary) / "stage"
        install(sources, stage)
        shutil.copytree(ROOT / "docs/site", stage / "docs/site")
        (stage / "docs/__init__.py").touch()
        settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
        mypy = [
            sys.executable,
            "-m",
            "mypy",
            "--follow-imports=silent",
            "--no-namespace-packages",
            *settings,
            "-p",
            "vdq_export",
            "-p",
            "docs",
        ]
        done = subprocess.run(mypy, cwd=stage, capture_output=True, text=True, check=False)
        print(done.stdout, done.stderr, sep="", end="")
        present = sum(len(list((stage / name).rglob("*.py"))) for name in ("vdq_export", "docs"))
    found = re.search(r"(?:checked|found in) (\d+) source files?", done.stdout)
    checked = int(found[1]) if found else 0
    if checked != present:
        print(f"mypy checked {checked} files of {present}")
        return 1
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
