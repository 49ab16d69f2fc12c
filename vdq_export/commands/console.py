"""Where commands print their tables: the width of the terminal, and whole lines where no terminal is."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table

WHOLE = 10_000  # columns for pipes and files: grep and scripts want a row in one line, whole


def console(**settings: Any) -> Console:
    """Standard output. `COLUMNS` counts on terminals only."""
    width = None if sys.stdout.isatty() else WHOLE
    return Console(width=width, highlight=False, **settings)


def table(*headings: str, **settings: Any) -> Table:
    """A table whose first column, which names the row, is never cut; of what stands in the others nothing is lost."""
    made = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, **settings)
    for place, heading in enumerate(headings):
        made.add_column(heading, overflow="fold", no_wrap=place == 0)
    return made
