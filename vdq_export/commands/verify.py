"""vdq-export verify BUNDLE: measure a bundle against its float model, here or on a device; exit 1 when a threshold is
missed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vdq_export.bundle import Bundle
from vdq_export.commands.options import Word, bundle_argument, machine_readable, reporter, together, verbosity
from vdq_export.devices.verify import Choices, bisect_file, verify_device
from vdq_export.report.data import VerifyReport
from vdq_export.report.device import GPU_DEVICES, Bisection, DeviceBin, DeviceReport
from vdq_export.verify import CLIPS, verify

DEVICE_CLIPS = 1

_on_device = together(
    click.option(
        "--device", type=Word("device", ("htp-emulator", *GPU_DEVICES)), help="Run there: each bin, then the clips."
    ),
    click.option("--arch", default="v75", show_default=True, help="Architecture of the HTP."),
    click.option(
        "--dtype",
        type=Word("type of the floats", ("bfloat16", "float16", "float32")),
        default="float16",
        show_default=True,
        help="On cuda: floats between the kernels.",
    ),
    click.option("--steps-per-bin", type=click.IntRange(min=1), help="Calls of each bin there; 2, on cuda 5."),
    click.option("--bisect", is_flag=True, help="Name the first operator that differs there, where a bin fails."),
    click.option("--out", type=click.Path(path_type=Path), help="Save that operator alone here, with its inputs."),
)


@click.command("verify")
@bundle_argument()
@click.option("--model", help="The float model; by default the one the bundle names.")
@click.option(
    "--clips",
    type=click.IntRange(min=0),
    help=f"Whole clips to compare; {CLIPS}; of folders 2; on a device {DEVICE_CLIPS}.",
)
@click.option("--save", is_flag=True, help="Keep the result in the bundle: report/report.json, or report/device.json.")
@_on_device
@machine_readable
@verbosity
@click.pass_context
def verify_command(
    ctx: click.Context,
    bundle: Path,
    model: str | None,
    clips: int | None,
    save: bool,
    device: str | None,
    arch: str,
    dtype: str,
    steps_per_bin: int | None,
    bisect: bool,
    out: Path | None,
    as_json: bool,
    verbose: int,
    quiet: bool,
) -> None:
    """Compare BUNDLE with its float model, per layer, per bin and on whole clips.

    With --device the graphs run there, and what counts is what the device adds to the error. With --bisect BUNDLE may
    also be a quantized .onnx file: it is searched with random inputs.
    """
    if device != "htp-emulator" and (bisect or out is not None):
        raise click.UsageError("--bisect and --out need --device htp-emulator")
    if bundle.suffix == ".onnx" and bundle.is_file():
        if not bisect:
            raise click.UsageError("a graph alone can only be searched: --device htp-emulator --bisect")
        found = bisect_file(bundle, arch, out, reporter(verbose, quiet))
        click.echo(found.to_json(), nl=False) if as_json else click.echo("\n".join(_bisection_text(found)))
        ctx.exit(1 if found.suspect is not None else 0)
    opened = Bundle.open(bundle)
    if device is None:
        report = verify(opened, model, clips=clips, reporter=reporter(verbose, quiet))
    elif device in GPU_DEVICES:
        from vdq_export.devices.verify_gpu import verify_gpu  # what lowers programs, which nobody else needs

        on: Any = device
        count = DEVICE_CLIPS if clips is None else clips
        told = reporter(verbose, quiet)
        report = verify_gpu(opened, model, device=on, dtype=dtype, steps=steps_per_bin or 5, clips=count, reporter=told)
    else:
        count = DEVICE_CLIPS if clips is None else clips
        choices = Choices(arch=arch, steps=steps_per_bin or 2, clips=count, bisect=bisect, out=out)
        report = verify_device(opened, model, choices, reporter(verbose, quiet))
    if save:
        opened.attach(f"report/{'report' if device is None else 'device'}.json", report.to_json())
    click.echo(report.to_json(), nl=False) if as_json else click.echo(_text(report))
    if report.verdict == "fail":
        ctx.exit(1)


def _text(report: VerifyReport) -> str:
    lines = [f"verdict: {report.verdict}"]
    if report.psnr_db is not None:
        lines.append(f"clips against float: PSNR {report.psnr_db:.2f} dB")
    if report.judge is not None:
        scores = (f"{k} {v:.0%} → {report.judge.quantized[k]:.0%}" for k, v in report.judge.float_.items())
        lines.append(f"judge, float → bundle: {', '.join(scores)}")
    lines += _device_text(report.device) if report.device is not None else _layers_text(report)
    lines.append(f"bundle: {report.bundle_bytes / 1e6:.2f} MB")
    lines += [f"failed: {line}" for line in report.failures]
    return "\n".join(lines)


def _layers_text(report: VerifyReport) -> list[str]:
    kernels = report.integer_kernels
    lines = [f"integer kernels: {kernels.executed} of {kernels.planned} planned", "weakest layers (SQNR):"]
    for quality in sorted(report.layers, key=lambda q: q.sqnr_db)[:5]:
        lines.append(
            f"  {quality.sqnr_db:6.1f} dB  {quality.layer} in bin{quality.bin:02d}, worst at t={quality.worst_step:g}"
        )
    return lines


def _device_text(device: DeviceReport) -> list[str]:
    lines = [
        f"{device.device} {device.arch} ({device.tool}), SQNR against float in dB:",
        "          exact  device   lost  device-exact  compile  a run  not on device  quantizers",
    ]
    lines += [_bin_text(one) for one in device.bins]
    if device.clip_seconds is not None:
        lines.append(f"clips on the device: {device.clips}, {device.clip_seconds:.0f} s each")
    if device.bisection is not None:
        lines += _bisection_text(device.bisection)
    return lines


def _bin_text(one: DeviceBin) -> str:
    if one.exact_db is None or one.scales is None:
        return f"  bin{one.bin:02d}   {one.error}"
    equal = one.scales.found - len(one.scales.mismatches)
    return (
        f"  bin{one.bin:02d}  {one.exact_db:6.2f}  {one.device_db:6.2f}  {one.drop_db:5.2f}  {one.agreement_db:12.2f}"
        f"  {one.compile_seconds:5.1f} s  {one.run_seconds:3.1f} s  {len(one.off_device):13d}"
        f"  {equal} equal of {one.scales.quantizers}, {one.scales.found} found"
    )


def _bisection_text(found: Bisection) -> list[str]:
    suspect = found.suspect
    head = f"searched {found.graph}: {found.operators} operators, {found.runs} runs, {found.seconds:.0f} s"
    if suspect is None:
        return [head, "no operator disagrees with the exact evaluator"]
    lines = [head, f"first operator that disagrees: {suspect.op} {suspect.node} ({suspect.what})"]
    if suspect.sqnr_db is not None:
        steps = "" if suspect.error_steps is None else f", {suspect.error_steps:.1f} quantization steps"
        lines.append(f"  {suspect.sqnr_db:.1f} dB against the exact result on exact inputs{steps}")
    if suspect.together_with:
        lines.append(f"  only together with {', '.join(suspect.together_with[-4:])}")
    for way, ones in (("in", suspect.inputs), ("out", suspect.outputs)):
        for one in ones:
            scale = f"{one.channels} scales" if one.channels else f"scale {one.scale:g}, zero point {one.zero_point}"
            lines.append(
                f"  {way:3s} {one.value}: {one.dtype}{'' if not one.channels and one.scale is None else f', {scale}'}"
            )
    if suspect.message:
        lines.append(f"  {suspect.message}")
    if suspect.reproduction:
        lines.append(f"  saved: {suspect.reproduction}")
    return lines
