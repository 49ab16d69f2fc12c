"""Every recipe that ships, end to end on a tiny real transformer; recipes that extend others; experts' own tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests import tiny_model
from vdq_export import compiler, recipe_rules
from vdq_export import recipe as recipes
from vdq_export.bundle import Bundle
from vdq_export.compiler import export
from vdq_export.errors import RecipeError, StrictError
from vdq_export.graph import Array, Graph
from vdq_export.model import Model
from vdq_export.progress import Reporter
from vdq_export.runtime import load
from vdq_export.verify import verify

WANTED = {
    "static-minmax", "static-tsw", "static-asq", "static-tsq-tsw", "smoothquant", "quarot", "rtn", "svdquant",
    "svdquant-gptq", "wan22-w4a4", "wan22-mxfp4", "dvd-w4a4", "dvd-w4a6", "dvd-w4a8", "vidit-q", "q-dit", "arq-static",
    "auto", "static-w4a4", "static-fp8", "w4a16-g128", "w4a16-g64", "nvfp4", "mxfp8", "w8a16", "w4a16-rtn",
    "w8a8-dynamic", "static-asq-attention", "static-asq-attention-fp8",
}  # fmt: skip
OTHER_TARGETS = {  # tests of their own
    "wan22-mxfp4", "auto", "static-fp8", "w4a16-g128", "w4a16-g64", "nvfp4", "mxfp8", "w8a16", "w4a16-rtn",
    "w8a8-dynamic", "static-asq-attention", "static-asq-attention-fp8",
}  # fmt: skip
EIGHT_BITS = {"static-minmax", "static-tsw", "static-asq", "static-tsq-tsw", "smoothquant"}
# Network output against float, dB. Random weights: what matters is that no method breaks the signal (a wrong fold or a
# transposed rotation leaves about 0 dB); 4 bits keep 10 dB and more of it, 8 bits 25.
LEAST_DB = {True: 25.0, False: 8.0}
STATISTICS = {"ReduceMax", "ReduceMin", "TopK", "Range", "DynamicQuantizeLinear"}


@pytest.fixture(scope="module")
def record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("record") / "record.safetensors"


def made(name: Any, tiny: Model, traced: Graph, record: Path, out: Path, **choices: Any) -> Bundle:
    known: dict[str, Any] = {"calibration": record} if record.exists() else {"save_calibration": record}
    settings = {"traced": {"": traced.copy()}, "workers": 1, **known, **choices}
    return export(tiny, recipe=name, out=out, **settings)


def output_db(bundle: Bundle, reference: Any, policy: str | None = None) -> float:
    signal = noise = 0.0
    with load(bundle.path, threads=1, policy=policy) as transformer:
        for step in tiny_model.trajectory(3):
            with transformer.cache_context(step["branch"]):
                found = transformer(**step["inputs"]).sample
            exact = reference(**step["inputs"])
            signal, noise = signal + float(exact.square().sum()), noise + float((exact - found).square().sum())
    return 10 * float(np.log10(signal / max(noise, 1e-30)))


def test_all_that_were_promised_are_there() -> None:
    assert set(recipes.names()) == WANTED
    for name in WANTED:
        one = recipes.load(name)
        assert one.name == name and one.summary and one.source


@pytest.mark.parametrize("name", sorted(WANTED - OTHER_TARGETS))
def test_recipe_end_to_end(name: str, tiny: Model, traced: Graph, record: Path, tmp_path: Path) -> None:
    bundle = made(name, tiny, traced, record, tmp_path / "out")
    assert output_db(bundle, tiny) > LEAST_DB[name in EIGHT_BITS]
    for index in range(len(bundle.schedule.bins)):
        used = {node.op for node in Graph.load(bundle.graph_path(index)).nodes}
        assert not used & STATISTICS, "a static recipe computes no statistic at run time"
    weights = {id(plan): sum(x.quantized for x in plan.layers) for plan in bundle.plans}
    assert all(count == 20 for count in weights.values())


def test_verify_passes_a_recipe_of_each_kind(tiny: Model, traced: Graph, record: Path, tmp_path: Path) -> None:
    """Layers are compared behind smoothing and rotation: a mismatch of the two graphs would show in every layer."""
    for number, name in enumerate(("static-tsq-tsw", "dvd-w4a6")):
        report = verify(made(name, tiny, traced, record, tmp_path / str(number), tsw=2), tiny, clips=0)
        assert report.verdict == "pass", report.failures
        bins = {quality.bin for quality in report.layers}
        assert bins == ({0, 1} if name == "static-tsq-tsw" else {0, 1, 2, 3})


def test_own_weights_a_bin_are_told_and_stored(tiny: Model, traced: Graph, record: Path, tmp_path: Path) -> None:
    one = made("static-asq", tiny, traced, record, tmp_path / "one", tsw=3)
    own = made("static-tsq-tsw", tiny, traced, record, tmp_path / "own", tsw=3)

    def stored(bundle: Bundle) -> int:
        return sum(e.size for e in bundle.manifest.files if e.path.endswith("weights.bin"))

    assert [len(plan.bins) for plan in own.plans] == [1, 1, 1] and len(one.plans) == 1
    assert stored(own) > 1.8 * stored(one)  # float layers stay shared


class Wide(torch.nn.Module):
    """Width 64, so that blocks of 32 fit."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x * (1 + timestep[:, None, None]))))


