"""What `vdq-export families` calls exported in the tests is: those that no pipeline here calls are exported below."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests import pipeline_cases, pipeline_cases_joint, test_family_generic, test_pipelines
from tests.families import FAMILIES, OTHERS, tiny_of
from tests.pipelines import sensible
from vdq_export import export, load
from vdq_export.metrics import sqnr_db
from vdq_export.sources import registry
from vdq_export.verify import count_kernels

IN_PIPELINES = {pipeline_cases.CASES[name].tiny for name in test_pipelines.SHOWN}
IN_PIPELINES |= {case.tiny for case in pipeline_cases_joint.CASES.values()}
ALONE = [name for name in FAMILIES if name not in IN_PIPELINES]


@pytest.mark.parametrize("name", ALONE)
def test_a_network_without_a_pipeline_exports_in_eight_bits(name: str, tmp_path: Path) -> None:
    """export() itself refuses a graph further than 1e-4 from torch."""
    model = FAMILIES[name]()
    sensible(model.module)
    bundle = export(model, target="ort-int8", tsw=1, out=tmp_path / "bundle")
    kernels, floating = count_kernels(bundle)
    assert kernels.planned == kernels.executed > 10
    assert floating == []
    steps = [step["inputs"] for step in next(iter(model.iter_trajectories()))[:4]]
    with load(bundle.path) as transformer:
        found = np.stack([transformer(**inputs, return_dict=False)[0].numpy() for inputs in steps])
    assert sqnr_db(np.stack([model(**inputs).numpy() for inputs in steps]), found) >= 30


def test_every_family_said_to_be_exported_is() -> None:
    exported = {tiny_of(name)[0].class_name for name in IN_PIPELINES | {*ALONE}}
    exported |= {class_name for class_name in registry.classes() if registry.of(class_name).name in OTHERS}
    assert test_family_generic.OTHERS is OTHERS
    assert {one.class_name for one in registry.support() if one.tried} == exported
