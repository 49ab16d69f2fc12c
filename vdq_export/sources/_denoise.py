"""Calibration data of a model read from a folder: recorded trajectories, or latents denoised by the float model itself.

Shapes: see _shapes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from vdq_export.errors import ModelError
from vdq_export.model import Step, Trajectory, first_tensor
from vdq_export.recorded import Recorded
from vdq_export.sources._scheduling import Scheduler
from vdq_export.sources._shapes import Call
from vdq_export.sources.families import mask

RANDOM_PROMPTS = 2
RANDOM_NOTE = (
    "no --prompt-embeds and no --trajectories: calibrated on RANDOM text embeddings, so ranges are not those of real "
    "prompts and quality on real prompts is unknown; good enough to test shapes, sizes and speed, not to ship"
)
_KEYS = {
    "prompt_embeds": ("cond", "encoder_hidden_states"),
    "negative_prompt_embeds": ("uncond", "encoder_hidden_states"),
    "prompt_attention_mask": ("cond", "encoder_attention_mask"),
    "negative_prompt_attention_mask": ("uncond", "encoder_attention_mask"),
}
Prompt = Mapping[str, Mapping[str, torch.Tensor]]  # branch -> input -> tensor with B = 1


def read_embeddings(path: Path) -> list[Prompt]:
    """Prompts of a safetensors file: prompt_embeds [N, L, D] and, for guidance, negative_prompt_embeds [N or 1, L, D].

    Masks ([N or 1, L], "prompt_attention_mask", "negative_prompt_attention_mask") may be beside them; else all tokens
    count. Raises ModelError for anything else.
    """
    try:
        held = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint="--prompt-embeds is a safetensors file") from error
    if unknown := sorted(held.keys() - _KEYS.keys()):
        raise ModelError(f"{path}: tensor {unknown[0]} is not known", hint=f"known: {', '.join(_KEYS)}")
    if "prompt_embeds" not in held or held["prompt_embeds"].ndim != 3:
        raise ModelError(f"{path} has no prompt_embeds [prompts, tokens, width]", hint="save them so")
    count, tokens, width = held["prompt_embeds"].shape
    for name, tensor in held.items():
        rest = (tokens, width) if name.endswith("embeds") else (tokens,)
        if tuple(tensor.shape[1:]) != rest or tensor.shape[0] not in (1, count):
            raise ModelError(
                f"{path}: {name} is {list(tensor.shape)}, prompt_embeds {[count, tokens, width]}",
                hint="give all the same prompts, tokens and width",
            )
        if not torch.isfinite(tensor.float()).all():
            raise ModelError(f"{path}: {name} holds NaN or Inf", hint="make the embeddings again")
    prompts: list[dict[str, dict[str, torch.Tensor]]] = [{"cond": {}, "uncond": {}} for _ in range(count)]
    for name, tensor in held.items():
        branch, key = _KEYS[name]
        for number, prompt in enumerate(prompts):
            one = tensor[min(number, tensor.shape[0] - 1)][None]
            prompt[branch][key] = one.float() if key == "encoder_hidden_states" else one.to(torch.int64)
    return list(prompts)


def random_embeddings(call: Call) -> list[Prompt]:
    """Normal numbers in place of text, of both branches; the same ones at each call."""
    generator = torch.Generator().manual_seed(0)
    return [
        {
            branch: {name: one.make(generator) for name, one in call.inputs.items() if one.value is None}
            for branch in ("cond", "uncond")
        }
        for _ in range(RANDOM_PROMPTS)
    ]


def with_masks(call: Call, prompts: Sequence[Prompt]) -> Call:
    """The call, with a mask where a prompt has one and the network need not."""
    given = any("encoder_attention_mask" in text for prompt in prompts for text in prompt.values())
    masks = {"encoder_attention_mask": mask(call.size)} if given else {}
    return replace(call, inputs={**masks, **call.inputs})


def inputs(call: Call, latent: torch.Tensor, t: torch.Tensor, text: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """One call's tensors by name; a mask of ones, a guidance scale … where the network takes one and there is none."""
    made = {"hidden_states": call.hidden_states(latent), "timestep": t.reshape(1), **text}
    return made | {name: one.make() for name, one in call.inputs.items() if name not in made and one.value is not None}


