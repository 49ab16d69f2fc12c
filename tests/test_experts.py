"""Models of several networks: who serves a timestep, what each network is given, and what is refused."""

from __future__ import annotations

import pytest
import torch

from tests import tiny_model
from tests.tiny_model import TIMESTEPS
from vdq_export import sources
from vdq_export.errors import ModelError, TraceError
from vdq_export.experts import Expert, Experts
from vdq_export.model import Model, Step
from vdq_export.trace import trace


class Constant(torch.nn.Module):
    """Puts out its one weight; called like a transformer."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = torch.nn.Parameter(torch.tensor(value))

    def forward(self, hidden_states: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.value.expand_as(hidden_states)


def expert(name: str, lo: float, hi: float, value: float = 0.0) -> Expert:
    return Expert(name, Constant(value), (lo, hi))


def step(t: float) -> Step:
    return {"t": t, "branch": "cond", "inputs": {"hidden_states": torch.zeros(1), "timestep": torch.tensor([t])}}


def model(experts: Experts, *timesteps: float) -> Model:
    """`experts` with one trajectory a group of timesteps that fall."""
    return Model(experts, step(0.0)["inputs"], [[step(t) for t in timesteps]], name="two")


THREE = [expert("low", 0, 300, 1.0), expert("high", 700, 1000, 3.0), expert("middle", 300, 700, 2.0)]


@pytest.mark.parametrize(
    ("t", "value"), [(0.0, 1.0), (299.99, 1.0), (300.0, 2.0), (699.99, 2.0), (700.0, 3.0), (1000.0, 3.0)]
)
def test_ranges_are_half_open_and_the_top_is_inclusive(t: float, value: float) -> None:
    together = Experts(THREE)
    assert [one.name for one in together.experts] == ["high", "middle", "low"], "as denoising goes"
    latent, timestep = torch.zeros(1, 2), torch.tensor([t])
    assert together(hidden_states=latent, timestep=timestep).unique().tolist() == [value]
    assert together(latent, timestep).unique().tolist() == [value], "by position, too"
    assert model(together, t)(hidden_states=latent, timestep=timestep).unique().tolist() == [value]


def test_a_call_is_one_experts() -> None:
    together, latent = Experts(THREE), torch.zeros(2, 2)
    assert together(latent, torch.tensor([[800.0, 900.0]])).unique().tolist() == [3.0]
    assert together(latent, torch.tensor([[0.0, 900.0], [900.0, 0.0]])).unique().tolist() == [3.0], "clean tokens"
    with pytest.raises(ModelError, match="timesteps 800, 200 in one call are of experts high and low"):
        together(latent, torch.tensor([200.0, 800.0]))
    with pytest.raises(ModelError, match="called without 'timestep'"):
        together(latent)


def test_a_timestep_that_is_no_experts_names_the_ranges() -> None:
    gap = Experts([expert("low", 0, 300), expert("high", 700, 1000)])
    told = r"no expert serves t = 500 \(high \[700, 1000\], low \[0, 300\)\)"
    with pytest.raises(ModelError, match=told):
        gap(torch.zeros(1), torch.tensor([500.0]))
    with pytest.raises(ModelError, match=f"two, trajectory 0: {told}"):
        list(model(gap, 800.0, 500.0, 200.0).networks()[0][1].iter_trajectories())
    assert len(model(gap, 800.0, 200.0).networks()) == 2, "a gap no step falls into does no harm"
    for outside in (-1.0, 1000.5, float("nan")):
        with pytest.raises(ModelError, match="no expert serves"):
            gap.serving(outside)


@pytest.mark.parametrize(
    ("experts", "told"),
    [
        ([], "has none"),
        ([expert("a", 0, 500), expert("a", 500, 1000)], "two experts are called a"),
        ([expert("a", 0, 600), expert("b", 500, 1000)], "experts b and a both serve t = 500"),
        ([expert("a", 0, 1000), expert("b", 200, 300)], "both serve t = 200"),
        ([expert("half", 0, 600)], "half"),
    ],
)
def test_experts_that_contradict_each_other(experts: list[Expert], told: str) -> None:
    with pytest.raises(ModelError, match=told):
        Experts(experts)


@pytest.mark.parametrize("name", ["", "a.b", "a/b", "High", "1"])
def test_names_that_cannot_be_file_names(name: str) -> None:
    with pytest.raises(ModelError, match="cannot be called"):
        expert(name, 0, 1)


@pytest.mark.parametrize("t", [(5.0, 5.0), (5.0, 4.0), (float("nan"), 1.0), (0.0, float("inf"))])
def test_ranges_that_hold_nothing(t: tuple[float, float]) -> None:
    with pytest.raises(ModelError, match="expert a holds no timestep"):
        expert("a", *t)


def test_the_timestep_input_is_the_models() -> None:
    with pytest.raises(ModelError, match=r"'sigma'.*'timestep'"):
        model(Experts(THREE, "sigma"), 1.0)


def test_limits_are_where_another_expert_serves() -> None:
    made = model(Experts(THREE), 800.0)
    assert {name: made.limits(name) for name, _ in made.networks()} == {
        "high": (700, None),
        "middle": (300, 700),
        "low": (None, 300),
    }
    with pytest.raises(ModelError, match="no expert 'top'"):
        made.limits("top")
    assert tiny_model.build().limits("") == (None, None)


def test_networks_share_the_steps_out() -> None:
    made = tiny_model.two_experts()
    parts = dict(made.networks())
    assert list(parts) == ["high", "low"]
    for name, part in parts.items():
        assert part.name == f"{made.name}/{name}" and part.experts == ()
        assert part.sampler is None and part.judge is None
        for whole, mine in zip(made.iter_trajectories(), part.iter_trajectories(), strict=True):
            assert [id(s) for s in mine] == [id(s) for s in whole if (s["t"] >= 550) == (name == "high")]
        for one in next(iter(part.iter_trajectories())):
            assert torch.equal(part(**one["inputs"]), made(**one["inputs"]))
    assert [s["t"] for s in next(iter(parts["high"].iter_trajectories()))] == [t for t in TIMESTEPS[:3] for _ in "cu"]
    assert not torch.equal(parts["high"](**made.example_inputs), parts["low"](**made.example_inputs))


def test_trajectories_are_read_when_asked_for_and_again() -> None:
    reads = []

    def record() -> list[list[Step]]:
        reads.append(1)
        return [[step(900.0), step(100.0)], [step(800.0)]]

    made = Model(Experts([expert("low", 0, 500), expert("high", 500, 1000)]), step(0.0)["inputs"], record)
    parts = dict(made.networks())
    assert reads == []
    for _ in range(2):
        assert [[s["t"] for s in t] for t in parts["high"].iter_trajectories()] == [[900.0], [800.0]]
        assert [[s["t"] for s in t] for t in parts["low"].iter_trajectories()] == [[100.0]]
    assert len(reads) == 4


def test_an_expert_without_steps_is_refused() -> None:
    parts = dict(model(Experts(THREE), 900.0, 100.0).networks())
    with pytest.raises(ModelError, match="no step of two's trajectories is expert middle's"):
        list(parts["middle"].iter_trajectories())


def test_one_network_is_itself() -> None:
    made = tiny_model.build()
    assert made.experts == () and made.networks() == [("", made)]


def test_the_hash_covers_every_weight_and_range() -> None:
    def hash_of(high: float, low: float, boundary: float) -> str:
        parts = [expert("high", boundary, 1000, high), expert("low", 0, boundary, low)]
        return model(Experts(parts), 900.0, 100.0).weight_hash()

    first = hash_of(1.0, 2.0, 500)
    assert first == hash_of(1.0, 2.0, 500)
    others = [hash_of(1.5, 2.0, 500), hash_of(1.0, 2.5, 500), hash_of(2.0, 1.0, 500), hash_of(1.0, 2.0, 501)]
    assert len({first, *others}) == 5  # the third swaps the two networks


def test_a_nan_names_its_expert() -> None:
    with pytest.raises(ModelError, match=r"weight networks\.high\.value of two holds NaN"):
        model(Experts([expert("low", 0, 500), expert("high", 500, 1000, float("nan"))]), 1.0)


def test_factories_may_return_experts() -> None:
    made = sources.resolve("tests.tiny_model:two_experts")
    assert [name for name, _ in made.networks()] == ["high", "low"]
    assert made.networks()[1][1].name == "tests.tiny_model:two_experts/low", "the argument is the model's name"


def test_several_networks_are_no_one_graph() -> None:
    with pytest.raises(TraceError, match="tiny-experts is 2 networks"):
        trace(tiny_model.two_experts())
