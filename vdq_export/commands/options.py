"""Options that several commands share."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import Any, get_args

import click
from safetensors import SafetensorError, safe_open

from vdq_export import progress
from vdq_export.commands import complete
from vdq_export.commands.outputs import Output
from vdq_export.errors import CalibrationError, ModelError, UnknownNameError
from vdq_export.manifest import MANIFEST
from vdq_export.progress import Reporter

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]


def together(*decorators: Decorator) -> Decorator:
    """Several decorators as one, the first one outermost."""

    def apply(function: Callable[..., Any]) -> Callable[..., Any]:
        for decorator in reversed(decorators):
            function = decorator(function)
        return function

    return apply


def _folding(names: Sequence[str]) -> Decorator:
    """The options of the model's source become part of the MODEL argument, by which it is found again."""

    def folded(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def called(model: str, **choices: Any) -> Any:
            from vdq_export import sources  # with torch: --help and completion do without

            chosen = {name: choices.pop(name) for name in names}
            return function(model=sources.with_options(model, **chosen), **choices)

        return called

    return folded


def _allow(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from vdq_export import sources

        sources.allow_remote_code()


class Finite(click.FloatRange):
    """A number in the range, neither nan nor inf."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        number = super().convert(value, param, ctx)
        return number if math.isfinite(number) else self.fail(f"{value} is no number to work with", param, ctx)


remote_code = click.option(
    "--allow-remote-code",
    is_flag=True,
    expose_value=False,
    callback=_allow,
    help="Run Python code that comes with the model's folder; read it first.",
)
_LOOP = {
    "frames": click.option("--frames", type=click.IntRange(min=1), help="Frames of the video (diffusers folders)."),
    "height": click.option("--height", type=click.IntRange(min=1), help="Its height in pixels."),
    "width": click.option("--width", type=click.IntRange(min=1), help="Its width in pixels."),
    "steps": click.option("--steps", type=click.IntRange(min=1), help="Denoising steps; by default the family's."),
    "guidance": click.option("--guidance", type=Finite(min=0), help="Guidance scale; 1 or less: no second branch."),
    "guidance_2": click.option(
        "--guidance-2", type=Finite(min=0), help="That of the second expert; by default the same."
    ),
    "shift": click.option("--shift", type=Finite(min=0, min_open=True), help="Shift of a flow-matching schedule."),
    "seed": click.option("--seed", type=click.IntRange(min=0), help="Of the first prompt's noise; the others follow."),
    "prompt_embeds": click.option(
        "--prompt-embeds", type=click.Path(exists=True, dir_okay=False), help="Text embeddings, a safetensors file."
    ),
    "negative_prompt": click.option("--negative-prompt", help="Of the branch without the prompt; by default empty."),
}
_DATA = {
    "prompts": click.option(
        "--prompts",
        type=click.Path(exists=True, dir_okay=False),
        help="Prompts, one a line, for the pipeline's own text encoders; by default a few that are built in.",
    ),
    "trajectories": click.option(
        "--trajectories", type=click.Path(exists=True), help="Recorded trajectories, a file or folder."
    ),
    "timestep_input": click.option("--timestep-input", help="Input of an .onnx file that carries the timestep."),
}
# What record takes of the same; its prompts are an argument of its own.
loop = together(*_LOOP.values(), remote_code)
shaping = together(*_LOOP.values(), *_DATA.values(), remote_code, _folding((*_LOOP, *_DATA)))


class Word(click.Choice[str]):
    """One of a few words; another one is answered with the nearest of them."""

    def __init__(self, kind: str, words: Sequence[str]) -> None:
        super().__init__(words)
        self._kind = kind

    def get_missing_message(self, param: click.Parameter, ctx: click.Context | None) -> str:
        return f"one of {', '.join(self.choices)}"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value not in self.choices:
            raise UnknownNameError(self._kind, str(value), self.choices)
        return value


class NumberOr(click.ParamType[Any]):
    """A number from 1, or a word."""

    def __init__(self, word: str) -> None:
        self.name, self._word = f"number|{word}", word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == self._word or isinstance(value, int):
            return value
        if value.isdecimal() and int(value):
            return int(value)
        return self.fail(f"{value!r} is neither a number from 1 nor {self._word}", param, ctx)


def _default_model() -> str:
    from vdq_export import sources

    return sources.DEFAULT


def bundle_argument(name: str = "bundle") -> Decorator:
    """A BUNDLE argument that shells complete."""
    return click.argument(name, type=click.Path(path_type=Path), shell_complete=complete.bundle_folders)


def _model(ctx: click.Context, param: click.Parameter, value: str) -> str:
    """What can be told of a MODEL without importing what loads it: misspelt samples, and bundles."""
    plain = value.partition("?")[0]
    kind, colon, name = plain.partition(":")
    samples = [one.removeprefix("sample:") for one in complete.sample_names()]
    if kind == "sample" and name not in samples:
        raise UnknownNameError("sample", name, samples)
    if colon and name in samples and kind != "sample" and get_close_matches(kind, ["sample"]):
        raise ModelError(f"cannot find a model at {value!r}", hint=f"did you mean sample:{name}?")
    if (Path(plain) / MANIFEST).is_file() and ctx.info_name != "plan":
        ways = ", ".join(f"vdq-export {way} {plain}" for way in ("verify", "report", "run", "inspect"))
        raise ModelError(f"{plain} is a bundle, which is made already", hint=ways)
    return value


def _one_of(kind: str, names: Callable[[], Sequence[str]]) -> Callable[..., Any]:
    """A callback that refuses, with the nearest, what is none of `names()`, before what loads it is imported."""

    def known(ctx: click.Context, param: click.Parameter, value: str) -> str:
        if value not in names():
            raise UnknownNameError(kind, value, names())
        return value

    return known


def _record(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    """A record that is damaged is refused before hours of work; with experts it has other names."""
    if value is not None and value.is_file():
        try:
            with safe_open(value, framework="numpy"):
                pass
        except (SafetensorError, OSError) as error:
            raise CalibrationError(f"{value} is no calibration record: {error}", hint="make it again") from error
    return value


def _bits(ctx: click.Context, param: click.Parameter, value: str | None) -> int | str | None:
    return int(value) if value is not None and value.isdecimal() else value


planning = together(
    click.argument("model", default=_default_model, shell_complete=complete.models, callback=_model),
    click.option(
        "--target",
        default="ort-int8",
        show_default=True,
        shell_complete=complete.target,
        callback=_one_of("target", complete.target_names),
        help="Deployment target; see `vdq-export targets`.",
    ),
    click.option(
        "--isa", shell_complete=complete.isas, help="Instruction set to compile for; by default this machine's."
    ),
    click.option("--tsw", help="Timestep bins (of each expert): a number, `auto` or `all`; by default the recipe's."),
    click.option(
        "--bins",
        type=Word("kind of bins", ("even", "optimal")),
        default="even",
        show_default=True,
        help="Edges of the bins.",
    ),
    click.option(
        "--recipe",
        default="static-asq",
        show_default=True,
        shell_complete=complete.recipes,
        help="Recipe name or TOML file; see `vdq-export recipes`.",
    ),
    click.option(
        "--activations",
        type=Word("number of bits", ("4", "6", "8", "16", "mixed")),
        callback=_bits,
        help="Bits of activations, or `mixed`: 8 in linears, 16 between them (qnn); default: the target's or recipe's.",
    ),
    click.option("--hoist/--no-hoist", default=True, help="Let what no step changes leave the graphs (the default)."),
    click.option("--budget", metavar="TEXT", help="Search bits per layer: size=4.2bit, bops=32 or quality=35dB."),
    click.option("--save-recipe", type=Output(".toml"), help="Write the recipe that the search found here."),
    click.option("--workers", type=click.IntRange(1, 1024), help="Processes of the engine; by default one a core."),
    click.option(
        "--by-blocks/--at-once",
        default=None,
        help="Calibrate one segment of the network at a time, or all of it (default: as memory allows).",
    ),
    click.option("--calibration", type=click.Path(path_type=Path), callback=_record, help="Reuse this record."),
    click.option("--save-calibration", type=Output(".safetensors"), help="Keep the calibration record here."),
    click.option(
        "--engine",
        default="local",
        show_default=True,
        shell_complete=complete.of(lambda: ("local", "ray")),
        help="Where units run: local, ray or ray://HOST:PORT.",
    ),
    click.option("--work", type=Output(), help="Keep finished work here."),
    shaping,
)
machine_readable = click.option("--json", "as_json", is_flag=True, help="Print JSON on stdout.")


def _keep_style(ctx: click.Context, param: click.Parameter, value: progress.Style) -> None:
    ctx.meta[_STYLE] = value


_STYLE = "vdq_export.progress"  # of the context: commands need not carry it from their options to their reporter
verbosity = together(
    click.option("-v", "--verbose", count=True, help="Say what each pass did and skipped."),
    click.option("-q", "--quiet", is_flag=True, help="No progress."),
    click.option(
        "--progress",
        type=Word("style of progress", get_args(progress.Style)),
        default="bar",
        show_default=True,
        expose_value=False,
        callback=_keep_style,
        help="On stderr: bars (never into a pipe), json (one object a line) or none.",
    ),
)


def reporter(verbose: int, quiet: bool) -> Reporter:
    """What the running command tells how far it is with: as --progress says."""
    context = click.get_current_context(silent=True)
    style: progress.Style = "bar" if context is None else context.meta.get(_STYLE, "bar")
    return progress.reporter("none" if quiet else style, -1 if quiet else verbose)