def test_mxfp4_runs_where_its_blocks_fit_and_is_refused_where_not(
    tiny: Model, traced: Graph, record: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match="36 channels do not divide into groups of 32"):
        made("wan22-mxfp4", tiny, traced, record, tmp_path / "refused", target="reference")
    with pytest.raises(RecipeError, match=r"MXFP4.*ort-int8"):
        made("wan22-mxfp4", tiny, traced, record, tmp_path / "refused")
    torch.manual_seed(0)
    steps: Any = [
        {"t": t, "branch": "cond", "inputs": {"x": torch.randn(1, 16, 64), "timestep": torch.tensor([t])}}
        for t in (1.0, 0.7, 0.4, 0.1)
    ]
    model = Model(Wide(), steps[0]["inputs"], [steps], name="wide")
    bundle = export(model, recipe="wan22-mxfp4", target="reference", out=tmp_path / "wide", workers=1)
    with load(bundle.path, threads=1) as transformer:
        exact, found = model(**steps[1]["inputs"]), transformer(**steps[1]["inputs"])
    assert 15 < 10 * float(torch.log10(exact.square().sum() / (exact - found).square().sum())) < 45


def test_auto_needs_a_budget_on_the_command_line(tmp_path: Path) -> None:
    from vdq_export.commands.search import resolve
    from vdq_export.progress import Reporter

    with pytest.raises(RecipeError, match=r"size=4\.2bit"):
        resolve("sample:digits", {"recipe": "auto", "budget": None, "target": "ort-int8"}, Reporter())
    with pytest.raises(RecipeError, match="--save-recipe"):
        resolve("sample:digits", {"recipe": "rtn", "save_recipe": tmp_path / "r.toml", "target": "x"}, Reporter())


# -- recipes that extend others --------------------------------------------------------------------------------------


def write(folder: Path, name: str, text: str) -> str:
    (folder / f"{name}.toml").write_text(text, encoding="utf-8")
    return str(folder / f"{name}.toml")


def test_lists_of_tables_add_up_and_other_lists_replace(tmp_path: Path) -> None:
    child = recipes.load(
        write(
            tmp_path,
            "child",
            'extends = "wan22-w4a4"\nname = "child"\n[activations]\nclip = [0.5, 1.0]\n'
            '[[override]]\nmatch = "*.ffn.*"\nweights = 8\nwhy = "sensitive"\n'
            '[[keep_float]]\nmatch = "blocks.0.*"\nwhy = "first"\n',
        )
    )
    parent = recipes.load("wan22-w4a4")
    assert child.activations.clip == (0.5, 1.0)
    assert child.keep_float[:-1] == parent.keep_float and child.keep_float[-1].match == "blocks.0.*"
    assert [rule.match for rule in child.override] == ["*.ffn.*"]


