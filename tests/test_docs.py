"""What the documentation says can be done is done here, or at least understood: commands, code, links, tables.

Pages of RUN are worked through from top to bottom in a folder of their own; all other commands are parsed by the
command's own parser, so that an option, a recipe or a target that is not there fails.
"""

from __future__ import annotations

import ast
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

import click
import pytest

from docs.site import pages, readme, recipes
from docs.site.hooks import home
from tests.docs_pages import DOCS, PAGES, ROOT, SHELLS, blocks, broken_links, commands, differences, name, ours
from vdq_export import recipe, targets
from vdq_export.cli import cli, main
from vdq_export.plan import QuantPlan

# Pages whose shell and Python blocks are run, up to the heading that is named.
RUN = {"tutorial.md": "", "bring-your-own-model.md": "### When it does not work", "how-it-works.md": ""}
# Why the commands of the other pages are parsed only.
PARSED = {
    "installation.md": "installs; its own command is doctor",
    "bisect.md": "a bundle that is not good enough; test_back_to_float.py searches one",
    "bring-your-own-model.md": "behind its first section: checkpoints that are not here",
    "calibration-scale.md": "networks that memory does not hold; test_calib_blocks.py exports by segments",
    "choosing-a-recipe.md": "choices, each exported in test_recipes.py",
    "cli.md": "test_progress.py, test_completion.py, test_graph_page.py and test_doctor.py run them",
    "cuda.md": "a GPU",
    "extend/add-a-pass.md": "run by test_docs_extend.py",
    "extend/add-a-target.md": "run by test_docs_extend.py",
    "extend/add-a-method.md": "run by test_docs_extend.py",
    "extend/add-a-family.md": "run by test_docs_extend.py",
    "families.md": "checkpoints that are not here",
    "handoff-openvino.md": "somebody's own model; test_target_openvino.py exports and runs",
    "handoff-qualcomm-ort.md": "minutes of Qualcomm's compiler; test_qnn_compile.py runs it",
    "handoff-qualcomm-sdk.md": "Qualcomm's SDK, which no package index has",
    "handoff-tensorrt.md": "a GPU; test_target_tensorrt.py exports",
    "hoisting.md": "the tutorial's commands",
    "host-loop.md": "Node, and a server that waits; test_host_server.py runs both",
    "in-pipelines.md": "checkpoints that are not here; test_pipelines.py runs tiny ones",
    "lint.md": "test_lint.py and test_lint_qnn.py run it on every rule",
    "report.md": "opens a browser; the tutorial runs it without",
    "resume.md": "kills and clusters; test_resume.py, test_interrupted.py and test_engine_ray.py",
    "size.md": "networks that memory does not hold; test_mapped_export.py exports mapped ones",
    "troubleshooting.md": "what goes wrong",
    "verify-device.md": "minutes of the emulator; test_verify_device.py runs it",
}
# Programs beside ours in shell blocks of the docs, and why none is run.
PROGRAMS = {
    "pip": "an installation",
    "make": "an installation",
    ".": "an installation",
    "npm": "an installation",
    "python": "benchmarks and tests, checked to exist",
    "node": "test_host_loop.py runs it",
    "curl": "asks the server of serve-demo",
    **dict.fromkeys(("sh", "cd", "trtexec", "polygraphy"), "TensorRT"),
    **dict.fromkeys(("export", "source", "for", "done", "DIR=/data/local/tmp/vdq;", "adb"), "Qualcomm's SDK"),
    **dict.fromkeys(("qairt-converter", "qairt-quantizer", "qnn-context-binary-generator"), "Qualcomm's SDK"),
}
ENDS_WITH_ONE = {"diff", "lint"}  # there is something to say, so these exit with 1
_RECIPE = ("Recipe", "Keep", "Override")  # types in the schema of the manifest that docs/recipes.md describes
_HOST = re.compile(r"host=\$\(")


