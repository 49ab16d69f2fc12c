"""Recording the trajectories of a diffusers folder: the machine that compiles then needs neither encoder nor time.

A folder of recordings holds record.json (what was asked for), text/embeddings.safetensors (all prompts, encoded once)
and one NNNN.safetensors a prompt. Each file is written whole or not at all: what is there after an interruption is
kept, and the same command goes on behind it.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError

from vdq_export import recorded, sources
from vdq_export.errors import ModelError
from vdq_export.progress import Advance, Reporter, piece
from vdq_export.recorded import Settings
from vdq_export.sources import _embeddings, _pipeline, _text
from vdq_export.sources._denoise import Generated

EMBEDDINGS = Path("text") / "embeddings.safetensors"


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What a recording took. prompts: all; made: by this run, the others were there. Seconds and bytes of this run;
    text_s: encoding, without what it takes to read the rest of the model."""

    out: str
    prompts: int
    made: int
    calls: int
    text_s: float
    denoising_s: float
    bytes: int


def record(
    spec: str,
    out: Path,
    *,
    prompts: Path | None = None,
    reporter: Reporter | None = None,
    **options: Any,
) -> Cost:
    """Record the folder `spec`, a trajectory a prompt, into the folder `out`; options: of its source, by name.

    Raises ModelError where it cannot be read or denoised, and for an `out` with recordings of something else.
    """
    reporter = reporter or Reporter()
    folder, embeds = Path(spec), options.pop("prompt_embeds", None)
    negative = options.pop("negative_prompt", None) or ""
    if not folder.is_dir():
        raise ModelError(f"{spec} is no folder", hint="record takes the folder of a diffusers pipeline or transformer")
    if (prompts is None) == (embeds is None):
        raise ModelError("what shall be recorded?", hint="give --prompts FILE or --prompt-embeds FILE, one of them")
    words = () if prompts is None else tuple(_text.read_prompts(prompts))
    given = "" if embeds is None else hashlib.sha256(Path(embeds).read_bytes()).hexdigest()
    asked = Settings(model=sources.with_options(spec, **options), prompts=words, negative=negative, embeddings=given)
    _check_same(out, asked)
    started = time.monotonic()
    text_s = 0.0
    if embeds is None:
        embeds = out / EMBEDDINGS
        if not (out / recorded.SETTINGS).is_file():  # cut short before it was written of what they are
            embeds.unlink(missing_ok=True)
        if not embeds.is_file():
            with reporter.stage("encode text"):
                encoded = _pipeline.read(folder).encode(words, negative)
                _write_whole(embeds, lambda path: _embeddings.save(encoded, path))
            text_s = time.monotonic() - started
    model = sources.resolve(sources.with_options(spec, **options, prompt_embeds=embeds))
    for text in model.metadata["notes"]:
        reporter.warn(text)
    size = {name: model.metadata["config"][name] for name in ("frames", "height", "width")}
    settings = msgspec.structs.replace(asked, **size)
    _write_whole(
        out / recorded.SETTINGS, lambda path: path.write_bytes(msgspec.json.format(msgspec.json.encode(settings)))
    )
    began = time.monotonic()
    made, calls, written = _denoise(model.trajectories, out, reporter)
    return Cost(
        out=str(out),
        prompts=len(model.trajectories),  # type: ignore[arg-type]  # Generated has a length
        made=made,
        calls=calls,
        text_s=round(text_s, 3),
        denoising_s=round(time.monotonic() - began, 3),
        bytes=written,
    )


def _denoise(trajectories: Any, out: Path, reporter: Reporter) -> tuple[int, int, int]:
    """Write the trajectories that are not there yet: (how many, calls of the network, bytes)."""
    assert isinstance(trajectories, Generated)
    made, calls, written = 0, 0, 0
    loop = trajectories.loop
    each = len(loop.scheduler.timesteps) * len(loop.guidance.branches)
    with reporter.stage("denoise") as advance:
        for number in range(len(trajectories)):
            file = out / f"{number:04d}.safetensors"
            if not file.is_file():
                tell = partial(_tell, piece(advance, number, len(trajectories)), each)
                trajectory = loop.trajectory(trajectories.network, number, tell)
                _write_whole(file, lambda path, steps=trajectory: recorded.save(steps, path))  # type: ignore[misc]
                made, calls, written = made + 1, calls + len(trajectory), written + file.stat().st_size
            advance((number + 1) * each, len(trajectories) * each)
    return made, calls, written


def _tell(advance: Advance, total: int, done: int) -> None:
    advance(done, total)


def _check_same(out: Path, asked: Settings) -> None:
    """Raises ModelError for a folder with other recordings, or with something else in it."""
    if not out.exists():
        return
    held = Settings.read(out) if out.is_dir() else None
    begun = {EMBEDDINGS.parts[0], f"{recorded.SETTINGS}.part"}
    unfinished = out.is_dir() and {one.name for one in out.iterdir()} <= begun
    if held is None and not unfinished:
        raise ModelError(f"{out} is there and holds no recordings", hint="choose another --out")
    if held is not None and msgspec.structs.replace(held, frames=0, height=0, width=0) != asked:
        raise ModelError(
            f"{out} holds recordings of other settings ({recorded.SETTINGS} says which)", hint="choose another --out"
        )


def _write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """write(a file beside `path`), which then becomes `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    try:
        write(part)
        part.replace(path)
    except SafetensorError as error:
        raise ModelError(f"cannot write {path}: {error}", hint="a full disk?") from error
    finally:
        part.unlink(missing_ok=True)