def test_an_expert_adds_to_the_recipe_and_replaces_its_numbers(tmp_path: Path) -> None:
    whole = recipes.load(
        write(
            tmp_path,
            "moe",
            'extends = "wan22-w4a4"\nname = "moe"\n[[override]]\nmatch = "a"\nweights = 8\nwhy = "all"\n'
            "[expert.low]\ntsw = [0.5]\n[expert.low.weights]\nbits = 8\n"
            '[[expert.low.override]]\nmatch = "b"\nweights = 8\nwhy = "low"\n',
        )
    )
    low, high = whole.of_expert("low"), whole.of_expert("high")
    assert (low.weights.bits, low.weights.group, high.weights.bits) == (8, 32, 4)
    assert (low.tsw, high.tsw) == ((0.5,), (0.33, 0.66))
    assert [rule.match for rule in low.override] == ["a", "b"] and [rule.match for rule in high.override] == ["a"]
    broken = write(tmp_path, "broken", 'extends = "rtn"\nname = "broken"\n[expert.low]\nbitz = 3\n')
    with pytest.raises(RecipeError, match=r"expert low.*bitz"):
        recipes.load(broken).of_expert("low")


# -- experts ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Model, Bundle]:
    model = tiny_model.two_experts()
    folder = tmp_path_factory.mktemp("experts")
    one = write(
        folder, "uneven", 'extends = "static-asq"\nname = "uneven"\n[expert.low]\ntsw = 1\n[expert.high]\ntsw = 2\n'
    )
    return model, export(model, recipe=one, out=folder / "out", save_calibration=folder / "r.safetensors", workers=1)


def test_experts_have_plans_bins_and_weights_of_their_own(experts: tuple[Model, Bundle]) -> None:
    model, bundle = experts
    assert [(plan.name, [one.index for one in plan.bins]) for plan in bundle.plans] == [("high", [0, 1]), ("low", [2])]
    assert bundle.schedule.bins[1].when.t[0] == bundle.schedule.bins[2].when.t[1] == 550.0, "they meet at the boundary"
    assert bundle.manifest.model.weight_hash == model.weight_hash()
    assert (bundle.path.parent / "r.high.safetensors").is_file() and (
        bundle.path.parent / "r.low.safetensors"
    ).is_file()
    assert output_db(bundle, model) > 25.0
    report = verify(bundle, model, clips=0)
    assert report.verdict == "pass" and {quality.bin for quality in report.layers} == {0, 1, 2}


def test_a_swapped_expert_is_seen(experts: tuple[Model, Bundle]) -> None:
    """The planted fault: every call answered by the other expert's graph."""
    model, bundle = experts
    swapped: list[Array] = []
    with load(bundle.path, threads=1) as transformer:
        for t, wrong in ((800.0, 120.0), (120.0, 800.0)):
            values = tiny_model.inputs(5, t)
            exact = model(**values).numpy()
            values["timestep"] = torch.tensor([wrong])
            swapped.append(np.square(exact - transformer(**values).sample.numpy()).sum() / np.square(exact).sum())
    assert min(swapped) > 0.05, "25 dB would be 0.003"


# -- step reuse ------------------------------------------------------------------------------------------------------


def test_a_recipe_with_a_cache_carries_its_probe(tiny: Model, traced: Graph, record: Path, tmp_path: Path) -> None:
    one = write(tmp_path, "reuse", 'extends = "static-minmax"\nname = "reuse"\n[schedule]\ncache = 0.0\n')
    bundle = made(one, tiny, traced, record, tmp_path / "out")
    reuse = bundle.schedule.reuse
    assert reuse is not None and reuse.probes[0].graph == "graphs/probe.onnx" and len(reuse.probes[0].coefficients) == 5
    assert output_db(bundle, tiny, "cache=0") == output_db(bundle, tiny), "0 never reuses"
    with load(bundle.path, threads=1, policy="cache=1e9") as transformer:
        for step in tiny_model.trajectory(3):
            with transformer.cache_context(step["branch"]):
                transformer(**step["inputs"])
        assert transformer.statistics.reused_steps == len(tiny_model.TIMESTEPS) - 2, "first and last always run"


