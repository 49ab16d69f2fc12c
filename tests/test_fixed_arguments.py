"""Arguments an export fixed are described in a line and recognised; others are told apart."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from vdq_export.fixed_arguments import describe, same

TABLE = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
VALUES: list[Any] = [
    None, True, 3, 0.16, "linear", (0.16, 8, 8), [1, 2], TABLE, (TABLE.cos(), TABLE.sin()), {"a": TABLE, "b": 2},
    torch.ones(1, 8, dtype=torch.int64), torch.zeros(1, 1, 4, 4), torch.tensor(5.0),
]  # fmt: skip


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(describe(value)))


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_is_itself_and_no_other(value: Any) -> None:
    described = through_json(value)
    assert len(json.dumps(described)) < 700, "tables are not written out"
    assert same(value, described)
    assert [same(other, described) for other in VALUES].count(True) == 1


def test_last_bits_do_not_matter_and_other_tables_do() -> None:
    described = through_json(TABLE)
    assert same(TABLE.to(torch.bfloat16), described)
    assert same(TABLE.numpy() * np.float32(1 + 1e-6), described)
    assert not same(TABLE * 1.01, described)
    assert not same(TABLE.roll(1, 0), described)
    assert not same(TABLE[:299], described)


def test_a_mask_may_be_repeated_for_both_branches() -> None:
    mask = torch.ones(1, 8, dtype=torch.int64)
    described = through_json(mask)
    assert same(mask.repeat(2, 1), described)
    other = mask.repeat(2, 1)
    other[1, 7] = 0
    assert not same(other, described)
    assert not same(other[1:], described)


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError, match="type object"):
        describe(object())


def test_the_runtime_accepts_what_was_fixed_and_refuses_another(tmp_path: Any, tiny: Any, tiny_feeds: Any) -> None:
    import vdq_export

    config = {"settings": {"patch_size": [1, 2, 2]}, "fixed": {"tables": describe((TABLE, 3))}}
    model = replace(tiny, metadata={"config": config})
    bundle = vdq_export.export(model, target="ort-int8", tsw=1, recipe="static-minmax", hoist=False, out=tmp_path / "b")
    with vdq_export.load(bundle.path) as transformer:
        assert transformer.config.patch_size == [1, 2, 2]
        plain = transformer(**tiny_feeds).sample
        np.testing.assert_array_equal(transformer(**tiny_feeds, tables=(TABLE, 3)).sample, plain)
        np.testing.assert_array_equal(transformer(**tiny_feeds, tables=None).sample, plain)
        with pytest.raises(vdq_export.errors.BundleError, match="tables is not what the graphs were made with"):
            transformer(**tiny_feeds, tables=(TABLE, 4))
        with pytest.raises(vdq_export.errors.BundleError, match="have no input 'sizes'"):
            transformer(**tiny_feeds, sizes=3)
