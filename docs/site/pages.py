"""The pages that are made from the sources: a page a pass, a stage of calibration and a target; schemas; results."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docs.site import ROOT, cli
from docs.site.docstrings import docstring, first_sentence, markdown
from vdq_export import pipeline, targets

LISTS = {
    "CANONICAL": "the canonical form, for every target",
    "FLOAT": "float rewrites that the plan decides",
    "SHARED": "on the weights, once for all bins",
    "PER_BIN": "in each bin's graph",
}
STAGES = {  # what looks at data, in the order in which it runs
    "observe": "Calibration",
    "statistics": "Statistics of a value",
    "record": "The calibration record",
    "blocks": "Calibration by segments",
    "bins": "Bins",
    "smoothing": "Smoothing",
    "rotation": "Rotation",
    "formats": "Formats",
    "allocate": "Bits per layer",
    "low_rank": "Low-rank branches",
    "weight_ranges": "Ranges of weights",
    "ranges": "Ranges of activations",
    "clip": "Clip ratios",
    "gptq": "GPTQ",
    "attention": "Attention",
    "values": "Values between linears",
    "learned": "Learned scales",
    "step_reuse": "Step reuse",
}
Page = tuple[str, str]  # place in the site, Markdown


def generated() -> dict[str, str]:
    """Every made page: {place in the site: Markdown}."""
    made = dict([*_passes(), *_stages(), *_targets(), *_results()])
    made["reference/commands.md"] = cli.page()
    made["reference/schemas.md"] = _schemas()
    made["contributing.md"] = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    made["changes.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return made


def navigation(name: str) -> list[dict[str, str]]:
    """Entries of one made section, passes, stages or targets."""
    pages: dict[str, Any] = {"passes": _passes, "stages": _stages, "targets": _targets}
    return [{_title(text): place} for place, text in pages[name]()]


def passes_in_order() -> dict[str, tuple[str, str]]:
    """{pass: (which list it stands in, why it stands there)}, standard ones in their order, then the targets' own."""
    reasons = dict(re.findall(r'^    "(\w+)",  # (.+)$', Path(pipeline.__file__).read_text("utf-8"), re.MULTILINE))
    found = {
        name: (words, str(reasons.get(name, ""))) for key, words in LISTS.items() for name in getattr(pipeline, key)
    }
    for target, module in targets.catalogue().items():
        for name in (*getattr(module, "FORMS", ()), *module.PASSES):
            before = found.get(name, ("", ""))[0].removeprefix("of the target ")
            found[name] = (f"of the target {before + ', ' if before else ''}`{target}`", "")
    return found


def _passes() -> Iterator[Page]:
    places = passes_in_order()
    rows = ["| pass | what it does | where |", "|---|---|---|"]
    for name, (words, _) in places.items():
        text = docstring(ROOT / f"passes/{name}.py")
        rows.append(f"| [{name}](passes/{name}.md) | {first_sentence(text)} | {words} |")
    yield "passes.md", "# All passes\n\nIn the order in which they run.\n\n" + "\n".join(rows) + "\n"
    for name, (words, reason) in places.items():
        path = ROOT / f"passes/{name}.py"
        module = pipeline.load_pass(name)
        facts = [f"Runs: {words}" + (f" ({reason})" if reason else "") + "."]
        if module.AFTER:
            facts.append("After: " + ", ".join(f"[{one}]({one}.md)" for one in module.AFTER) + ".")
        facts.append(f"Source: `passes/{name}.py`.")
        yield f"passes/{name}.md", f"# {name}\n\n{markdown(docstring(path))}\n{' '.join(facts)}\n"


def _stages() -> Iterator[Page]:
    for name, title in STAGES.items():
        text = markdown(docstring(ROOT / f"calib/{name}.py"))
        yield f"stages/{name}.md", f"# {title}\n\n{text}\nSource: `calib/{name}.py`.\n"


def _targets() -> Iterator[Page]:
    for name, module in targets.catalogue().items():
        spec = module.spec()
        rows = ["| | runs | detail | how it is known |", "|---|---|---|---|"]
        rows += [
            f"| {_cell(one.subject)} | {'yes' if one.supported else 'no'} | {_cell(one.detail)} | {_cell(one.source)} |"
            for one in spec.table
        ]
        text = markdown(docstring(Path(str(module.__file__))))
        isas = ", ".join(f"`{one}`" for one in spec.isas)
        yield f"targets/{name}.md", f"# {name}\n\n{text}\n`--isa`: {isas or 'none'}.\n\n" + "\n".join(rows) + "\n"


def _results() -> Iterator[Page]:
    for path in sorted((ROOT / "benchmarks/results").glob("*.md")):
        yield f"results/{path.name}", path.read_text(encoding="utf-8")


def _schemas() -> str:
    """The keys of a bundle's JSON files, a section a file and a table a type."""
    parts = [
        "# Keys of a bundle's files",
        "From the JSON schemas in `vdq_export/schemas`, which are made from the types that read and write the files. "
        "Unknown keys are refused. What the files are for: [the bundle](../bundle-format.md).",
    ]
    for path in sorted((ROOT / "vdq_export/schemas").glob("*.schema.json")):
        held = json.loads(path.read_text(encoding="utf-8"))
        name = path.name.removesuffix(".schema.json")
        first = held["$ref"].rsplit("/", 1)[1]
        parts.append(f"## {name}")
        parts += [_type(kind, held["$defs"][kind]) for kind in (first, *(one for one in held["$defs"] if one != first))]
    return "\n\n".join(parts) + "\n"


def _type(name: str, held: dict[str, Any]) -> str:
    text = markdown(_cleaned(held.get("description", "")))
    rows = ["| key | type | default |", "|---|---|---|"]
    for key, value in held.get("properties", {}).items():
        default = "" if "default" not in value else f"`{json.dumps(value['default'], ensure_ascii=False)}`"
        rows.append(f"| `{key}` | {_cell(_kind(value))} | {_cell(default)} |")
    return f"### {name}\n\n{text}\n" + "\n".join(rows)


def _kind(value: dict[str, Any]) -> str:
    if "$ref" in value:
        return str(value["$ref"].rsplit("/", 1)[1])
    if "enum" in value:
        return ", ".join(f"`{json.dumps(one)}`" for one in value["enum"])
    if "anyOf" in value:
        return " or ".join(_kind(one) for one in value["anyOf"])
    if value.get("items"):
        return f"list of {_kind(value['items'])}"
    if "prefixItems" in value:
        return "[" + ", ".join(_kind(one) for one in value["prefixItems"]) + "]"
    return str(value.get("type", "any"))


def _cleaned(text: str) -> str:
    lines = text.split("\n")
    return "\n".join([lines[0], *(line.removeprefix("    ") for line in lines[1:])])


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;").replace("\n", " ")


def _title(text: str) -> str:
    return text.split("\n", 1)[0].removeprefix("# ")


def places() -> set[str]:
    """Where the made pages are; none is written for that."""
    calib = {f"stages/{name}.md" for name in STAGES}
    results = {f"results/{path.name}" for path in (ROOT / "benchmarks/results").glob("*.md")}
    made = {f"passes/{name}.md" for name in passes_in_order()} | {f"targets/{name}.md" for name in targets.catalogue()}
    single = {"passes.md", "contributing.md", "changes.md", "reference/commands.md", "reference/schemas.md"}
    return calib | results | made | single
