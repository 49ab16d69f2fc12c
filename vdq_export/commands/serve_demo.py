"""vdq-export serve-demo BUNDLE: a page on this machine that makes a clip with the bundle in the visitor's browser."""

from __future__ import annotations

import webbrowser
from pathlib import Path

import click

from vdq_export import float_model
from vdq_export.bundle import Bundle
from vdq_export.commands.options import bundle_argument
from vdq_export.host import case
from vdq_export.host.server import DemoServer, find_runtime


@click.command("serve-demo")
@bundle_argument()
@click.option("--model", help="The model with its sampler; by default the one the bundle names.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port on 127.0.0.1; by default a free one.")
@click.option(
    "--runtime",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="onnxruntime-web's dist folder; by default from the nearest node_modules.",
)
@click.option("--no-open", is_flag=True, help="Do not open a browser.")
def serve_demo_command(bundle: Path, model: str | None, port: int, runtime: Path | None, no_open: bool) -> None:
    """Serve a page that generates clips with BUNDLE in the browser, by onnxruntime-web, until Ctrl-C."""
    opened = Bundle.open(bundle)
    case.check(opened)
    folder = runtime or find_runtime(Path.cwd())
    source = float_model.find(opened, model, clips=True)
    assert source.sampler is not None
    with DemoServer(opened, source.sampler, folder, port) as server:
        click.echo(f"{server.address} (Ctrl-C ends it)")
        if not no_open:
            webbrowser.open(server.address)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            click.echo("stopped")
