"""A network of one's own with a loop of its own: the order of its arguments, its steps, its clips, its last layer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import nn

import vdq_export
from vdq_export import pipeline, recipe_rules, recorded, sources
from vdq_export import recipe as recipes
from vdq_export.bundle import Bundle
from vdq_export.calib.draft import with_names
from vdq_export.contract import PassContext
from vdq_export.errors import BundleError, ModelError
from vdq_export.graph import Graph
from vdq_export.graphs.last import last_layers
from vdq_export.manifest import Signature
from vdq_export.model import Model, Step
from vdq_export.progress import Reporter
from vdq_export.steps import checked_step
from vdq_export.trace import trace


class Guided(nn.Module):
    """Two inputs of one number each; `mask` may be left out."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(8, 32), nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(
        self, x: torch.Tensor, timestep: torch.Tensor, mask: Any = None, guidance: torch.Tensor | None = None
    ) -> torch.Tensor:
        assert guidance is not None and mask is None
        hidden = torch.nn.functional.silu(self.first(x) * (1 + timestep / 1000) + guidance)
        made: torch.Tensor = self.last(hidden + self.middle(hidden))
        return made


def step(t: float, **changed: Any) -> Step:
    x = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(int(t)))
    inputs = {"guidance": torch.tensor([0.5]), "x": x, "timestep": torch.tensor([t]), **changed}
    return {"t": t, "branch": "cond", "inputs": inputs}


def guided(steps: Any = None, **settings: Any) -> Model:
    torch.manual_seed(0)
    trajectories = [[step(t) for t in (900.0, 500.0, 100.0)]] if steps is None else steps
    return Model(Guided(), step(500.0)["inputs"], trajectories, name="guided", **settings)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("own") / "bundle"
    vdq_export.export(guided(), target="ort-int8", tsw=1, recipe="static-minmax", out=out, page=False)
    return out


def test_positional_arguments_are_those_of_forward(bundle: Path) -> None:
    """The example names guidance first; forward() has it last, behind an argument that no graph has."""
    call = step(100.0)["inputs"]
    with vdq_export.load(bundle) as network:
        named = network(**call)
        assert torch.equal(network(call["x"], call["timestep"], None, call["guidance"]), named)
        with pytest.raises(BundleError, match="'x' was given twice"):
            network(call["x"], **call)
        with pytest.raises(BundleError, match="with 5 inputs, the module takes x, timestep, mask, guidance"):
            network(*call.values(), None, None)


@pytest.mark.parametrize(
    ("forward", "expected"),
    [
        (lambda x, timestep, mask, guidance: 0, ("x", "timestep", "mask", "guidance")),
        (lambda guidance, x, timestep, mask: 0, ()),
        (lambda **anything: 0, ()),
        (lambda x, **others: 0, ("x", "guidance", "timestep")),
    ],
)
def test_order_of_arguments(forward: Callable[..., Any], expected: tuple[str, ...]) -> None:
    from tests.tiny_bundle import graph
    from vdq_export.bundle_writer import signature_of

    model = guided()
    model.module.forward = forward  # type: ignore[method-assign]
    proto, _ = graph(1.0)
    for value, name in zip(proto.graph.input, ("guidance", "x", "timestep"), strict=True):
        value.name = name
    signature: Signature = signature_of(proto, "timestep", arguments=model.arguments())
    assert signature.positional == expected


def spoiled(**changed: Any) -> Any:
    return {**step(100.0), **changed}


