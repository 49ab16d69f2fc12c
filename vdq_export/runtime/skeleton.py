"""Parts of a network that have no weights, as its class in diffusers makes them: a pipeline may ask for its positions.

Needs torch and diffusers, which whoever runs a pipeline has.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import msgspec


def part(class_name: str, settings: Mapping[str, Any], name: str) -> Any:
    """Module `name` of the network of these settings. Raises AttributeError where it has none, or one with weights."""
    found = _whole(class_name, msgspec.json.encode(settings)).get(name)
    if found is None:
        raise AttributeError(f"a bundle has no {name!r}, nor has {class_name} one without weights")
    return found


@lru_cache(maxsize=4)
def _whole(class_name: str, settings: bytes) -> dict[str, Any]:
    """{name: module} of the network's modules without parameters and buffers; {} where diffusers has no such class."""
    try:
        import torch
        from diffusers.models import transformers
    except ImportError:
        return {}
    kind: Any = getattr(transformers, class_name, None)
    if kind is None:
        return {}
    with torch.device("meta"):
        network = kind.from_config(msgspec.json.decode(settings))
    return {
        name: module
        for name, module in network.named_children()
        if next(module.parameters(), None) is None and next(module.buffers(), None) is None
    }