# -- what a recipe's author got wrong --------------------------------------------------------------------------------


def _file(folder: Path, text: str) -> str:
    (folder / "own.toml").write_text(f'extends = "wan22-w4a4"\nname = "own"\nsummary = "s"\n{text}', encoding="utf-8")
    return str(folder / "own.toml")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[weigths]\nbits = 8", "unknown key 'weigths'; did you mean weights or"),
        ("[weights.gptq]\nblok = 5", "unknown key 'blok' in weights.gptq; did you mean block?"),
        ("[[keep_float]]\nmatsch = 'a'\nwhy = ''", "unknown key 'matsch' in keep_float; did you mean match?"),
        ("[weights]\nrange = 'minmx'", "weights.range = 'minmx'; one of minmax, mse, pbq"),
        ("[weights]\nbits = 5", "weights.bits = 5; one of 4, 6, 8, 16"),
        ("[smoothing]\nalpha = 'serch'", "smoothing.alpha = 'serch'; one of search, a number"),
        ("[smoothing]\nalpha = 2.0", "smoothing.alpha: needs a number <= 1.0"),
        ("[expert.high.weights]\nbts = 8", "unknown key 'bts' in weights; did you mean bits?"),
    ],
)
def test_a_wrong_key_or_value_is_answered_with_the_right_ones(text: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=re.escape(said)):
        recipes.load(_file(tmp_path, text))


RULES = """
[[keep_float]]
match = "blcks.0.*"
why = "w"
[[override]]
match = "blocks.0.*"
why = "w"
weights = 8
[low_rank]
match = ["*.ffnn.*"]
"""


def test_own_patterns_that_match_no_layer_are_told(tmp_path: Path) -> None:
    """Not those that ship with it, which are for many networks."""

    class Heard(Reporter):
        def warn(self, text: str) -> None:
            heard.append(text)

    heard: list[str] = []
    names = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn1.to_q", "ffn.net.0.proj", "ffn.net.2")]
    own = recipes.load(_file(tmp_path, RULES))
    recipe_rules.check_matches(own, names, Heard())
    assert heard == [
        "recipe own: keep_float 'blcks.0.*' matches no layer; did you mean blocks.0.*?",
        "recipe own: low_rank '*.ffnn.*' matches no layer; did you mean *.ffn.*?",
    ]
    with pytest.raises(StrictError, match="keep_float 'blcks"):
        recipe_rules.check_matches(own, names, Heard(), strict=True)
    heard.clear()
    for name in recipes.names():
        recipe_rules.check_matches(recipes.load(name), ["nothing"], Heard(), strict=True)
    assert heard == []


def test_an_expert_that_the_model_has_not_is_refused(tmp_path: Path) -> None:
    own = recipes.load(_file(tmp_path, "[expert.hgh.weights]\nbits = 8"))
    with pytest.raises(RecipeError, match="moe has no expert 'hgh'; did you mean high"):
        recipe_rules.check_experts(own, "moe", ["high", "low"])
    with pytest.raises(RecipeError, match=r"leave \[expert.hgh\] out"):
        recipe_rules.check_experts(own, "tiny", [""])
    recipe_rules.check_experts(recipes.load("wan22-w4a4"), "tiny", [""])


def test_the_compiler_asks(tiny: Model, traced: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right after the trace, before anything is measured."""
    monkeypatch.setattr(compiler, "trace", lambda model, **_: traced.copy())
    with pytest.raises(StrictError, match="blcks"):
        export(tiny, recipe=_file(tmp_path, RULES), out=tmp_path / "out", strict=True)
    with pytest.raises(RecipeError, match="has no expert 'hgh'"):
        export(tiny, recipe=_file(tmp_path, "[expert.hgh]\ntsw = 2"), out=tmp_path / "out")
