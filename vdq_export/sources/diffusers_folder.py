"""A folder that diffusers' save_pretrained() wrote: a whole pipeline, or its transformer alone.

Families with a file in families/ are called as their pipelines call them; any other *Transformer3DModel whose
arguments are known (_shapes). Nothing in the folder is run: configurations are read, weights are mapped safetensors,
text is encoded and clips are decoded by classes of diffusers and transformers.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch

from vdq_export import fixed_arguments, recorded
from vdq_export.bundle import is_bundle
from vdq_export.errors import MissingToolError, ModelError
from vdq_export.experts import Expert, Experts
from vdq_export.model import Model
from vdq_export.recorded import Recorded
from vdq_export.sources import _denoise, _embeddings, _options, _pipeline, _sampler, _scheduling, _shapes, _text
from vdq_export.sources._options import Options
from vdq_export.sources._pipeline import Pipeline
from vdq_export.sources._sampler import FolderSampler
from vdq_export.sources._text import Prompt
from vdq_export.sources._weights import Network

ACCEPTS = "a folder of a diffusers pipeline or transformer"
TAKES_OPTIONS = True


def accepts(spec: str) -> bool:
    return Path(spec).is_dir()


def load(spec: str, options: Options) -> Model:
    """The model with static shapes as `options` and the folder say. Raises ModelError for what does not fit."""
    _refuse(options)
    if is_bundle(Path(spec)):
        hint = f"vdq-export verify {spec}; report, run and inspect take it, too"
        raise ModelError(f"{spec} is a bundle, not a model", hint=hint)
    pipeline = _pipeline.read(Path(spec))
    held = None if options.trajectories is None else Recorded(Path(options.trajectories))
    if held is not None:
        options = _sized(options, held)
    found = _Prompts([]) if held is not None else _prompts(pipeline, options)
    networks, first = pipeline.networks, pipeline.networks[0]
    call = _shapes.call(first, spec, pipeline.vae, options, _tokens(held, found.prompts), pipeline.index)
    for one in networks:
        one.fix(call.fixed)
    notes = [*(note for one in networks for note in one.notes), *found.notes]
    facts = _facts(first, call)
    if held is not None:
        return _from_recorded(pipeline, call, held, {"config": facts, "notes": notes})
    if moving := sorted(name for name, one in call.inputs.items() if one.changes):
        raise ModelError(
            f"{spec}: {first.class_name} takes {moving[0]!r}, which changes along the steps as only its pipeline knows",
            hint="record its calls there (docs/bring-your-own-model.md) and give --trajectories",
        )
    guidance, call = _guidance(pipeline, call, options)
    prompts = found.prompts or _embeddings.random(call)
    if call.beside is not None and not any(_embeddings.IMAGE in one["cond"] for one in prompts):
        notes.append(f"no {_embeddings.IMAGE} in --prompt-embeds: a RANDOM image; {_embeddings.RANDOM_NOTE}")
    prompts = _embeddings.check(prompts, call, len(guidance.branches) > 1, found.origin, _arguments(first))
    call = _embeddings.with_masks(call, prompts)
    scheduler = _scheduler(pipeline, call, options)
    if pipeline.index is None:
        notes.append(f"{spec} has no scheduler: {scheduler.name} as in the family's published pipeline")
    module = _module(pipeline)
    loop = _denoise.Loop(call, scheduler, prompts, guidance, options.seed or 0)
    zeros = {name: torch.zeros(shape) for name, shape in call.latents.items()}
    example = _embeddings.inputs(call, zeros, scheduler.timesteps[0], prompts[0]["cond"])
    facts |= {"scheduler": scheduler.name, "steps": scheduler.steps, "guidance": guidance.scale, "shift": options.shift}
    generated = _denoise.Generated(module, loop)
    made = _model(pipeline, module, example, generated, call, {"config": facts, "notes": notes})
    made.sampler = FolderSampler(loop, found.words or [""] * len(prompts), pipeline.vae and pipeline.vae.parent)
    return made


def _model(
    pipeline: Pipeline,
    module: torch.nn.Module,
    example: dict[str, Any],
    trajectories: Recorded | _denoise.Generated,
    call: _shapes.Call,
    metadata: dict[str, Any],
) -> Model:
    """The model, whose weights stay in their files; experts have theirs each."""
    one = pipeline.networks[0] if len(pipeline.networks) == 1 else None
    weights: dict[str, Any] = (
        {} if one is None else {"checkpoint": one.checkpoint, "make": one.make, "learned": one.learned}
    )
    moving = {"timestep", *call.latents, *(name for name, one in call.inputs.items() if one.changes)}
    steady = tuple(name for name in example if name not in moving)
    return Model(module, example, trajectories, metadata=metadata, prompt_inputs=steady, **weights)


def _from_recorded(pipeline: Pipeline, call: _shapes.Call, held: Recorded, metadata: dict[str, Any]) -> Model:
    example = dict(next(iter(held))[0]["inputs"])
    text = {name: tensor for name, tensor in example.items() if name not in ("timestep", *call.latents)}
    zeros = {name: torch.zeros(shape) for name, shape in call.latents.items()}
    wanted = _embeddings.inputs(call, zeros, example["timestep"], text)
    recorded.check(held, wanted, pipeline.folder, "timestep")
    made = _model(pipeline, _module(pipeline), example, held, call, metadata)
    if held.settings is not None:
        try:
            made.sampler = _recorded_sampler(pipeline, call, held, held.settings)
        except ModelError as error:  # a transformer without the pipeline it was recorded in
            metadata["notes"].append(f"no clips will be compared: {error}")
    return made


def _recorded_sampler(
    pipeline: Pipeline, call: _shapes.Call, held: Recorded, known: recorded.Settings
) -> FolderSampler:
    """The loop that was recorded, with the text of its first prompts. Raises ModelError where its scheduler is gone."""
    _, query = _options.split(known.model)
    options = _options.parse(query, known.model)
    guidance, call = _guidance(pipeline, call, options)
    prompts: list[Prompt] = []
    for trajectory in itertools.islice(held, _sampler.CLIPS):
        branches = {step["branch"]: step["inputs"] for step in reversed(trajectory)}
        prompts.append({branch: _embeddings.of_step(call, given) for branch, given in branches.items()})
    loop = _denoise.Loop(call, _scheduler(pipeline, call, options), prompts, guidance)
    words = list(known.prompts[: len(prompts)]) or [""] * len(prompts)
    return FolderSampler(loop, words, pipeline.vae and pipeline.vae.parent)


def _sized(options: Options, held: Recorded) -> Options:
    """`options` with the sizes that were recorded, where no others are asked for."""
    known = held.settings
    if known is None:
        return options
    sizes = {name: getattr(options, name) or getattr(known, name) or None for name in ("frames", "height", "width")}
    return msgspec.structs.replace(options, **sizes)


def _facts(network: Network, call: _shapes.Call) -> dict[str, Any]:
    """What a bundle's manifest says about the model."""
    several = [{"name": n.replace("hidden_states", "sample"), "shape": list(s)} for n, s in call.latents.items()]
    return {
        "class": network.class_name,
        "frames": call.size.frames,
        "height": call.size.height,
        "width": call.size.width,
        "settings": {name: value for name, value in network.config.items() if not name.startswith("_")},
        "fixed": {name: fixed_arguments.describe(value) for name, value in call.fixed.items()},
        **({"repeats": dict(call.family.repeats)} if call.family.repeats else {}),
        **({"outputs": several} if len(several) > 1 else {}),
    }