WRONG: dict[str, tuple[Any, str]] = {
    "flat": ([step(100.0)], r"trajectory 0 is a step, not a list of steps; .* wrap it in \[ \]"),
    "nested": ([[[step(100.0)]]], "trajectory 0, step 0 is a list, not a step"),
    "no branch": ([[{"t": 1.0, "inputs": {}}]], "step 0 has no 'branch'"),
    "branch": ([[step(900.0), spoiled(branch="negative")]], "step 1: branch is 'negative'; say \"cond\""),
    "None": ([[spoiled(inputs={**step(100.0)["inputs"], "mask": None})]], "input 'mask' is NoneType, .* leave it out"),
    "bool": ([[spoiled(inputs={**step(100.0)["inputs"], "return_dict": False})]], "input 'return_dict' is bool"),
    "t of two": ([[spoiled(t=torch.zeros(2))]], r"t is a tensor of \[2\], not a number"),
    "other t": (
        [[step(900.0), spoiled(t=0.1)]],
        "step 1: t is 0.1, the input 'timestep' holds 100; t is",
    ),
    "no timestep": ([[spoiled(inputs={"x": torch.zeros(1)})]], "step 0 has no input 'timestep'; it has x"),
    "shape": (
        [[step(1.0, x=torch.zeros(2, 6, 8))]],
        r"'x' is float32 \[2, 6, 8\], the example's is float32 \[1, 6, 8\]",
    ),
    "dtype": (
        [[step(1.0, timestep=torch.tensor([1]))]],
        r"'timestep' is int64 \[1\], the example's is float32 \[1\]; ",
    ),
    "a number": (3, "trajectories of guided are of type int"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_step_is_told_when_it_is_read(name: str) -> None:
    trajectories, message = WRONG[name]
    with pytest.raises(ModelError, match=message):
        list(guided(trajectories).iter_trajectories())
    with pytest.raises(ModelError, match=message):
        list(guided(lambda: trajectories).iter_trajectories())


def test_an_export_of_steps_of_another_t_ends_before_calibration(tmp_path: Path) -> None:
    """t = 1000 times what the network gets made bins that no call of the network ever falls into."""
    model = guided([[spoiled(t=100_000.0)]])
    with pytest.raises(ModelError, match="t is 100000, the input 'timestep' holds 100"):
        vdq_export.export(model, target="ort-int8", tsw=1, recipe="static-minmax", out=tmp_path / "out")


@pytest.mark.parametrize("t", [torch.tensor(100.0), torch.tensor([100.0]), np.float32(100.0), 100, 100.04])
def test_t_may_be_any_number(t: Any) -> None:
    ((made,),) = guided([[spoiled(t=t)]]).iter_trajectories()
    assert type(made["t"]) is float and made["t"] == pytest.approx(100.0, abs=0.05)


def test_t_of_a_timestep_a_token_is_the_highest() -> None:
    inputs = {"timestep": torch.tensor([[0.0, 100.0, 100.0]])}
    made = checked_step(spoiled(inputs=inputs), "here", "timestep")
    assert made["t"] == 100.0


def test_trajectories_are_read_again() -> None:
    with pytest.raises(ModelError, match="trajectories of guided can be read only once; give a list, or the function"):
        guided(iter([[step(100.0)]]))
    assert len(list(guided(lambda: iter([[step(100.0)]])).iter_trajectories())) == 1


def test_bfloat16_examples_are_refused_and_steps_cast() -> None:
    half = {**step(100.0)["inputs"], "x": torch.ones(1, 6, 8, dtype=torch.bfloat16)}
    with pytest.raises(ModelError, match=r"example input 'x' is bfloat16; .*\.float\(\)"):
        Model(Guided(), half, [])
    ((made,),) = guided([[spoiled(inputs=half)]]).iter_trajectories()
    assert made["inputs"]["x"].dtype == torch.float32


@pytest.mark.parametrize("name", ["branch", "None", "bool", "t of two", "no branch"])
def test_only_steps_are_saved(name: str, tmp_path: Path) -> None:
    """Hours of recording were refused when they were read."""
    trajectories, message = WRONG[name]
    with pytest.raises(ModelError, match=f"one.safetensors, .*{message}"):
        recorded.save(trajectories[0], tmp_path / "one.safetensors")
    with pytest.raises(ModelError, match=r"one.safetensors, step 0 is a list, not a step; a trajectory is one list"):
        recorded.save(trajectories, tmp_path / "one.safetensors")
    assert not list(tmp_path.iterdir())


def test_saved_steps_come_back(tmp_path: Path) -> None:
    half = spoiled(t=torch.tensor(100.0), inputs={**step(100.0)["inputs"], "x": torch.ones(1, dtype=torch.bfloat16)})
    recorded.save([half], tmp_path / "one.safetensors")
    (made,) = recorded.read(tmp_path / "one.safetensors")
    assert made["t"] == 100.0 and made["inputs"]["x"].dtype == torch.float32


class Loop:
    """Shows one call, and makes `clip`."""

    steps = 1

    def __init__(self, clip: Any, shown: Any = None) -> None:
        self.clip, self.shown = clip, shown

    def generate(self, denoiser: Any, case: int, observer: Any = None) -> Any:
        if observer is not None and self.shown is not None:
            observer(self.shown)
        return self.clip

    def describe(self, case: int) -> str:
        return str(case)

    def settings(self) -> dict[str, Any]:
        return {}


FLAT = np.zeros((1, 2, 4, 4), np.float32)


@pytest.mark.parametrize(
    ("clip", "message"),
    [
        (np.full((3, 2, 4, 4), 200, np.uint8), r"a clip of uint8\[3, 2, 4, 4\]; .* divide by 255"),
        (FLAT + 1.5, "clip 7 with values from 1.5 to 1.5; "),
        (FLAT - 0.5, r"with values from -0.5 to -0.5; .*\.clip\(0, 1\)"),
        (FLAT * np.nan, "with values from nan to nan"),
        (FLAT[0], r"a clip of float32\[2, 4, 4\]"),
    ],
)
def test_a_clip_is_of_floats_from_0_to_1(clip: Any, message: str) -> None:
    """Bytes wrapped round in their difference, and verify blamed a layer."""
    with pytest.raises(ModelError, match=message):
        guided(sampler=Loop(clip)).clip(lambda: None, 7)


def test_a_clip_may_miss_its_range_by_rounding() -> None:
    model = guided(sampler=Loop(torch.from_numpy(FLAT + 1.0005)))
    assert model.clip(lambda: None, 0).max() > 1


def test_a_sampler_shows_the_t_that_the_network_gets() -> None:
    seen: list[Step] = []
    model = guided(sampler=Loop(FLAT, step(100.0)))
    model.clip(lambda: None, 0, seen.append)
    assert [one["t"] for one in seen] == [100.0]
    for observer in (None, seen.append):
        with pytest.raises(ModelError, match=r"clip 4, call 0: t is 0\.1, the input 'timestep' holds 100"):
            guided(sampler=Loop(FLAT, spoiled(t=0.1))).clip(lambda: None, 4, observer)


def test_the_last_layer_is_kept_in_float_whatever_it_is_called(bundle: Path) -> None:
    (plan,) = Bundle.open(bundle).plans
    assert {one.name: one.keep_float for one in plan.layers} == {
        "first": "", "middle": "", "last": "last layer: its error is the output's (recipe: last)",
    }  # fmt: skip


class Ends(nn.Module):
    """Two linears; `end` makes the output of them and of the input."""

    def __init__(self, end: Callable[..., torch.Tensor], convolved: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.end = nn.Linear(8, 8), nn.Linear(8, 8), end
        self.conv = nn.Conv1d(6, 6, 3, padding=1) if convolved else None

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        made = self.end(x * timestep, self.a, self.b)
        return made if self.conv is None else self.conv(made)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        (Ends(lambda x, a, b: b(a(x)).transpose(1, 2) * 2), ("b",)),
        (Ends(lambda x, a, b: (lambda y: y + b(y).relu())(a(x))), ("b",)),
        (Ends(lambda x, a, b: torch.cat([a(x), b(x)])), ("a", "b")),
        (Ends(lambda x, a, b: a(x).softmax(-1) @ b(x).transpose(1, 2)), ("a", "b")),
        (Ends(lambda x, a, b: b(a(x)), convolved=True), ()),
    ],
    ids=["chain", "sum", "two outputs", "attention", "convolution"],
)
def test_last_layers(network: nn.Module, expected: tuple[str, ...]) -> None:
    graph = trace(Model(network.eval(), {"x": torch.randn(1, 6, 8), "timestep": torch.ones(1)}, []))
    pipeline.run_passes(graph, pipeline.canonical("ort-int8"), PassContext())
    assert last_layers(graph) == expected


def test_a_recipe_of_a_network_whose_last_layer_it_names_stays_as_it_is(traced: Graph) -> None:
    """Plans of networks with a proj_out are what they were."""
    tiny_graph = traced.copy()
    pipeline.run_passes(tiny_graph, pipeline.canonical("ort-int8"), PassContext())
    recipe = recipes.load("static-minmax")
    found = with_names(recipe, tiny_graph)
    assert [rule.match for rule in found.keep_float] == ["condition_embedder.*", "patch_embedding", "proj_out"]
    bare = msgspec.structs.replace(recipe, keep_float=recipe.keep_float[-1:])
    assert [rule.match for rule in with_names(bare, tiny_graph).keep_float] == ["proj_out"]


def test_a_bundle_is_told_in_one_line(bundle: Path) -> None:
    """A notebook showed every scale: more than 100 000 characters."""
    told = repr(Bundle.open(bundle))
    assert told.startswith(f"<Bundle {bundle}: guided for ort-int8, 1 bins, 0.") and len(told) < 200


def test_a_bundle_is_no_model(bundle: Path) -> None:
    with pytest.raises(ModelError, match=r"is a bundle, not a model; vdq-export verify"):
        sources.resolve(str(bundle))


@pytest.mark.parametrize(("name", "why"), [("exit", "SystemExit; call it"), ("_getframe", "is not|returned frame")])
def test_a_factory_that_leaves_is_told(name: str, why: str) -> None:
    """The command ended with exit code 0 and no word."""
    with pytest.raises(ModelError, match=f"sys:{name}.*({why})"):
        sources.resolve(f"sys:{name}")


def test_a_rule_for_the_last_layer_is_no_misspelt_name() -> None:
    recipe = recipes.Recipe(name="own", summary="", keep_float=(recipes.Keep(match=recipes.LAST, why="test"),))
    recipe_rules.check_matches(recipe, ["a", "b"], Reporter(), strict=True)


@pytest.mark.parametrize("name", ["generate", "describe", "settings"])
def test_a_sampler_that_lacks_a_method_is_told_at_once(name: str) -> None:
    sampler = Loop(FLAT)
    setattr(sampler, name, None)
    with pytest.raises(ModelError, match=rf"the sampler of guided has no {name}\(\)"):
        guided(sampler=sampler)


def test_a_sampler_that_shows_nothing_is_told_at_once() -> None:
    sampler = Loop(FLAT)
    sampler.generate = lambda denoiser, case: FLAT  # type: ignore[method-assign]
    with pytest.raises(ModelError, match=r"cannot be called so: too many .*generate\(denoiser, case, observer\)"):
        guided(sampler=sampler)


def test_example_inputs_have_names() -> None:
    with pytest.raises(ModelError, match="the example inputs are a tuple; name them"):
        Model(Guided(), (torch.zeros(1),), [])  # type: ignore[arg-type]
