"""Video transformers beyond the published families: each class of diffusers that can be exported is, or says why not.

Tiny configurations with random weights of the size that trained ones have.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.families import OTHER_CLASSES, OTHERS, build, network
from tests.pipelines import sensible
from vdq_export import export, load, sources
from vdq_export.errors import ModelError
from vdq_export.metrics import sqnr_db
from vdq_export.model import Model, first_tensor
from vdq_export.sources import registry
from vdq_export.sources.families import _generic
from vdq_export.verify import count_kernels

MIN_DB = 30.0
MASKED = ("JoyImage-Edit Plus", "MotifVideo", "SanaVideo")


def model(name: str) -> Model:
    made = OTHERS[name]()
    sensible(made.module)
    return made


@pytest.mark.parametrize("name", OTHERS)
def test_every_class_exports_in_eight_bits(name: str, tmp_path: Path) -> None:
    """export() itself refuses a graph further than 1e-4 from torch; the calls compared are not those calibrated on."""
    whole = model(name)
    bundle = export(whole, target="ort-int8", tsw=2, recipe="static-minmax", out=tmp_path / "bundle")
    kernels, _ = count_kernels(bundle)
    assert 0 < kernels.planned == kernels.executed
    fresh = torch.Generator().manual_seed(99)
    expected, found = [], []
    with load(bundle.path) as transformer:
        for step in next(iter(whole.iter_trajectories()))[:4]:
            noise = torch.randn(step["inputs"]["hidden_states"].shape, generator=fresh)
            call = {**step["inputs"], "hidden_states": noise}
            expected.append(whole(**call).numpy())
            found.append(np.asarray(first_tensor(transformer(**call))))
    db = sqnr_db(np.stack(expected), np.stack(found))
    assert db >= MIN_DB, db


def test_every_class_of_the_release_is_listed_with_what_is_known() -> None:
    """Nothing is left as untried: a file, a tiny configuration by signature, or a reason."""
    rows = {one.class_name: one for one in registry.support()}
    assert set(registry.classes()) <= set(rows)
    assert [name for name, row in rows.items() if not row.tried and row.support != "unsupported"] == []
    assert {name for name, row in rows.items() if row.support == "unsupported"} == set(_generic.REFUSED)
    assert {name for name, row in rows.items() if row.support == "generic"} == set(_generic.TRIED)
    assert all(len(row.detail) > 40 for row in rows.values() if row.support == "unsupported")


def test_reasons_hold() -> None:
    """What is said of a refused class is so: its forward has the arguments that the reason names."""
    found = registry.classes()
    assert set(_generic.REFUSED) <= set(found)
    for name, reason in _generic.REFUSED.items():
        if "kv_cache" in reason:
            assert "kv_cache" in inspect.signature(found[name].forward).parameters
        source = inspect.getsource(inspect.getmodule(found[name]))  # type: ignore[arg-type]
        assert all(word in source for word in ("flex_attention", "BlockMask") if word in reason)
        assert ".bfloat16()" in source or "bfloat16" not in reason


@pytest.mark.parametrize("name", sorted(_generic.TRIED))
def test_what_the_signature_says_is_all_that_is_asked_for(name: str) -> None:
    family = registry.generic(name)
    (tiny,) = family.tiny
    config = {**_defaults(name), **tiny.settings}
    taken = inspect.signature(registry.classes()[name].forward).parameters
    given = {"hidden_states", "timestep", *family.inputs(config, family.size(tiny.video, tiny.tokens))}
    assert given <= set(taken)
    assert {p.name for p in list(taken.values())[1:] if p.default is p.empty} <= given


@pytest.mark.parametrize(
    "name", ["WanTransformer3DModel", "LTXVideoTransformer3DModel", "SkyReelsV2Transformer3DModel"]
)
def test_the_signature_says_what_a_file_says(name: str) -> None:
    """Of classes that need no more, the generic rules find the inputs that were written down."""
    family = registry.of(name)
    tiny = family.tiny[0]
    config, size = {**_defaults(name), **tiny.settings}, family.size(tiny.video, tiny.tokens)
    assert registry.generic(name).inputs(config, size) == family.inputs(config, size)


@pytest.mark.parametrize("name", MASKED)
def test_masks_are_inputs_and_matter(name: str) -> None:
    whole = OTHERS[name]()
    (key,) = [one for one in whole.example_inputs if "mask" in one]
    seen = {**whole.example_inputs, key: torch.ones_like(whole.example_inputs[key])}
    assert not torch.allclose(whole(**seen), whole(**whole.example_inputs))


def test_other_classes_are_all_there_are() -> None:
    files = {one.class_name for one in registry.FAMILIES}
    assert set(registry.classes()) == (files & set(registry.classes())) | set(_generic.TRIED) | set(_generic.REFUSED)
    assert set(_generic.TRIED) <= OTHER_CLASSES


@pytest.mark.parametrize("class_name", sorted(OTHER_CLASSES))
def test_pipeline_folders_of_every_class_are_read(class_name: str, tmp_path: Path) -> None:
    """Two steps from noise, both branches; what only a pipeline knows must be recorded there."""
    family = registry.of(class_name)
    tiny = family.tiny[0]
    network(family, tiny).save_pretrained(tmp_path / "transformer")
    scheduler = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
    index = {"transformer": ["diffusers", class_name], "scheduler": ["diffusers", scheduler["_class_name"]]}
    for file, held in (("scheduler/scheduler_config.json", scheduler), ("model_index.json", index)):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps(held))
    frames, height, width = tiny.video
    spec = f"{tmp_path}?frames={frames}&height={height}&width={width}&steps=2"
    if class_name == "AnyFlowTransformer3DModel":
        with pytest.raises(ModelError, match="'r_timestep', which changes along the steps"):
            sources.resolve(spec)
        return
    made = sources.resolve(spec)
    steps = next(iter(made.iter_trajectories()))
    assert len(steps) == 2 * (2 if family.guidance > 1 else 1)
    config = {**_defaults(class_name), **tiny.settings}
    assert set(made.prompt_inputs or ()) == set(family.inputs(config, family.size(tiny.video)))
    assert all(torch.isfinite(tensor.float()).all() for step in steps for tensor in step["inputs"].values())


def test_the_documented_family_is_complete() -> None:
    text = (Path(__file__).parents[1] / "docs/extend/add-a-family.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    held: dict[str, Any] = {}
    exec(compile(code, "add-a-family.md", "exec"), held)
    family = held["FAMILY"]
    whole = build(family, family.tiny[0])
    assert torch.isfinite(whole(**whole.example_inputs)).all()


def _defaults(name: str) -> dict[str, object]:
    parameters = inspect.signature(registry.classes()[name]).parameters.values()
    return {one.name: one.default for one in parameters if one.default is not one.empty}
