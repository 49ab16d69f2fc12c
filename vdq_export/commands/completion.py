"""vdq-export completion SHELL: the script that lets a shell complete commands, options and their values."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import get_completion_class

from vdq_export.commands import complete
from vdq_export.commands.options import Word


@click.command("completion")
@click.argument("shell", type=Word("shell", ("bash", "zsh", "fish")))
@click.pass_context
def completion_command(context: click.Context, shell: str) -> None:
    """Print the script for SHELL: bash, zsh or fish.

    \b
      bash  eval "$(vdq-export completion bash)"             in ~/.bashrc
      zsh   eval "$(vdq-export completion zsh)"              in ~/.zshrc, after compinit
      fish  vdq-export completion fish | source              in ~/.config/fish/config.fish
    """
    kind: Any = get_completion_class(shell)
    click.echo(kind(context.find_root().command, {}, complete.PROGRAM, complete.VARIABLE).source())
