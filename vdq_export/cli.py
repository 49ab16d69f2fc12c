"""vdq-export: the command. The export is the bare command; everything else is a subcommand, one file in commands/."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import click
from click.shell_completion import CompletionItem

from vdq_export.errors import UnknownNameError, VdqError


class Listed(NamedTuple):
    """A command: where its code is, under which heading it is listed, and with which words."""

    module: str
    attribute: str
    heading: str
    summary: str


_FIRST, _MAKE, _JUDGE, _RUN, _LOOK = "Start here:", "Make:", "Judge and compare:", "Run:", "What there is:"
# In the order of the help. The summaries stand here because importing every command for them costs seconds.
_COMMANDS = {
    "export": Listed("export", "export_command", _FIRST, "vdq-export sample:digits --target ort-int8 --tsw 4"),
    "verify": Listed("verify", "verify_command", _FIRST, "vdq-export verify bundle   compare with the float model"),
    "report": Listed("report", "report_command", _FIRST, "vdq-export report bundle   one page: may it ship?"),
    "plan": Listed("plan", "plan_command", _MAKE, "show what would be done, layer by layer"),
    "record": Listed("record", "record_command", _MAKE, "keep a pipeline's calls as calibration data"),
    "compile": Listed("compile", "compile_command", _MAKE, "context binaries for Hexagon NPUs"),
    "encodings": Listed("encodings", "encodings_command", _MAKE, "float graph and AIMET encodings for a converter"),
    "bisect": Listed("bisect", "bisect_command", _JUDGE, "what to put back to float for a clip PSNR"),
    "diff": Listed("diff", "diff_command", _JUDGE, "what differs between two graphs or bundles"),
    "inspect": Listed("inspect", "inspect_command", _JUDGE, "what is in a graph or bundle; one block as a picture"),
    "lint": Listed("lint", "lint_command", _JUDGE, "will the consumer of a hand-off take it?"),
    "run": Listed("run", "run_command", _RUN, "clips of the bundle beside the float model's"),
    "serve-demo": Listed("serve_demo", "serve_demo_command", _RUN, "the same in a browser, on this machine"),
    "recipes": Listed("catalogue", "recipes_command", _LOOK, "how to quantize"),
    "targets": Listed("catalogue", "targets_command", _LOOK, "what to compile for"),
    "families": Listed("catalogue", "families_command", _LOOK, "which video transformers of diffusers"),
    "doctor": Listed("doctor", "doctor_command", _LOOK, "what this machine has and can do"),
    "completion": Listed("completion", "completion_command", _LOOK, "shell completion: bash, zsh, fish"),
}


class _ReaderGone(Exception):
    """Who reads our output has enough, as `head` has. click and rich would exit 1, which is an answer here."""


class BareExport(click.Group):
    """A group whose default command is `export`: `vdq-export sample:digits --tsw 4` needs no verb."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            args = ["--help"]
        own = {name for p in self.get_params(ctx) for name in p.opts}
        if args and args[0] not in _COMMANDS and args[0] not in own:
            if not ctx.resilient_parsing:  # while a shell completes, nothing is refused
                _refuse_misspelt_command(args[0])
            args = ["export", *args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (BrokenPipeError, SystemExit) as error:
            if isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError):
                raise _ReaderGone from error
            raise

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        from importlib import import_module  # a command's imports (torch, onnx) are paid when it runs

        listed = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(f"vdq_export.commands.{listed.module}"), listed.attribute)
        return command

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """One screen, from the table above: no command is imported for it."""
        formatter.write(_HELP_HEAD)
        for heading, listed in groupby(_COMMANDS.items(), key=lambda item: item[1].heading):
            formatter.write(f"{heading}\n")
            for name, one in listed:
                formatter.write(f"  {name:<11} {one.summary}\n")
        formatter.write(_HELP_TAIL)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands and, as `export` may be left out, its models and options."""
        from vdq_export.commands import complete
        from vdq_export.commands.export import export_command

        if incomplete.startswith("-"):
            return [*super().shell_complete(ctx, incomplete), *export_command.shell_complete(ctx, incomplete)]
        found = [CompletionItem(k, help=v.summary) for k, v in _COMMANDS.items() if k.startswith(incomplete)]
        models = complete.models(ctx, export_command.params[0], incomplete)
        return [*found, *(one for one in models if one.type == "plain" or not found)]


_HELP_HEAD = """\
Usage: vdq-export MODEL [OPTIONS]     short for: vdq-export export MODEL …
       vdq-export COMMAND --help

Compile a video diffusion transformer into static quantized graphs.
MODEL: sample:NAME, a diffusers folder, an .onnx file, package.module:factory.

"""
_HELP_TAIL = "Options: --version; -h, --help, also after a command.\n"


def _refuse_misspelt_command(word: str) -> None:
    """A word that is no model, no option and nearly a command; as a model it would get a misleading answer."""
    plain = word.replace("-", "_").isidentifier() and not word.startswith("-")
    if plain and not Path(word).exists() and get_close_matches(word, _COMMANDS, cutoff=0.7):
        raise UnknownNameError("command", word, _COMMANDS)


@click.group(cls=BareExport, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vdq-export")
def cli() -> None:
    """Compile a video diffusion transformer into static quantized graphs."""


def main() -> None:
    """Entry point: one line per error on stderr, exit code 2; Ctrl-C 130, SIGTERM 143."""
    if os.environ.get("_VDQ_EXPORT_COMPLETE", "").startswith("bash"):
        from vdq_export.commands import complete

        complete.prepare()
    with _terminated() as terminated:
        code = _run(terminated)
    sys.exit(code)


def _run(terminated: Sequence[int]) -> int:
    """The exit code. terminated: not empty once SIGTERM came."""
    try:
        code = cli.main(prog_name="vdq-export", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        on = getattr(error.__cause__ or error, "__notes__", [])  # what a command adds to it: how to go on
        click.echo("; ".join(["terminated" if terminated else "interrupted", *on]), err=True)
        return 143 if terminated else 130
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = f"; see {context.command_path} --help" if context is not None else ""
        click.echo(f"error: {' '.join(error.format_message().split())}{where}", err=True)
        return 2
    except VdqError as error:
        click.echo(f"error: {error}", err=True)
        return error.exit_code
    except (_ReaderGone, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # who read us has enough; what is buffered goes nowhere
        return 141
    except OSError as error:  # a full disk, a folder that may not be written …
        click.echo(f"error: {error}", err=True)
        return 2
    except Exception as error:
        if {"-v", "-vv", "--verbose"} & set(sys.argv):
            raise
        told = " ".join(str(error).split())[:300]
        click.echo(f"internal error: {type(error).__name__}: {told}; please report it, -v shows where", err=True)
        return 70


@contextmanager
def _terminated() -> Iterator[list[int]]:
    """SIGTERM ends this process as Ctrl-C does, so that nothing half made stays; it is noted in the list."""
    noted: list[int] = []
    main, here = threading.current_thread() is threading.main_thread(), os.getpid()

    def handle(number: int, _: object) -> None:
        if os.getpid() != here:  # forked: what this process holds is ours to clear away
            os._exit(143)
        noted.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, handle) if main else None
    try:
        yield noted
    finally:
        if main:
            signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    main()
