"""A case for hosts that are not Python: the noise and the prompts that a sampler starts a clip from, as one file.

It is a safetensors file: `latent` is the first input that is not the timestep, BRANCH/INPUT every other input that a
call of this guidance branch brings. Metadata: `latent`, the name of that input; `branches`, in the order they are
called, separated by spaces; `number` and `text`, what is asked for.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save

from vdq_export.bundle import Bundle
from vdq_export.errors import ModelError
from vdq_export.manifest import Signature
from vdq_export.model import Sampler, Step
from vdq_export.runtime.batching import primary

SAMPLERS = ("flow-euler",)  # what loop.mjs can carry out


class _SecondStepError(Exception):
    """Everything that a host cannot compute itself has been seen."""


def check(bundle: Bundle) -> None:
    """Raises ModelError when the bundle was calibrated for a sampler that the host loop does not have."""
    name = bundle.schedule.sampler.get("name")
    if name not in SAMPLERS:
        kind = f"sampler {name!r}" if name else "no sampler"
        raise ModelError(
            f"{bundle.path} was made with {kind}, and the host loop carries out {', '.join(SAMPLERS)} only",
            hint="export a model with such a sampler, for example sample:digits",
        )


def make(bundle: Bundle, sampler: Sampler, number: int) -> bytes:
    """Case `number` of `sampler` as a file: what its first step calls the network with.

    Raises ModelError when this does not fit the bundle's graphs, and what the sampler raises for an unknown number.
    """
    signature = bundle.manifest.signature
    calls = _first_step(sampler, number, signature)
    latent = primary(signature).name
    start = calls[0]["inputs"][latent]
    if not all(torch.equal(call["inputs"][latent], start) for call in calls):
        raise ModelError(f"the guidance branches of case {number} start from different noise")
    tensors = {"latent": _numpy(start, signature, latent)}
    for call in calls:
        for name, value in call["inputs"].items():
            if name not in (latent, signature.timestep):
                tensors[f"{call['branch']}/{name}"] = _numpy(value, signature, name)
    metadata = {
        "latent": latent,
        "branches": " ".join(call["branch"] for call in calls),
        "number": str(number),
        "text": sampler.describe(number),
    }
    return save(tensors, metadata)


def _first_step(sampler: Sampler, number: int, signature: Signature) -> list[Step]:
    """The calls of the first step of a clip, made on a network that gives zeros; the second step is not begun."""
    calls: list[Step] = []
    zeros = torch.zeros(signature.outputs[0].shape)

    def observe(step: Step) -> None:
        if calls and step["t"] != calls[0]["t"]:
            raise _SecondStepError
        calls.append(step)

    def network(*_: Any, **__: Any) -> tuple[torch.Tensor]:
        return (zeros,)

    with suppress(_SecondStepError):
        sampler.generate(network, number, observe)
    if not calls:
        raise ModelError("the sampler told its observer nothing", hint="call it before each call of the network")
    return calls


def _numpy(value: torch.Tensor, signature: Signature, name: str) -> np.ndarray[Any, Any]:
    info = next((one for one in signature.inputs if one.name == name), None)
    if info is None or tuple(value.shape) != info.shape:
        wanted = f"take {list(info.shape)}" if info else "have no such input"
        raise ModelError(f"the sampler calls with {name} {list(value.shape)}, the graphs {wanted}")
    return np.ascontiguousarray(value.detach().cpu().numpy(), dtype=info.dtype)
