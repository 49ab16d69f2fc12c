"""The registry of families: published sizes, how each network is called, and the printed support matrix."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import diffusers.models.transformers as transformers
import pytest
import torch
from click.testing import CliRunner

from tests.families import FAMILIES as TINY
from tests.families import network, tiny_of
from vdq_export.cli import cli
from vdq_export.model import first_tensor
from vdq_export.sources import families as registered
from vdq_export.sources import registry
from vdq_export.sources.registry import Family, Published

PUBLISHED = [(family, one) for family in registry.FAMILIES for one in family.published]


def without_data(family: Family, settings: dict[str, Any]) -> torch.nn.Module:
    with torch.device("meta"):
        made: torch.nn.Module = family.network_class()(**settings)
    return made


@pytest.mark.parametrize(("family", "one"), PUBLISHED, ids=lambda value: getattr(value, "name", None))
def test_published_configurations_have_the_published_size(family: Family, one: Published) -> None:
    network = without_data(family, dict(one.settings))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    assert parameters == pytest.approx(one.parameters, abs=0.5e6)  # published to a million
    assert sum(isinstance(module, torch.nn.Linear) for module in network.modules()) == one.linears


def test_a_wrong_configuration_is_seen() -> None:
    family, one = PUBLISHED[0]
    network = without_data(family, {**one.settings, "num_layers": 29})
    assert sum(p.numel() for p in network.parameters()) != pytest.approx(one.parameters, abs=0.5e6)


@pytest.mark.parametrize("name", TINY)
def test_every_family_is_called_as_its_network_wants(name: str) -> None:
    """The network of the tiny configuration, called with what its configuration says, predicts what it was given."""
    family, tiny = tiny_of(name)
    made: Any = network(family, tiny)
    if family.prepare is not None:
        family.prepare(made)
    size = family.size(tiny.video, tiny.tokens)
    inputs, fixed = registry.example_inputs(family, made.config, (size.t, size.h, size.w), tiny.tokens)
    with torch.no_grad():
        output = first_tensor(made(**inputs, **fixed))
    assert torch.isfinite(output).all()
    shape = list(inputs["hidden_states"].shape)
    if family.also is not None:
        further = list(family.also(made.config, size).values())
        assert output.shape == (1, prod(shape) + sum(prod(one) for one in further))
    elif family.hidden_states is None:
        shape[family.channel_axis] = made.config.get("out_channels") or shape[family.channel_axis]
        assert list(output.shape) == shape


MASKED = [name for name in TINY if tiny_of(name)[0].prepare is not None]


@pytest.mark.parametrize("name", MASKED)
def test_prepared_networks_predict_what_diffusers_does(name: str) -> None:
    """For prompts of every length: what decides shapes in diffusers' forward is data of ours."""
    family, tiny = tiny_of(name)
    theirs, ours = network(family, tiny), network(family, tiny)
    assert family.prepare is not None
    family.prepare(ours)
    config: Any = theirs.config
    size = family.size(tiny.video, tiny.tokens)
    for kept in (8, 5, 1):
        inputs, fixed = registry.example_inputs(family, config, (size.t, size.h, size.w), tiny.tokens)
        for mask in (tensor for key, tensor in inputs.items() if "mask" in key):
            mask[:, kept:] = 0
        repeated = {argument: inputs[other] for argument, other in family.repeats.items()}
        with torch.no_grad():
            expected = theirs(**inputs, **fixed, **repeated, return_dict=False)
            actual = first_tensor(ours(**inputs, **fixed))
        whole = torch.cat([one.flatten(1) for one in expected], dim=1)
        torch.testing.assert_close(actual.flatten(1), whole, atol=2e-6, rtol=1e-5)


def test_a_family_is_one_file() -> None:
    """Found by listing, each with what a newcomer must say; no class twice."""
    folder = Path(registered.__path__[0])
    files = [path for path in folder.glob("*.py") if not path.name.startswith("_")]
    assert len(files) == len(registry.FAMILIES) == len({one.class_name for one in registry.FAMILIES})
    assert [one.name for one in registry.FAMILIES if not one.tiny or not (one.pipelines or one.network)] == []


def test_a_class_without_a_file_goes_by_its_signature() -> None:
    chrono_edit = registry.of("ChronoEditTransformer3DModel")
    size = chrono_edit.size((5, 64, 64), 8)
    assert chrono_edit.inputs({"text_dim": 32}, size) == registered.text({"text_dim": 32}, size)
    assert registry.of("WanTransformer3DModel") is registry.find("WanTransformer3DModel")


def test_latent_size() -> None:
    wan = registry.find("WanTransformer3DModel")
    assert wan is not None
    assert wan.latent_size(*wan.video) == (21, 60, 104)


def test_the_matrix_has_every_class_of_the_release_once() -> None:
    result = CliRunner().invoke(cli, ["families", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)
    ours = {one.class_name for one in registry.FAMILIES if one.network is not None}
    listed = [row["class_name"] for row in rows if row["class_name"] not in ours]
    assert ours == {"STDiT"} == {row["class_name"] for row in rows} - set(listed)
    source = "".join(p.read_text(encoding="utf-8") for p in Path(transformers.__path__[0]).glob("*.py"))
    assert sorted(listed) == sorted(name for name in registry.classes() if f"class {name}(" in source)
    assert len(listed) == source.count("Transformer3DModel(\n") + source.count("Transformer3DModel(ModelMixin")
    assert len({row["name"] for row in rows}) == len(rows)
    by_class = {row["class_name"]: row for row in rows}
    assert by_class["WanTransformer3DModel"]["support"] == "registered"
    assert "Wan2.1-T2V-1.3B" in by_class["WanTransformer3DModel"]["published"]
    assert by_class["ChronoEditTransformer3DModel"]["support"] == "generic"
    assert by_class["ChronoEditTransformer3DModel"]["tried"]
    assert by_class["AnyFlowFARTransformer3DModel"]["support"] == "unsupported"
    assert "kv_cache" in by_class["AnyFlowFARTransformer3DModel"]["detail"]


def test_the_matrix_is_printed() -> None:
    result = CliRunner().invoke(cli, ["families"])
    assert result.exit_code == 0
    assert all(word in result.output for word in ("HunyuanVideo", "registered", "generic", "unsupported"))
