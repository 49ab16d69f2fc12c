"""Cosmos with a padding mask: the channel that diffusers resizes with torchvision is one of zeros."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import diffusers.models.transformers.transformer_cosmos as theirs
import pytest
import torch
from torch.nn.functional import interpolate

from tests.families import network, tiny_of
from tests.pipelines import sensible
from vdq_export.model import first_tensor
from vdq_export.sources import registry


def test_no_pixel_is_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = SimpleNamespace(
        functional=SimpleNamespace(resize=lambda mask, size, interpolation: interpolate(mask, size, mode="nearest")),
        InterpolationMode=SimpleNamespace(NEAREST=None),
    )
    monkeypatch.setattr(theirs, "transforms", stand_in, raising=False)
    family, tiny = tiny_of("Cosmos")
    padded = type(tiny)({**tiny.settings, "concat_padding_mask": True}, tiny.video)
    one, other = (sensible(network(family, padded)) for _ in range(2))
    config: Any = one.config
    inputs, fixed = registry.example_inputs(family, config, (2, 8, 8), 8)
    assert family.prepare is not None
    family.prepare(other)
    with torch.no_grad():
        expected = first_tensor(one(**inputs, **fixed))
        torch.testing.assert_close(first_tensor(other(**inputs, **fixed)), expected)
        fixed["padding_mask"] = torch.ones_like(fixed["padding_mask"])
        assert not torch.allclose(first_tensor(one(**inputs, **fixed)), expected)  # the channel does count
