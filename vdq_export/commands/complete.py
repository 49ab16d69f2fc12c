"""What the shell offers for a value: targets, recipes, samples, passes, folders of bundles. Looks, and loads nothing.

Whoever presses a key waits for this, so names come from file names, without importing torch for them.
"""

from __future__ import annotations

import ast
import pkgutil
from collections.abc import Callable, Iterable
from pathlib import Path

import click
from click.shell_completion import BashComplete, CompletionItem, add_completion_class

import vdq_export.passes
import vdq_export.samples
from vdq_export import recipe, targets
from vdq_export.manifest import MANIFEST

Completer = Callable[[click.Context, click.Parameter, str], list[CompletionItem]]
PROGRAM, VARIABLE = "vdq-export", "_VDQ_EXPORT_COMPLETE"  # what click's scripts set when they ask


def of(names: Callable[[], Iterable[str]], *, files: bool = False) -> Completer:
    """Complete with `names()`, or with files where none of them fits."""

    def complete(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
        found = [CompletionItem(name) for name in names() if name.startswith(incomplete)]
        return found if found or not files else [CompletionItem(incomplete, type="file")]

    return complete


def target_names() -> list[str]:
    """As targets.catalogue() has them, whose modules take their time to import."""
    files = [one.name for one in pkgutil.iter_modules(targets.__path__)]
    return sorted(name.replace("_", "-") for name in files if not name.startswith("_"))


def isas(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What --isa takes for the --target before it. This one does import the targets."""
    known = targets.catalogue().get(context.params.get("target") or "ort-int8")
    return [] if known is None else of(lambda: known.spec().isas)(context, parameter, incomplete)


def sample_names() -> list[str]:
    """NAMES of the sample packages, with the prefix that makes them models."""
    found = []
    for folder in map(Path, vdq_export.samples.__path__):
        for file in sorted(folder.glob("*/__init__.py")):
            for line in ast.parse(file.read_text(encoding="utf-8")).body:
                if isinstance(line, ast.Assign) and ast.unparse(line.targets[0]) == "NAMES":
                    found += [f"sample:{name}" for name in ast.literal_eval(line.value)]
    return found


def pass_names() -> list[str]:
    """What --dump-after takes."""
    passes = (one.name for one in pkgutil.iter_modules(vdq_export.passes.__path__))
    return ["all", *(name for name in passes if not name.startswith("_"))]


def bundle_folders(context: click.Context, parameter: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Folders of bundles beside what was typed; where there are none, folders to look into."""
    typed = Path(incomplete or ".")
    parent = typed if incomplete.endswith("/") or not incomplete else typed.parent
    try:
        inner = sorted(parent.iterdir())
    except OSError:
        return []
    found = [str(one) for one in inner if (one / MANIFEST).is_file() and str(one).startswith(incomplete)]
    return [CompletionItem(name) for name in found] or [CompletionItem(incomplete, type="dir")]


models = of(sample_names, files=True)
target = of(target_names)
recipes = of(recipe.names, files=True)
passes = of(pass_names)


class Bash(BashComplete):
    """Bash breaks words at colons, which the names of samples and of factories have."""

    def get_completion_args(self) -> tuple[list[str], str]:
        args, incomplete = super().get_completion_args()
        words, incomplete = joined(args, incomplete)
        self._prefix = incomplete.rpartition(":")[0] + ":" if ":" in incomplete else ""
        return words, incomplete

    def format_completion(self, item: CompletionItem) -> str:
        return f"{item.type},{str(item.value).removeprefix(self._prefix)}"


def joined(args: list[str], incomplete: str) -> tuple[list[str], str]:
    """Words as they were typed: `sample`, `:`, `di` is one; `--target`, `=`, `q` are an option and its value."""
    words = list[str]()
    for word in args:
        if words and (word == ":" or words[-1].endswith(":")):
            words[-1] += word
        elif word != "=":
            words.append(word)
    if words and (incomplete == ":" or words[-1].endswith(":")):
        incomplete = words.pop() + incomplete
    return words, "" if incomplete == "=" else incomplete


def prepare() -> None:
    """Answer for bash as above. For a process that completes, before it does."""
    add_completion_class(Bash)
