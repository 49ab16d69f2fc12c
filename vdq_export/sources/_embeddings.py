"""What a network takes of a prompt, from files, from the pipeline's encoders, or at random; with it, a call's inputs.

A prompt is {branch: {input of the network: tensor with B = 1}}. In a file its tensors are called prompt_embeds,
prompt_attention_mask, or by the network's input, and negative_… for the branch "uncond".
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vdq_export.errors import ModelError
from vdq_export.sources._shapes import Call
from vdq_export.sources._text import Prompt
from vdq_export.sources.families import mask

TEXT, MASK = "encoder_hidden_states", "encoder_attention_mask"
IMAGE = "image_latents"  # of a file: the channels beside the noise; no input of a network
_OF_BOTH = (IMAGE, "encoder_hidden_states_image", "image_embeds")  # the branch "uncond" sees the same image
RANDOM_PROMPTS = 2
RANDOM_NOTE = (
    "calibrated on RANDOM text embeddings, so ranges are not those of real prompts and quality on real prompts is "
    "unknown; good enough to test shapes, sizes and speed, not to ship"
)
_IN_FILES = {TEXT: "prompt_embeds", MASK: "prompt_attention_mask"}
_INPUTS = {name: key for key, name in _IN_FILES.items()}
_NEGATIVE = "negative_"


def read(path: Path) -> list[Prompt]:
    """Prompts of a safetensors file: prompt_embeds [N, L, D] and, for guidance, negative_prompt_embeds [N or 1, L, D].

    Beside them may be masks ([N or 1, L], "prompt_attention_mask", "negative_prompt_attention_mask"; else all tokens
    count) and other inputs by their own names. Raises ModelError for anything else.
    """
    try:
        held = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint="--prompt-embeds is a safetensors file") from error
    if "prompt_embeds" not in held or held["prompt_embeds"].ndim != 3:
        raise ModelError(f"{path} has no prompt_embeds [prompts, tokens, width]", hint="save them so")
    count = held["prompt_embeds"].shape[0]
    shapes: dict[str, tuple[int, ...]] = {}
    prompts: list[dict[str, dict[str, torch.Tensor]]] = [{"cond": {}, "uncond": {}} for _ in range(count)]
    for key in sorted(held, key=lambda name: name.startswith(_NEGATIVE)):
        tensor, name = held[key], key.removeprefix(_NEGATIVE)
        if (
            tensor.ndim < 1
            or tensor.shape[0] not in (1, count)
            or shapes.setdefault(name, tensor.shape[1:]) != tensor.shape[1:]
        ):
            raise ModelError(
                f"{path}: {key} is {list(tensor.shape)}, prompt_embeds {list(held['prompt_embeds'].shape)}",
                hint="give all the same prompts, tokens and width",
            )
        if not torch.isfinite(tensor.float()).all():
            raise ModelError(f"{path}: {key} holds NaN or Inf", hint="make the embeddings again")
        branch = "cond" if name == key else "uncond"
        for number, prompt in enumerate(prompts):
            one = tensor[min(number, tensor.shape[0] - 1)][None]
            whole = not one.is_floating_point() or name == "prompt_attention_mask"
            prompt[branch][_INPUTS.get(name, name)] = one.to(torch.int64) if whole else one.float()
    for prompt in prompts:
        shown = {name: prompt["cond"][name] for name in _OF_BOTH if name in prompt["cond"]}
        prompt["uncond"] = {**shown, **prompt["uncond"]}
    return list(prompts)


def save(prompts: Sequence[Prompt], path: Path) -> None:
    """Write what read() reads."""
    tensors = {
        f"{'' if branch == 'cond' else _NEGATIVE}{_IN_FILES.get(name, name)}": torch.cat(
            [p[branch][name] for p in prompts]
        )
        for branch in ("cond", "uncond")
        for name in prompts[0][branch]
    }
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def random(call: Call) -> list[Prompt]:
    """Normal numbers in place of text, of both branches; the same ones at each call."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            branch: {name: one.make(generator) for name, one in call.inputs.items() if one.value is None}
            for branch in ("cond", "uncond")
        }
        for _ in range(RANDOM_PROMPTS)
    ]


def check(prompts: Sequence[Prompt], call: Call, guided: bool, origin: str, arguments: Collection[str]) -> list[Prompt]:
    """The prompts as the network takes them: what is none of its `arguments` is left out, and the branch "uncond"
    unless `guided`.

    Raises ModelError for what misses or has another shape.
    """
    found = prompts[0]["cond"][TEXT].shape[-1]
    if found != call.text[-1]:
        raise ModelError(
            f"{origin}: embeddings are {found} wide, the model takes {call.text[-1]}",
            hint="make them with its own encoder",
        )
    if guided and TEXT not in prompts[0]["uncond"]:
        raise ModelError(f"{origin} has no negative_prompt_embeds", hint="guidance needs them; or --guidance 1")
    branches = ("cond", "uncond") if guided else ("cond",)
    for name, wanted in call.inputs.items():
        for branch in branches:
            given = prompts[0][branch].get(name)
            if given is None and wanted.value is None:
                key = f"{'' if branch == 'cond' else _NEGATIVE}{_IN_FILES.get(name, name)}"
                raise ModelError(f"{origin} has no {key}", hint="make the embeddings with the pipeline's own encoders")
            if given is not None and given.numel() != torch.Size(wanted.shape).numel():
                raise ModelError(
                    f"{origin}: {name} is {list(given.shape)}, the model takes {list(wanted.shape)}",
                    hint="make the embeddings with the pipeline's own encoders",
                )

    def shaped(name: str, tensor: torch.Tensor) -> torch.Tensor:  # axes of length 1, which pipelines add
        return tensor.reshape(call.inputs[name].shape) if name in call.inputs else tensor

    kept = {*arguments, IMAGE}
    return [{b: {n: shaped(n, t) for n, t in p[b].items() if n in kept} for b in branches} for p in prompts]


def with_masks(call: Call, prompts: Sequence[Prompt]) -> Call:
    """The call, with a mask where a prompt has one and the network need not."""
    given = any(MASK in text for prompt in prompts for text in prompt.values())
    return replace(call, inputs={**({MASK: mask(call.size)} if given else {}), **call.inputs})


def inputs(
    call: Call, latents: Mapping[str, torch.Tensor], t: torch.Tensor, text: Mapping[str, torch.Tensor]
) -> dict[str, Any]:
    """One call's tensors by name; a mask of ones, a guidance scale … where the network takes one and there is none."""
    given = {name: tensor for name, tensor in text.items() if name != IMAGE}
    made = {**latents, "timestep": call.timestep(t), **given}
    made["hidden_states"] = call.hidden_states(latents["hidden_states"], text.get(IMAGE))
    return made | {name: one.make() for name, one in call.inputs.items() if name not in made and one.value is not None}


def of_step(call: Call, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The prompt of a call: what inputs() was given of it, the channels beside the noise included."""
    text = {name: tensor for name, tensor in given.items() if name not in ("timestep", *call.latents)}
    if call.beside is not None:
        axis, channels = call.channel_axis, call.latent[call.channel_axis]
        held = given["hidden_states"]
        text[IMAGE] = held.narrow(axis, channels, held.shape[axis] - channels)
    return text
