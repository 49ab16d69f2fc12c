"""vdq-export: the command. The export is the bare command; everything else is a subcommand, one file in commands/."""

from __future__ import annotations

import sys
from difflib import get_close_matches
from pathlib import Path

import click

from vdq_export.errors import UnknownNameError, VdqError


class BareExport(click.Group):
    """A group whose default command is `export`: `vdq-export sample:digits --tsw 4` needs no verb."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        args = args or ["--help"]
        own = {name for p in self.get_params(ctx) for name in p.opts}
        if args[0] not in self.list_commands(ctx) and args[0] not in own:
            _refuse_misspelt_command(args[0])
            args = ["export", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        from importlib import import_module  # a command's imports (torch, onnx) are paid when it runs

        module, attribute = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(f"vdq_export.commands.{module}"), attribute)
        return command


_COMMANDS = {
    "export": ("export", "export_command"),
    "record": ("record", "record_command"),
    "verify": ("verify", "verify_command"),
    "compile": ("compile", "compile_command"),
    "run": ("run", "run_command"),
    "plan": ("plan", "plan_command"),
    "diff": ("diff", "diff_command"),
    "inspect": ("inspect", "inspect_command"),
    "lint": ("lint", "lint_command"),
    "encodings": ("encodings", "encodings_command"),
    "serve-demo": ("serve_demo", "serve_demo_command"),
    "recipes": ("catalogue", "recipes_command"),
    "targets": ("catalogue", "targets_command"),
    "families": ("catalogue", "families_command"),
    "doctor": ("doctor", "doctor_command"),
}


def _refuse_misspelt_command(word: str) -> None:
    """A word that is no model, no option and nearly a command; as a model it would get a misleading answer."""
    if word.isidentifier() and not Path(word).exists() and get_close_matches(word, _COMMANDS, cutoff=0.7):
        raise UnknownNameError("command", word, _COMMANDS)


@click.group(cls=BareExport, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="vdq-export")
def cli() -> None:
    """Compile a video diffusion transformer into static quantized graphs.

    \b
      vdq-export --target ort-int8 --tsw 4          compile the embedded sample into ./bundle
      vdq-export verify bundle                      compare it with the float model
      vdq-export package.module:factory --out DIR   compile your own model

    MODEL: sample:NAME, a diffusers folder, an .onnx file, package.module:factory.
    """


def main() -> None:
    """Entry point: one line per error on stderr, exit code 2; Ctrl-C 130."""
    try:
        code = cli.main(prog_name="vdq-export", standalone_mode=False)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; no bundle was written", err=True)
        code = 130
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        where = f"; see {context.command_path} --help" if context is not None else ""
        click.echo(f"error: {error.format_message()}{where}", err=True)
        code = 2
    except VdqError as error:
        click.echo(f"error: {error}", err=True)
        code = error.exit_code
    except OSError as error:  # a full disk, a folder that may not be written …
        click.echo(f"error: {error}", err=True)
        code = 2
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
