"""A folder that diffusers' save_pretrained() wrote: a whole pipeline, or its transformer alone.

Wan (also two experts), CogVideoX and LTX with their pipelines' defaults; any other *Transformer3DModel whose arguments
are known (_shapes). Nothing in the folder is run: configurations are read, weights are mapped safetensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from vdq_export.errors import ModelError
from vdq_export.experts import Expert, Experts
from vdq_export.model import Model
from vdq_export.recorded import Recorded
from vdq_export.sources import _denoise, _scheduling, _shapes, _weights
from vdq_export.sources._options import Options
from vdq_export.sources._weights import Network, read_json

ACCEPTS = "a folder of a diffusers pipeline or transformer"
TAKES_OPTIONS = True
_INDEX = "model_index.json"


def accepts(spec: str) -> bool:
    return Path(spec).is_dir()


def load(spec: str, options: Options) -> Model:
    """The model with static shapes as `options` and the folder say. Raises ModelError for what does not fit."""
    _refuse_both(options)
    folder = Path(spec)
    pipeline, index = _pipeline(folder)
    networks = _networks(folder, index)
    first = networks[0]
    recorded = None if options.trajectories is None else Recorded(Path(options.trajectories))
    prompts = None if options.prompt_embeds is None else _denoise.read_embeddings(Path(options.prompt_embeds))
    call = _shapes.call(first, spec, _vae(pipeline), options, _tokens(recorded, prompts))
    for one in networks:
        one.fix(call.fixed)
    notes = [note for one in networks for note in one.notes]
    horizon = _horizon(pipeline, first.class_name) if len(networks) > 1 else 0.0
    module = _module(networks, index, horizon, folder)
    facts: dict[str, Any] = {
        "class": first.class_name,
        "frames": call.size.frames,
        "height": call.size.height,
        "width": call.size.width,
        "settings": {name: value for name, value in first.config.items() if not name.startswith("_")},
    }
    if recorded is not None:
        example = dict(next(iter(recorded))[0]["inputs"])
        text = {name: tensor for name, tensor in example.items() if name not in ("hidden_states", "timestep")}
        latent = torch.zeros(call.latent)
        _denoise.check_recorded(recorded, _denoise.inputs(call, latent, example["timestep"], text), folder)
        return _model(module, networks, call, example, recorded, {"config": facts, "notes": notes})
    guidance = call.family.guidance if options.guidance is None else options.guidance
    config, origin = _scheduling.config_of(pipeline, first.class_name)
    if pipeline is None:
        notes.append(f"{spec} has no scheduler: {config['_class_name']} as in the family's published pipeline")
    steps = options.steps or call.family.steps
    tokens = call.latent[1] if call.family.layout == "tokens" else _count(call)
    scheduler = _scheduling.Scheduler(config, origin, steps, options.shift, tokens)
    if prompts is None:
        prompts = _denoise.random_embeddings(call)
        notes.append(_denoise.RANDOM_NOTE)
    _check_prompts(prompts, call, guidance, options.prompt_embeds)
    call = _denoise.with_masks(call, prompts)
    generated = _denoise.Generated(module, call, scheduler, prompts, guidance)
    example = _denoise.inputs(call, torch.zeros(call.latent), scheduler.timesteps[0], prompts[0]["cond"])
    facts |= {"scheduler": scheduler.name, "steps": steps, "guidance": guidance, "shift": options.shift}
    return _model(module, networks, call, example, generated, {"config": facts, "notes": notes})


def _model(
    module: torch.nn.Module,
    networks: list[Network],
    call: _shapes.Call,
    example: dict[str, Any],
    trajectories: Recorded | _denoise.Generated,
    metadata: dict[str, Any],
) -> Model:
    """The model, whose weights stay in their files; experts have theirs each."""
    one = networks[0] if len(networks) == 1 else None
    return Model(
        module,
        example,
        trajectories,
        metadata=metadata,
        checkpoint=None if one is None else one.checkpoint,
        make=None if one is None else one.make,
        prompt_inputs=tuple(name for name in example if name in call.inputs),
    )


def _refuse_both(options: Options) -> None:
    """Recorded trajectories have their schedule and text in them."""
    if options.trajectories is not None:
        others = set(options.names()) - {"--trajectories", "--frames", "--height", "--width"}
        if others:
            raise ModelError(
                f"--trajectories and {sorted(others)[0]} exclude each other",
                hint="schedule and text of recorded trajectories are recorded",
            )


def _pipeline(folder: Path) -> tuple[Path | None, Mapping[str, Any]]:
    """(pipeline folder, its index); (None, {}) for a transformer folder. Raises ModelError for neither."""
    if (folder / _INDEX).is_file():
        return folder, read_json(folder / _INDEX)
    if (folder / "config.json").is_file():
        return None, {}
    raise ModelError(
        f"{folder} is no diffusers folder: neither {_INDEX} nor config.json is in it",
        hint="give a folder that save_pretrained() wrote",
    )


def _networks(folder: Path, index: Mapping[str, Any]) -> list[Network]:
    """The transformer, or both experts, which must be alike."""
    if not index:
        return [_weights.read(folder)]
    if not _listed(index, "transformer"):
        raise ModelError(f"{folder / _INDEX} names no transformer", hint="only pipelines of transformers are read")
    if index.get("expand_timesteps"):
        raise ModelError(
            f"{folder / _INDEX}: expand_timesteps gives each token a timestep", hint="such models are not read yet"
        )
    networks = [_weights.read(folder / "transformer")]
    if _listed(index, "transformer_2"):
        second = _weights.read(folder / "transformer_2")
        differing = sorted(
            name
            for name in networks[0].config.keys() | second.config.keys()
            if not name.startswith("_") or name == "_class_name"
            if networks[0].config.get(name) != second.config.get(name)
        )
        if differing:
            raise ModelError(
                f"{folder}: config.json of transformer and transformer_2 differ in {', '.join(differing)}",
                hint="two experts must have the same configuration",
            )
        networks.append(second)
    return networks


def _listed(index: Mapping[str, Any], part: str) -> bool:
    """Whether a pipeline has this part: an index says [null, null] of one it may have and has not."""
    entry = index.get(part)
    return isinstance(entry, list) and any(one is not None for one in entry)


def _module(networks: list[Network], index: Mapping[str, Any], horizon: float, folder: Path) -> torch.nn.Module:
    """The one network, or Experts told apart at boundary_ratio × the scheduler's training timesteps."""
    if len(networks) == 1:
        return networks[0].module
    ratio = index.get("boundary_ratio")
    if not isinstance(ratio, float) or not 0 < ratio < 1:
        raise ModelError(
            f"{folder / _INDEX}: boundary_ratio is {ratio!r}, and there are two transformers",
            hint="it says, between 0 and 1, where the second one begins",
        )
    boundary = ratio * horizon
    ranges = zip(networks, ("high", "low"), ((boundary, horizon), (0.0, boundary)), strict=True)
    return Experts([Expert(name, one.module, t, one.checkpoint, one.make) for one, name, t in ranges])


