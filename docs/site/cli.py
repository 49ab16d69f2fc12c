"""The page of all commands, from click's own description of them."""

from __future__ import annotations

import inspect

import click

from vdq_export.cli import cli


def page() -> str:
    """Markdown: a section a command with its usage, its help, arguments and options."""
    context = click.Context(cli, info_name="vdq-export")
    parts = [
        "# Commands",
        f"```text\n{cli.get_help(context)}\n```",
        "Exit codes, and what is printed where: [the command](../cli.md).",
    ]
    for name in cli.list_commands(context):
        command = cli.get_command(context, name)
        assert command is not None
        parts.append(_section(command, click.Context(command, info_name=name, parent=context)))
    return "\n\n".join(parts) + "\n"


def _section(command: click.Command, context: click.Context) -> str:
    usage = " ".join(command.collect_usage_pieces(context))
    rows = [_row(one, context) for one in command.get_params(context) if isinstance(one, click.Option)]
    parts = [f"## {context.info_name}", f"```text\n{context.command_path} {usage}\n```", _help(command)]
    if rows:
        parts.append("| option | means | default |\n|---|---|---|\n" + "\n".join(rows))
    return "\n\n".join(parts)


def _row(option: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in (*option.opts, *option.secondary_opts))
    metavar = option.make_metavar(context).replace("|", "&#124;").replace("<", "&lt;")  # no `code` in a table holds a |
    takes = "" if option.is_flag or option.count else f" <code>{metavar}</code>"
    default = option.default if not option.is_flag and not callable(option.default) else None
    shown = "" if default is None or "UNSET" in repr(default) or default == () else f"`{default}`"
    return "| " + " | ".join(_cell(one) for one in (names + takes, option.help or "", shown)) + " |"


def _cell(text: str) -> str:
    return text.replace("|", r"\|").replace("\n", " ")


def _help(command: click.Command) -> str:
    return inspect.cleandoc(command.help or "").replace("\b\n", "")
