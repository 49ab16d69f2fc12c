"""What a bundle does beyond predicting, where a pipeline has its network: repeated arguments, parts without weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import vdq_export
from tests.families import network, tiny_of
from vdq_export.errors import BundleError
from vdq_export.runtime.transformer import Transformer, _split


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory, tiny: Any) -> Iterator[Transformer]:
    family, configuration = tiny_of("LTX-2")
    config = {
        "class": family.class_name, "settings": dict(configuration.settings), "repeats": {"sigma": "timestep"},
    }  # fmt: skip
    out: Path = tmp_path_factory.mktemp("standing-in") / "bundle"
    model = replace(tiny, metadata={"config": config})
    bundle = vdq_export.export(model, target="ort-int8", tsw=1, recipe="static-minmax", hoist=False, out=out)
    with vdq_export.load(bundle.path) as made:
        yield made


def test_an_argument_that_repeats_an_input_must_equal_it(transformer: Transformer, tiny_feeds: Any) -> None:
    plain = transformer(**tiny_feeds).sample
    np.testing.assert_array_equal(transformer(**tiny_feeds, sigma=tiny_feeds["timestep"]).sample, plain)
    np.testing.assert_array_equal(transformer(**tiny_feeds, sigma=None).sample, plain)
    with pytest.raises(BundleError, match="sigma differs from timestep"):
        transformer(**tiny_feeds, sigma=tiny_feeds["timestep"] + 1)


def test_parts_without_weights_are_the_networks(transformer: Transformer) -> None:
    """LTX-2's pipeline asks for positions."""
    family, configuration = tiny_of("LTX-2")
    theirs: Any = network(family, configuration)
    where = torch.device("cpu")
    expected = theirs.rope.prepare_video_coords(1, 2, 4, 4, where, fps=24.0)
    assert torch.equal(transformer.rope.prepare_video_coords(1, 2, 4, 4, where, fps=24.0), expected)
    for name in ("proj_in", "nothing_like_it"):
        with pytest.raises(AttributeError, match=f"a bundle has no '{name}'"):
            getattr(transformer, name)
    with pytest.raises(AttributeError, match="_hidden"):
        transformer._hidden  # noqa: B018


def test_a_row_is_split_into_the_outputs_in_their_order() -> None:
    row = np.arange(2 * (6 + 4), dtype=np.float32).reshape(2, 10)
    made = _split(row, [("sample", (1, 3, 2)), ("audio_sample", (1, 4))])
    assert list(made) == ["sample", "audio_sample"]
    np.testing.assert_array_equal(made["sample"], row[:, :6].reshape(2, 3, 2))
    np.testing.assert_array_equal(made["audio_sample"], row[:, 6:])