@pytest.mark.parametrize("page", sorted(RUN))
def test_a_page_works_from_top_to_bottom(
    page: str, shared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    shutil.copy(DOCS / "examples/plain_dit.py", tmp_path)
    text = (DOCS / page).read_text(encoding="utf-8")
    text = text[: text.index(RUN[page])] if RUN[page] else text
    said, ran = "", 0
    for block in blocks(text):
        if block.language == "text":
            if block.follows or said:
                assert differences(block.text, said) == [], f"{page}:{block.line} after\n{said}"
        elif block.language == "python":
            exec(compile(block.text, f"{page}:{block.line}", "exec"), {"__name__": "__main__"})
            said = capsys.readouterr().out
            ran += 1
        elif block.language in SHELLS:
            for words in commands(block):
                assert words[0] == "vdq-export", f"{page}:{block.line}: {words}"
                said = run(words[1:], shared, capsys, monkeypatch)
                ran += 1
    assert ran >= 2


def run(arguments: list[str], shared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What the command prints. The sample is exported once: its bundle is copied wherever a page asks for it."""
    capsys.readouterr()
    if arguments[0] == "sample:digits":
        _copy_shared(arguments, shared)
        return (shared / "said.txt").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["vdq-export", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    assert ended.value.code in ({0, 1} if arguments[0] in ENDS_WITH_ONE else {0, None}), f"{arguments}: {out}{err}"
    return out


def _copy_shared(arguments: list[str], shared: Path) -> None:
    command, values = parsed(arguments)
    assert command == "export" and values["tsw"] == "4" and values["target"] == "ort-int8", arguments
    assert {k for k, v in values.items() if v != parsed(["sample:digits"])[1][k]} <= {"tsw", "out", "dump_after"}
    shutil.copytree(shared / "bundle", values["out"])
    if values["dump_after"]:
        shutil.copytree(shared / "bundle.passes", f"{values['out']}.passes")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tutorial's bundle, and what the command printed."""
    from tests.commands import command

    folder = tmp_path_factory.mktemp("docs")
    arguments = ("sample:digits", "--target", "ort-int8", "--tsw", "4", "--dump-after", "all", "--out", "bundle")
    code, out, err = command(*arguments, cwd=folder)
    assert code == 0, err
    (folder / "said.txt").write_text(out, encoding="utf-8")
    return folder


def parsed(arguments: list[str]) -> tuple[str, dict[str, Any]]:
    """(command, its values by name) as the command's own parser and types read them; files need not exist.

    Raises click.UsageError for an unknown option, a missing value and a value of another type.
    """
    context = click.Context(cli, info_name="vdq-export")
    if arguments[0] not in cli.list_commands(context) and not arguments[0].startswith("-"):
        arguments = ["export", *arguments]
    if arguments[0].startswith("-"):
        arguments = arguments if arguments[0] in ("--help", "--version") else ["export", *arguments]
    if arguments[0].startswith("-"):
        return "", {}
    command = cli.get_command(context, arguments[0])
    assert command is not None
    below = click.Context(command, info_name=arguments[0], parent=context)
    values, left, _ = command.make_parser(below).parse_args(list(arguments[1:]))
    if left:
        raise click.UsageError(f"{arguments}: nothing takes {left}")
    held: dict[str, Any] = {}
    for parameter in command.params:
        value = values.get(str(parameter.name))
        given = value is not None and "UNSET" not in repr(value)
        value = value if given else parameter.get_default(below)
        is_path = isinstance(parameter.type, click.Path)
        held[str(parameter.name)] = value if is_path or not given else parameter.type_cast_value(below, value)
    _check_names(held)
    return arguments[0], held


def _check_names(held: dict[str, Any]) -> None:
    if (chosen := held.get("recipe")) and not str(chosen).endswith(".toml") and str(chosen) not in recipe.names():
        raise click.UsageError(f"no recipe {chosen!r}")
    if (chosen := held.get("target")) and str(chosen) not in {*targets.catalogue(), "tiny-npu"}:
        raise click.UsageError(f"no target {chosen!r}")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_command_is_one_that_the_program_takes(page: Path) -> None:
    wrong = []
    for line, arguments in ours(page):
        try:
            parsed(arguments)
        except click.ClickException as error:
            wrong.append(f"{name(page)}:{line}: {' '.join(arguments)}: {error.format_message()}")
    assert wrong == []


def test_pages_that_are_not_run_say_why() -> None:
    with_blocks = {name(page) for page in PAGES if _shell_commands(page)}
    assert with_blocks - {*RUN} <= {*PARSED}, "add them to RUN, or to PARSED with the reason"
    assert {*PARSED} <= {name(page) for page in PAGES}


def test_other_programs_are_known() -> None:
    for page in PAGES:
        for words in _shell_commands(page):
            if words[0] == "python" and words[1] == "-m" and words[2] not in ("pytest", "build"):
                place = words[2].replace(".", "/")
                assert (ROOT / f"{place}.py").exists() or (ROOT / place / "__main__.py").exists(), words
            assert words[0] in {"vdq-export", *PROGRAMS} or _HOST.match(words[0]), f"{name(page)}: {words}"


def _shell_commands(page: Path) -> list[list[str]]:
    """Of fenced shell blocks, and of indented ones that begin with a command of ours or of pip."""
    found = []
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language in ("sh", "bash") or (not block.language and block.text.startswith(("vdq-export ", "pip "))):
            found += commands(block)
    return found


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    assert broken_links(page) == []


def test_python_on_the_pages_is_python() -> None:
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf-8")):
            if block.language == "python":
                ast.parse(block.text.replace("…", "..."))


def test_measured_tables_are_those_of_the_benchmarks() -> None:
    """`python -m docs.site` writes them anew."""
    for path, made in {**recipes.pages(), **readme.pages()}.items():
        text = path.read_text(encoding="utf-8")
        assert recipes.written(text, made) == text, "python -m docs.site"
        assert sorted(re.findall(r"<!-- (?:measured|made): (\w+) -->", text)) == sorted(made), path
        assert len(re.findall("<!-- (?:measured|made):", text)) == text.count("<!-- end -->")
    assert all(table.count("\n") >= 5 for name, table in recipes.tables().items() if name != "unmeasured")


def test_every_pass_stage_and_page_is_in_the_site() -> None:
    files = {path.stem for path in (ROOT / "passes").glob("[!_]*.py")}
    assert files == set(pages.passes_in_order())
    assert pages.places() == set(pages.generated())
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    missing = [
        name(page) for page in PAGES if not re.search(rf"[ :]{re.escape(name(page))}$", navigation, re.MULTILINE)
    ]
    assert missing == []


def test_every_page_can_be_reached_from_the_first() -> None:
    text = (DOCS / "index.md").read_text(encoding="utf-8")
    assert [name(page) for page in PAGES if name(page) != "index.md" and f"({name(page)})" not in text] == []


def test_every_extra_is_in_the_installation() -> None:
    text = (DOCS / "installation.md").read_text(encoding="utf-8")
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    assert [one for one in extras if f"\n| `{one}` |" not in text] == []


def test_the_layers_that_the_tutorial_says_stayed_in_float(shared: Path) -> None:
    plan = QuantPlan.from_json((shared / "bundle/plan.json").read_bytes())
    floats = [one for one in plan.layers if not one.quantized]
    assert len(floats) == 6 and [one.name for one in floats if not one.hoisted] == ["proj_out"]


def test_messages_that_go_wrong_are_those_of_the_program() -> None:
    text = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    ours = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "vdq_export").rglob("*.py"))
    quoted = [one for row in re.findall(r"^\| (`.+?) \|", text, re.MULTILINE) for one in re.findall(r"`([^`]+)`", row)]
    quoted = [one for one in quoted if not one.startswith(("command not found", "verdict: "))]
    pieces = [piece.strip(" ;?") for one in quoted for piece in re.split("…|'timestep'", one)]
    assert len(quoted) > 8 and [piece for piece in pieces if piece and piece not in ours] == []