def _refuse(options: Options) -> None:
    """Options that exclude each other: recorded trajectories have their schedule and text in them."""
    if options.timestep_input is not None:
        raise ModelError("--timestep-input is for .onnx files", hint="a diffusers transformer's is called timestep")
    if options.trajectories is not None:
        others = set(options.names()) - {"--trajectories", "--frames", "--height", "--width"}
        if others:
            raise ModelError(
                f"--trajectories and {sorted(others)[0]} exclude each other",
                hint="schedule and text of recorded trajectories are recorded",
            )
    if options.prompt_embeds is not None and (options.prompts or options.negative_prompt) is not None:
        raise ModelError("--prompt-embeds and --prompts exclude each other", hint="give the text or what became of it")


@dataclass(frozen=True)
class _Prompts:
    """prompts: [] for none; words: of each, where they are known; origin: where they are from; notes: what to say."""

    prompts: Sequence[Prompt]
    words: list[str] | None = None
    origin: str = ""
    notes: tuple[str, ...] = ()


def _prompts(pipeline: Pipeline, options: Options) -> _Prompts:
    """Text embeddings: given, or made by the pipeline's own encoders, or none, which is said."""
    if options.prompt_embeds is not None:
        return _Prompts(_embeddings.read(Path(options.prompt_embeds)), origin=options.prompt_embeds)
    words = list(_text.PROMPTS) if options.prompts is None else _text.read_prompts(Path(options.prompts))
    parts = _text.parts(pipeline.index or {})
    asked = (options.prompts or options.negative_prompt) is not None
    if not parts and not asked:
        return _Prompts([], notes=(f"no text encoder, --prompt-embeds or --trajectories: {_embeddings.RANDOM_NOTE}",))
    missing = next((name for name in parts if not (pipeline.folder / name).is_dir()), None)
    if missing is not None and not asked:
        return _Prompts([], notes=(f"{pipeline.folder / missing} is missing: {_embeddings.RANDOM_NOTE}",))
    if not asked and (too_large := pipeline.too_large_encoders()):
        return _Prompts([], notes=(f"{too_large}; record on a larger machine: {_embeddings.RANDOM_NOTE}",))
    try:
        made = pipeline.encode(words, options.negative_prompt or "")
    except MissingToolError as error:
        if asked:
            raise
        return _Prompts([], notes=(f"{error}: {_embeddings.RANDOM_NOTE}",))
    return _Prompts(made, words, origin=str(pipeline.folder))


