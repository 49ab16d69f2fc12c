"""What shells offer, as they ask for it, and the nearest name for every one that is misspelt."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from tests import tiny_bundle
from tests.commands import ENVIRONMENT, assert_one_line, command
from vdq_export import cli, sources, targets
from vdq_export.commands import complete
from vdq_export.sources import sample

Offered = Callable[[str], list[str]]
SCRIPT = "import sys; from vdq_export.cli import main; sys.argv[0] = 'vdq-export'; main()"


def asking(line: str) -> dict[str, str]:
    """What bash puts into the environment for the words of `line`; the last one is not finished."""
    words = line.split(" ")
    asked = {"COMP_WORDS": "\n".join(words), "COMP_CWORD": str(len(words) - 1)}
    return {**asked, complete.VARIABLE: "bash_complete"}


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], folder: Path) -> Offered:
    """What bash gets, asked in this process."""

    def ask(line: str) -> list[str]:
        monkeypatch.chdir(folder)
        for name, value in asking(line).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "argv", ["vdq-export"])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        out, err = capsys.readouterr()
        assert (stopped.value.code, err) == (0, "")
        return [one.partition(",")[2] for one in out.splitlines()]

    return ask


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("complete")
    tiny_bundle.write(made / "bundle")
    tiny_bundle.write(made / "inner" / "other")
    (made / "bundles").mkdir()
    return made


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("vdq-export ver", ["verify"]),
        ("vdq-export --tar", ["--target"]),
        ("vdq-export --target te", ["tensorrt"]),
        ("vdq-export --target = te", ["tensorrt"]),
        ("vdq-export sample : digits-", ["digits-hard", "digits-moe"]),
        ("vdq-export plan sample : digits --recipe static-f", ["static-fp8"]),
        ("vdq-export --dump-after qdq", ["qdq", "qdq_values"]),
        ("vdq-export targets op", ["openvino"]),
        ("vdq-export --target qnn --isa v7", ["v73", "v75", "v79"]),
        ("vdq-export inspect b", ["bundle"]),
        ("vdq-export diff inner/", ["inner/other"]),
        ("vdq-export completion f", ["fish"]),
    ],
)
def test_commands_options_and_values(line: str, expected: list[str], offered: Offered) -> None:
    assert offered(line) == expected


def test_every_command_and_sample_is_offered(offered: Offered) -> None:
    assert set(offered("vdq-export ")) == {*cli._COMMANDS, *complete.sample_names()}


def test_real_processes_answer(folder: Path) -> None:
    fish = {"COMP_WORDS": "vdq-export --target te", "COMP_CWORD": "te", complete.VARIABLE: "fish_complete"}
    for asked, answer in ((asking("vdq-export --target te"), "plain,tensorrt"), (fish, "plain,tensorrt")):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            cwd=folder,
            env=ENVIRONMENT | asked,
            capture_output=True,
            text=True,
            check=True,
        )
        assert (done.stdout.strip(), done.stderr) == (answer, "")


def test_names_that_are_looked_up_without_imports_are_the_real_ones() -> None:
    assert complete.target_names() == sorted(targets.catalogue())
    assert complete.sample_names() == [f"sample:{name}" for name in sample.catalogue()]
    assert sources.DEFAULT in complete.sample_names()
    assert {"qdq", "ort_attention"} < set(complete.pass_names())


def test_asking_costs_no_torch() -> None:
    code = "import sys, vdq_export.cli, vdq_export.commands.export; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, check=False).returncode == 0


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts(shell: str, tmp_path: Path) -> None:
    code, out, err = command("completion", shell, cwd=tmp_path)
    assert (code, err) == (0, "")
    assert f"{complete.VARIABLE}={shell}_complete" in out and "_vdq_export_completion" in out
    if shell == "bash":
        assert subprocess.run(["bash", "-n"], input=out, text=True, check=False).returncode == 0


MISSPELT = {
    "option": (["verify", "bundle", "--cips", "2"], "--clips"),
    "option of the export": (["--recpe", "rtn"], "--recipe"),
    "command": (["verfy", "bundle"], "verify"),
    "command of two words": (["serve-dmo", "bundle"], "serve-demo"),
    "target": (["targets", "tensorr"], "tensorrt"),
    "recipe": (["--recipe", "static-asg", "--out", "new"], "static-asq"),
    "sample": (["sample:digit", "--out", "new"], "digits"),
    "pass": (["--dump-after", "ort_atention"], "ort_attention"),
    "device": (["verify", "bundle", "--device", "cud"], "cuda"),
    "type of floats": (["verify", "bundle", "--dtype", "float61"], "float16"),
    "provider": (["run", "bundle", "--providers", "ort-qnn-pe"], "ort-qnn-ep"),
    "architecture": (["compile", "bundle", "--arch", "v57"], "v75"),
    "kind of bins": (["--bins", "optmal"], "optimal"),
    "lint profile": (["lint", "bundle", "--for", "qnn-v57"], "qnn-v75"),
    "shell": (["completion", "bsh"], "bash"),
}


@pytest.mark.parametrize("case", MISSPELT)
def test_did_you_mean(
    case: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments, meant = MISSPELT[case]
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["vdq-export", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out, err = capsys.readouterr()
    assert_one_line((int(str(stopped.value.code)), out, err), meant)
    assert "did you mean" in err.lower()


def test_a_sample_that_names_itself_otherwise_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    other = ModuleType("other")
    other.NAMES = ("digits",)  # type: ignore[attr-defined]
    monkeypatch.setattr(sample, "catalogue", lambda: {"digits": other})
    assert complete.sample_names() != [f"sample:{name}" for name in sample.catalogue()]
