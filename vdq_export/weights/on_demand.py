"""A torch network that stays on the meta device until it is called: it then takes its weights from a checkpoint.

For what only torch can do: sampling trajectories of a small model, and comparing a traced graph with the network. The
compiler itself never needs it.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import psutil
import torch

from vdq_export.errors import ModelError
from vdq_export.weights.checkpoint import Checkpoint

SHARE = 0.5  # of the memory that is free: activations need the rest, and a machine that swaps is a machine that hangs


def fits(checkpoint: Checkpoint) -> bool:
    """Whether all weights, in float32, can be held beside what computing with them takes."""
    return bool(checkpoint.nbytes_computed <= SHARE * psutil.virtual_memory().available)


def on_demand(module: torch.nn.Module, checkpoint: Checkpoint, name: str) -> None:
    """Let `module`, which is on the meta device, load its weights when it is first called. name: for errors."""
    waiting: list[Any] = []

    def load_first(_module: torch.nn.Module, _inputs: Any) -> None:
        load(module, checkpoint, name)
        waiting.pop().remove()

    waiting.append(module.register_forward_pre_hook(load_first))


def load(module: torch.nn.Module, checkpoint: Checkpoint, name: str) -> None:
    """Give `module` its weights, as float32; those that are stored so are mapped, not copied. A second call does
    nothing. Raises ModelError for a model that does not fit in memory."""
    wanted = module.state_dict()
    if not any(tensor.is_meta for tensor in wanted.values()):
        return
    if not fits(checkpoint):
        raise ModelError(
            f"{name}: its weights take {checkpoint.nbytes_computed / 1e9:.1f} GB in float32, "
            "more than half of the memory that is free",
            hint="give recorded trajectories or a saved calibration record, or a recipe that needs neither",
        )
    module.load_state_dict({key: _tensor(checkpoint[key], wanted[key]) for key in wanted}, strict=True, assign=True)


def _tensor(array: np.ndarray[Any, Any], wanted: torch.Tensor) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch cannot say that a tensor is read-only; nobody here writes to one
        if array.dtype.name == "bfloat16":
            tensor = torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        else:
            tensor = torch.from_numpy(array)
    return tensor.to(wanted.dtype)