def _arguments(network: Network) -> frozenset[str]:
    """What the network can be called with."""
    return frozenset(inspect.signature(type(network.module).forward).parameters)


def _guidance(pipeline: Pipeline, call: _shapes.Call, options: Options) -> tuple[_denoise.Guidance, _shapes.Call]:
    """(classifier-free guidance, the call with embedded guidance where the network takes that instead)."""
    chosen, family = options.guidance, call.family
    embedded = call.inputs.get("guidance")
    if options.guidance_2 is not None and len(pipeline.networks) == 1:
        raise ModelError(f"{pipeline.folder} has one transformer", hint="--guidance-2 is for the second of two experts")
    if embedded is not None:
        if chosen is not None:  # such networks are told 1000 times the scale
            told = replace(embedded, value=1000.0 * chosen)
            call = replace(call, inputs={**call.inputs, "guidance": told})
        return _denoise.Guidance(1.0), call
    scale = family.guidance if chosen is None else chosen
    return _denoise.Guidance(
        scale, options.guidance_2, pipeline.boundary if options.guidance_2 is not None else 0.0
    ), call


def _scheduler(pipeline: Pipeline, call: _shapes.Call, options: Options) -> _scheduling.Scheduler:
    config, origin = pipeline.schedule
    positions = int(torch.Size(call.latent).numel()) // call.latent[call.channel_axis]
    steps, given = options.steps or call.family.steps, call.family.sigmas
    return _scheduling.Scheduler(config, origin, steps, options.shift, positions, given(steps) if given else None)


def _module(pipeline: Pipeline) -> torch.nn.Module:
    """The one network, or Experts told apart at the pipeline's boundary."""
    if len(pipeline.networks) == 1:
        return pipeline.networks[0].module
    ranges = ((pipeline.boundary, pipeline.horizon), (0.0, pipeline.boundary))
    named = zip(pipeline.networks, ("high", "low"), ranges, strict=True)
    return Experts([Expert(name, one.module, t, one.checkpoint, one.make, one.learned) for one, name, t in named])


def _tokens(held: Recorded | None, prompts: Sequence[Prompt]) -> int | None:
    """Text tokens of the data there is."""
    if prompts:
        return prompts[0]["cond"][_embeddings.TEXT].shape[1]
    if held is None:
        return None
    given = next(iter(held))[0]["inputs"]
    if missing := sorted({"timestep", _embeddings.TEXT} - given.keys()):
        raise ModelError(f"the recorded steps have no {missing[0]}", hint="record every input of the transformer")
    return given[_embeddings.TEXT].shape[1]
