"""vdq-export run BUNDLE: generate clips with a bundle, beside the float model's when asked."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec

from vdq_export import float_model
from vdq_export.bundle import Bundle
from vdq_export.commands import complete
from vdq_export.commands.options import bundle_argument, machine_readable, reporter, verbosity
from vdq_export.commands.outputs import Output
from vdq_export.drawing.clips import side_by_side
from vdq_export.runtime.providers import RECIPES, choose
from vdq_export.verify import make_clips


@click.command("run")
@bundle_argument()
@click.option("--model", help="The float model with its sampler; by default the one the bundle names.")
@click.option("--clips", type=click.IntRange(min=1), default=4, show_default=True, help="How many clips to generate.")
@click.option("--out", type=Output(), default=Path("clips"), show_default=True, help="Folder for GIF and PNG.")
@click.option("--policy", help="Schedule policy otherwise than the bundle says, for example delta=0.3 or static:low.")
@click.option(
    "--providers",
    shell_complete=complete.of(lambda: RECIPES),
    help="What to run on: ort-qnn-ep, ort-openvino-ep, or an onnxruntime provider by name.",
)
@machine_readable
@verbosity
def run_command(
    bundle: Path,
    model: str | None,
    clips: int,
    out: Path,
    policy: str | None,
    providers: str | None,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Generate the same clips with the float model and with BUNDLE; write them side by side."""
    opened = Bundle.open(bundle)
    if policy is not None:
        opened.schedule.with_policy(policy)  # a bad one is refused before the model is loaded
    choose(providers, opened)  # and so is a provider that is not installed
    source = float_model.find(opened, model, clips=True)
    assert source.sampler is not None
    made = make_clips(opened, source, clips, reporter(verbose, quiet), policy=policy, providers=providers)
    labels = [source.sampler.describe(case) for case in range(clips)]
    paths = side_by_side(made.reference, made.quantized, labels, out)
    mean = made.mean_psnr_db()
    if as_json:
        click.echo(msgspec.json.encode({"files": [str(p) for p in paths], "psnr_db": mean}).decode())
    else:
        click.echo(f"{clips} clips, mean PSNR {mean:.2f} dB against float: {', '.join(str(p) for p in paths)}")