def test_every_file_of_a_bundle_is_in_its_specification(shared: Path) -> None:
    text = (DOCS / "bundle-format.md").read_text(encoding="utf-8")
    first = re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE)
    known = [one for cell in first for one in re.findall(r"`([^`]+)`", cell)]
    patterns = [re.escape(one).replace("NN", r"\d\d").replace("ARCH", r"\w+") for one in known]
    root = shared / "bundle"
    files = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    unknown = [file for file in files if not any(re.fullmatch(one, file) for one in patterns)]
    assert len(files) > 10 and unknown == []


def test_keys_in_the_example_schedule_are_those_of_the_schema() -> None:
    text = (DOCS / "bundle-format.md").read_text(encoding="utf-8")
    schema = (ROOT / "vdq_export/schemas/schedule.schema.json").read_text(encoding="utf-8")
    (example,) = (block.text for block in blocks(text) if block.language == "json")
    keys = set(re.findall(r'"(\w+)":', example)) - {"name", "shift", "guidance"}  # the sampler's own settings
    assert len(keys) > 12
    assert [key for key in sorted(keys) if f'"{key}"' not in schema] == []


def test_every_key_of_manifest_and_schedule_is_in_the_specification() -> None:
    text = re.sub(r"```.*?```", "", (DOCS / "bundle-format.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    named = {word for code in re.findall(r"`([^`]+)`", text) for word in re.findall(r"\w+", code)}
    for file, others in (("manifest", _RECIPE), ("schedule", ())):
        held = json.loads((ROOT / f"vdq_export/schemas/{file}.schema.json").read_text(encoding="utf-8"))["$defs"]
        keys = {key for kind, one in held.items() if not kind.endswith(others) for key in one["properties"]}
        assert len(keys) > 15 and sorted(keys - named) == []


def test_links_to_sources_lead_to_their_pages_on_the_site() -> None:
    made = {
        "passes/smoothing.py": "passes/smoothing.md",
        "calib/gptq.py": "stages/gptq.md",
        "vdq_export/schemas": "reference/schemas.md",
        "benchmarks/results/speed.md": "results/speed.md",
    }
    assert {place: home(place) for place in made} == made
    assert set(made.values()) <= pages.places() and home("vdq_export/compiler.py") == ""


# -- the tests themselves ----------------------------------------------------------------------------------------------


def test_unknown_options_recipes_and_targets_are_refused() -> None:
    for wrong in (["sample:digits", "--tws", "4"], ["verify", "b", "--clips", "x"], ["--recipe", "static-asp"],
                  ["m:f", "--target", "qnm"], ["diff", "a", "b", "c"]):  # fmt: skip
        with pytest.raises(click.ClickException):
            parsed(wrong)
    assert parsed(["m:f", "--tsw", "4"])[0] == "export"


def test_outputs_are_compared() -> None:
    said = "one: 2.00 dB\ntwo    x\nthree 4 of 5\n"
    assert differences("one: 2.10 dB\n…\nthree … of 5", said) == []
    assert differences("one: 2.50 dB", said) == ["one: 2.50 dB"]
    assert differences("one: … dB\nthree 4 of 5", said) == ["three 4 of 5"], "a line was left out without saying so"
    assert differences("…\nthree 3 of 5", said) == ["three 3 of 5"]
