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

Array = np.ndarray[Any, Any]
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
    latent = primary(signature).name
    calls = _first_step(sampler, number, signature)
    start = calls[0][1][latent]
    if not all(np.array_equal(inputs[latent], start) for _, inputs in calls):
        raise ModelError(f"the guidance branches of case {number} start from different noise")
    tensors = {"latent": start}
    for branch, inputs in calls:
        for name in inputs.keys() - {latent, signature.timestep}:
            tensors[f"{branch}/{name}"] = inputs[name]
    metadata = {
        "latent": latent,
        "branches": " ".join(branch for branch, _ in calls),
        "number": str(number),
        "text": sampler.describe(number),
    }
    return save(dict(sorted(tensors.items())), metadata)


def _first_step(sampler: Sampler, number: int, signature: Signature) -> list[tuple[str, dict[str, Array]]]:
    """(branch, inputs) of each call of a clip's first step, made on a network that gives zeros."""
    seen: list[Step] = []
    calls: list[tuple[str, dict[str, Array]]] = []
    zeros = torch.zeros(signature.outputs[0].shape)

    def observe(step: Step) -> None:
        if seen and step["t"] != seen[0]["t"]:
            raise _SecondStepError
        seen.append(step)
        calls.append((step["branch"], {name: _numpy(v, signature, name) for name, v in step["inputs"].items()}))

    def network(*_: Any, **__: Any) -> tuple[torch.Tensor]:
        return (zeros,)

    with suppress(_SecondStepError):
        sampler.generate(network, number, observe)
    if not calls:
        raise ModelError("the sampler told its observer nothing", hint="call it before each call of the network")
    return calls


def _numpy(value: torch.Tensor, signature: Signature, name: str) -> Array:
    info = next((one for one in signature.inputs if one.name == name), None)
    if info is None or tuple(value.shape) != info.shape:
        wanted = f"take {list(info.shape)}" if info else "have no such input"
        raise ModelError(f"the sampler calls with {name} {list(value.shape)}, the graphs {wanted}")
    return np.ascontiguousarray(value.detach().cpu().numpy(), dtype=info.dtype)