def _horizon(pipeline: Path | None, class_name: str) -> float:
    config, origin = _scheduling.config_of(pipeline, class_name)
    return _scheduling.Scheduler(config, origin, 1, None, 1).horizon


def _vae(pipeline: Path | None) -> Path | None:
    path = None if pipeline is None else pipeline / "vae" / "config.json"
    return path if path is not None and path.is_file() else None


def _tokens(recorded: Recorded | None, prompts: list[_denoise.Prompt] | None) -> int | None:
    """Text tokens of the data there is."""
    if prompts is not None:
        return prompts[0]["cond"]["encoder_hidden_states"].shape[1]
    if recorded is None:
        return None
    given = next(iter(recorded))[0]["inputs"]
    if missing := sorted({"timestep", "encoder_hidden_states"} - given.keys()):
        raise ModelError(f"the recorded steps have no {missing[0]}", hint="record every input of the transformer")
    return given["encoder_hidden_states"].shape[1]


def _count(call: _shapes.Call) -> int:
    """Latent positions, T·H·W."""
    return int(torch.Size(call.latent).numel()) // call.latent[call.channel_axis]


def _check_prompts(prompts: list[_denoise.Prompt], call: _shapes.Call, guidance: float, origin: str | None) -> None:
    found = prompts[0]["cond"]["encoder_hidden_states"].shape[2]
    if found != call.text[2]:
        raise ModelError(
            f"{origin}: embeddings are {found} wide, the model takes {call.text[2]}",
            hint="make them with its own encoder",
        )
    if guidance > 1 and "encoder_hidden_states" not in prompts[0]["uncond"]:
        raise ModelError(f"{origin} has no negative_prompt_embeds", hint="guidance needs them; or --guidance 1")
