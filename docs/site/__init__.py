"""The documentation site: what mkdocs shows beside docs/*.md, made from docstrings, click and benchmark results.

`make docs` builds it. `python -m docs.site` writes the measured tables anew that stand inside docs/*.md.
"""

from pathlib import Path

ROOT = Path(__file__).parents[2]