@dataclass
class Generated:
    """Trajectories that `network` itself denoises, one a prompt, from noise of fixed seeds; kept once made.

    guidance > 1 calls both branches a step, else "cond" alone.
    """

    network: Callable[..., Any]
    call: Call
    scheduler: Scheduler
    prompts: Sequence[Prompt]
    guidance: float

    def __post_init__(self) -> None:
        self._made: dict[int, Trajectory] = {}
        self._draws = "generator" in inspect.signature(self.scheduler.fresh().step).parameters

    def __len__(self) -> int:
        return len(self.prompts)

    def __iter__(self) -> Iterator[Trajectory]:
        for number in range(len(self.prompts)):
            if number not in self._made:
                self._made[number] = self._denoise(number)
            yield self._made[number]

    def _denoise(self, number: int) -> Trajectory:
        generator = torch.Generator().manual_seed(number)
        scheduler, steps = self.scheduler.fresh(), list[Step]()
        latent = torch.randn(self.call.latent, generator=generator) * getattr(scheduler, "init_noise_sigma", 1.0)
        branches = ("cond", "uncond") if self.guidance > 1 else ("cond",)
        original: Any = None  # what a two-step DPM solver remembers of the step before
        timesteps = self.scheduler.timesteps
        for index, t in enumerate(timesteps):
            seen = latent
            if hasattr(scheduler, "scale_model_input"):
                seen = scheduler.scale_model_input(latent, t)
            predicted = {}
            for branch in branches:
                given = inputs(self.call, seen, t, self.prompts[number][branch])
                steps.append({"t": float(t), "branch": branch, "inputs": given})  # type: ignore[typeddict-item]
                predicted[branch] = self._predict(given)
            noise = predicted["cond"]
            if "uncond" in predicted:
                noise = predicted["uncond"] + self.guidance * (noise - predicted["uncond"])
            if self.scheduler.name == "CogVideoXDPMScheduler":
                before = timesteps[index - 1] if index else None
                latent, original = scheduler.step(
                    noise, original, t, before, latent, generator=generator, return_dict=False
                )
            else:
                random = {"generator": generator} if self._draws else {}
                latent = scheduler.step(noise, t, latent, **random, return_dict=False)[0]
            if not torch.isfinite(latent).all():
                raise ModelError(f"denoising gave NaN or Inf at t = {float(t):g}", hint="check weights and scheduler")
        return steps

    def _predict(self, given: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The network's answer; of one that also returns variances, the first half of the channels."""
        try:
            with torch.no_grad():
                output = first_tensor(self.network(**given))
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ModelError(
                f"the network fails when it is called with {', '.join(given)}: {why}",
                hint="choose other sizes, or write a factory and give package.module:factory",
            ) from error
        axis, channels = self.call.channel_axis, self.call.latent[self.call.channel_axis]
        if output.shape[axis] == 2 * channels:
            output = output.narrow(axis, 0, channels)
        if tuple(output.shape) != self.call.latent:
            raise ModelError(
                f"the network returned {list(output.shape)} for a latent of {list(self.call.latent)}",
                hint="write a factory and give package.module:factory",
            )
        return output


def check_recorded(recorded: Recorded, example: Mapping[str, torch.Tensor], place: Path) -> None:
    """Every recorded step has the example's inputs, shapes and types. Raises ModelError for the first that has not."""
    wanted = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in example.items()}
    for number, trajectory in enumerate(recorded):
        for index, step in enumerate(trajectory):
            found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in step["inputs"].items()}
            for name in sorted(wanted.keys() | found.keys()):
                if wanted.get(name) != found.get(name):
                    raise ModelError(
                        f"{place}: trajectory {number}, step {index} has {name} {_text(found.get(name))}, "
                        f"the model takes {_text(wanted.get(name))}",
                        hint="record at the same --frames, --height and --width",
                    )


def _text(signature: tuple[tuple[int, ...], torch.dtype] | None) -> str:
    return "not at all" if signature is None else f"{list(signature[0])} {str(signature[1]).removeprefix('torch.')}"
