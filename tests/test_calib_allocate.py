"""Bits per layer: the best allocation there is, by comparison with every allocation there is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp

from vdq_export.calib import allocate, knapsack, knapsack_search
from vdq_export.calib.allocate import Allocation, bit_operations, block_of, stored_bits
from vdq_export.calib.formats import WeightFormat
from vdq_export.calib.knapsack import Choice, Item
from vdq_export.calib.sensitivity import Candidate, LayerErrors, Table
from vdq_export.errors import RecipeError
from vdq_export.recipe import AllocateRecipe, Override, Recipe

EXACT = 1e-12  # sums of a few float64 numbers of size 1 in another order


def items(seed: int, count: int, keys: int = 2) -> list[Item]:
    """Random costs and errors that fall with bits; up to four groups, blocks b0 … b2 or none."""
    random = np.random.default_rng(seed)
    made = []
    for number in range(count):
        size = float(random.integers(1, 50))
        choices = []
        for bits, key in product((4, 6, 8), range(keys)):
            error = float(random.uniform(0.2, 1) * (2.0**-bits + 2.0 ** -(4 + 4 * key)))
            choices.append(Choice(len(choices), size * bits * (1 + key), error, key, bits > 4 or key > 0))
        block = ["", "b0", "b1", "b2"][random.integers(0, 4)]
        made.append(Item(f"item{number}", f"group{random.integers(0, 4)}", tuple(choices), block))
    return made


def every(found: Sequence[Item], most_high: int | None) -> Iterator[tuple[float, float]]:
    """(cost, error) of every choice that is allowed."""
    for chosen in product(*(item.choices for item in found)):
        keys: dict[str, int] = {}
        if any(keys.setdefault(i.group, c.key) != c.key for i, c in zip(found, chosen, strict=True)):
            continue
        high = {i.block for i, c in zip(found, chosen, strict=True) if i.block and c.high}
        if most_high is None or len(high) <= most_high:
            yield sum(c.cost for c in chosen), sum(c.error for c in chosen)


@given(st.integers(0, 10**6), st.integers(1, 5), st.floats(0, 1), st.sampled_from([None, 0, 1, 2]))
def test_the_best_of_all_choices(seed: int, count: int, share: float, most_high: int | None) -> None:
    made = items(seed, count)
    known = list(every(made, most_high))
    costs = [cost for cost, _ in known]
    budget = min(costs) + share * (max(costs) - min(costs))
    found = knapsack.best(made, budget, most_high)
    assert found.cost <= budget * (1 + EXACT)
    assert found.gap == 0
    assert found.error == pytest.approx(min(e for c, e in known if c <= budget * (1 + EXACT)), abs=EXACT)
    assert (found.cost, found.error) == pytest.approx(_recount(made, found.labels), abs=EXACT)


def _recount(made: Sequence[Item], labels: Mapping[str, int]) -> tuple[float, float]:
    chosen = [next(c for c in item.choices if c.label == labels[item.name]) for item in made]
    return sum(c.cost for c in chosen), sum(c.error for c in chosen)


@given(st.integers(0, 10**6), st.integers(1, 5), st.sampled_from([None, 0, 1, 2]))
def test_no_point_of_the_front_can_be_bettered(seed: int, count: int, most_high: int | None) -> None:
    made = items(seed, count)
    known = list(every(made, most_high))
    found = knapsack.front(made, most_high, points=1000)
    for one in found:
        assert one.error == pytest.approx(min(e for c, e in known if c <= one.cost * (1 + EXACT)), abs=EXACT)
    assert found[0].cost == pytest.approx(min(c for c, _ in known))
    assert found[-1].error == pytest.approx(min(e for _, e in known), abs=EXACT)
    assert [s.cost for s in found] == sorted({s.cost for s in found})
    assert [s.error for s in found] == sorted({s.error for s in found}, reverse=True)


@pytest.mark.parametrize("share", [0.1, 0.37, 0.8])
def test_sixty_layers_as_a_solver_of_integer_programs_finds_them(share: float) -> None:
    """Too many to enumerate; HiGHS proves its answer within its relative gap of 1e-9 that is asked for."""
    made = items(5, 60)
    choices = [(i, c) for i, item in enumerate(made) for c in item.choices]
    cost, error = (np.array([getattr(c, what) for _, c in choices]) for what in ("cost", "error"))
    budget = sum(min(c.cost for c in i.choices) for i in made) * (1 - share) + share * sum(
        max(c.cost for c in i.choices) for i in made
    )
    keys = [(g, k) for g in sorted({i.group for i in made}) for k in range(2)]
    width = len(choices) + len(keys)
    rows = []
    for i, item in enumerate(made):  # one choice an item, of the key its group has
        for key in range(2):
            row = np.zeros(width)
            row[[n for n, (j, c) in enumerate(choices) if j == i and c.key == key]] = 1
            row[len(choices) + keys.index((item.group, key))] = -1
            rows.append((row, 0.0, 0.0))
    for group in {i.group for i in made}:
        row = np.zeros(width)
        row[[len(choices) + n for n, (g, _) in enumerate(keys) if g == group]] = 1
        rows.append((row, 1.0, 1.0))
    rows.append((np.concatenate([cost, np.zeros(len(keys))]), 0.0, budget))
    matrix, low, high = (np.array(column) for column in zip(*rows, strict=True))
    answer = milp(
        np.concatenate([error, np.zeros(len(keys))]),
        constraints=LinearConstraint(matrix, low, high),
        integrality=np.ones(width),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-9},
    )
    found = knapsack.best(made, budget)
    assert found.gap == 0
    assert found.error == pytest.approx(answer.fun, rel=1e-8)


def test_the_gap_holds_when_states_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    made = items(5, 40)
    budget = 0.6 * sum(min(c.cost for c in i.choices) for i in made) + 0.4 * sum(
        max(c.cost for c in i.choices) for i in made
    )
    exact = knapsack.best(made, budget)
    monkeypatch.setattr(knapsack_search, "LIMIT", 2)
    rough = knapsack.best(made, budget)
    assert rough.gap > 0
    assert rough.error - rough.gap - EXACT <= exact.error <= rough.error
    assert rough.cost <= budget


def test_too_many_ties_are_refused() -> None:
    choices = tuple(Choice(k, k, 1.0 / (1 + k), k) for k in range(2))
    made = [Item(f"{g}.{b}", f"g{g}", choices, f"b{b}") for g in range(9) for b in range(2)]
    with pytest.raises(ValueError, match="9 groups lie in several blocks"):
        knapsack.best(made, 100.0, 1)


# -- costs and blocks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fmt", "rank", "bits"),
    [
        (WeightFormat("int8", 8, 127), 0, 64 * 48 * 8 + 48 * 32),
        (WeightFormat("int4", 4, 7, 32), 0, 64 * 48 * 4 + 2 * 48 * 32),
        (WeightFormat("int8", 6, 31), 3, 64 * 48 * 6 + 48 * 32 + 3 * (64 + 48) * 32),
        (WeightFormat("int8", 4, 12, 32, "e2m1", "e8m0"), 0, 64 * 48 * 4 + 2 * 48 * 8),
    ],
)
def test_scales_and_factors_count(fmt: WeightFormat, rank: int, bits: int) -> None:
    assert stored_bits((64, 48), fmt, rank) == bits


def test_bit_operations() -> None:
    assert bit_operations(10, (64, 48), 4, 8, rank=2) == 10 * (64 * 48 * 32 + 2 * 112 * 1024)


@pytest.mark.parametrize(
    ("layer", "block"),
    [
        ("blocks.3.attn1.to_out.0", "blocks.3"),
        ("blocks.13.ffn.net.2", "blocks.13"),
        ("transformer_blocks.0.attn1.to_q", "transformer_blocks.0"),
        ("single_transformer_blocks.7.proj", "single_transformer_blocks.7"),
        ("model.layers.11.mlp.up", "model.layers.11"),
        ("ffn.net.2", ""),
        ("condition_embedder.time_proj", ""),
        ("proj_out", ""),
        ("blocks.x.to_q", ""),
    ],
)
def test_blocks_are_read_off_the_path(layer: str, block: str) -> None:
    assert block_of(layer) == block


# -- tables ----------------------------------------------------------------------------------------------------------

WIDTH = 64


def table(
    layers: Sequence[str], candidates: Sequence[Candidate], values: Sequence[str] | None = None, seed: int = 0
) -> Table:
    """Square layers of width 64 whose error falls fourfold a bit, each with a factor of its own."""
    random = np.random.default_rng(seed)
    made = []
    for number, name in enumerate(layers):
        size = float(np.exp(random.normal()))
        errors = [
            size * (4.0**-c.weights * (0.5 if c.group > 0 else 1) * (0.5 if c.rank > 0 else 1) + 4.0**-c.activations)
            for c in candidates
        ]
        made.append(
            LayerErrors(
                name=name,
                value=f"value{number}" if values is None else values[number],
                rows=10,
                shape=(WIDTH, WIDTH),
                errors=np.array([errors, errors]),
                share=np.array([0.25, 0.75]),
                formats=tuple(
                    WeightFormat("int8", c.weights, 2 ** (c.weights - 1) - 1, max(c.group, 0)) for c in candidates
                ),
                activations=tuple(c.activations for c in candidates),
                ranks=tuple(max(c.rank, 0) for c in candidates),
            )
        )
    return Table(tuple(candidates), tuple(made))


def recipe(**settings: object) -> Recipe:
    return Recipe(name="test", summary="test", allocate=AllocateRecipe(**settings))  # type: ignore[arg-type]


PLAIN = tuple(Candidate(w, 8) for w in (4, 6, 8))
OVERHEAD = 32 / WIDTH  # bits a weight, of one scale an output channel
NAMES = [f"blocks.{b}.{n}" for b in range(4) for n in ("to_q", "to_out")]


def size_of(found: Allocation, made: Table) -> float:
    """Mean bits a weight, counted from the definition."""
    total = 0.0
    for layer in made.layers:
        one = found.candidates[layer.name]
        group = one.group if one.group > 0 else WIDTH
        total += one.weights + 32 / group + max(one.rank, 0) * 32 * 2 / WIDTH
    return total / len(made.layers)


def test_a_budget_is_kept_with_what_scales_store() -> None:
    made = table(NAMES, PLAIN)
    found = allocate.best(made, recipe(), 6.0, "size")
    assert size_of(found, made) == pytest.approx(found.cost)
    assert 5.0 < found.cost <= 6.0
    bits = {x.name: found.candidates[x.name].weights for x in made.layers}
    sensitive = [x.name for x in made.ordered(0)]
    assert [bits[n] for n in sensitive] == sorted(bits.values(), reverse=True), "most bits for the most sensitive"


def test_ignoring_the_scales_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: groups as if their scales were free; the allocation then stores more than the budget."""
    candidates = tuple(Candidate(4, 8, group) for group in (0, 32, 64))
    made = table(NAMES, candidates)
    assert size_of(allocate.best(made, recipe(weights=(4,)), 4.6, "size"), made) <= 4.6
    monkeypatch.setattr(allocate, "SCALE_BITS", 0)
    assert size_of(allocate.best(made, recipe(weights=(4,)), 4.6, "size"), made) == 5.0


def test_groups_and_branches_compete_with_bits() -> None:
    candidates = tuple(Candidate(w, 8, g, r) for w in (4, 6, 8) for g in (0, 32) for r in (0, 2, 9))
    made = table(NAMES, candidates)
    found = allocate.best(made, recipe(), 7.0, "size")
    assert size_of(found, made) == pytest.approx(found.cost)
    assert found.cost <= 7.0
    richest = allocate.front(made, recipe(), "size")[-1]
    assert {c.rank for c in richest.candidates.values()} == {2}, "rank 9 of width 64 stores more than 8 bits a weight"


def test_bit_operations_as_budget_trade_both_sides() -> None:
    candidates = tuple(Candidate(w, a) for w in (4, 8) for a in (4, 8))
    made = table(NAMES, candidates)
    settings = recipe(weights=(4, 8), activations=(4, 8))
    found = allocate.best(made, settings, 32.0, "bops")
    mean = np.mean([c.weights * c.activations for c in found.candidates.values()])
    assert mean == pytest.approx(found.cost)
    assert mean <= 32.0
    assert {c.activations for c in found.candidates.values()} == {4, 8}


def test_layers_that_read_one_value_share_activation_bits() -> None:
    candidates = tuple(Candidate(w, a) for w in (4, 8) for a in (4, 8))
    values = [name.rsplit(".", 1)[0] for name in NAMES]
    made = table(NAMES, candidates, values)
    found = allocate.best(made, recipe(weights=(4, 8), activations=(4, 8)), 34.0, "bops")
    for value in set(values):
        assert len({found.candidates[x.name].activations for x in made.layers if x.value == value}) == 1


@pytest.mark.parametrize("most", [0, 1, 3])
def test_at_most_so_many_blocks_are_high(most: int) -> None:
    made = table(NAMES, PLAIN)
    found = allocate.best(made, recipe(high_blocks=most), 8.5, "size")
    assert len(high_blocks(found)) == most


def high_blocks(found: Allocation) -> set[str]:
    """Counted from the paths by hand, not by block_of()."""
    return {".".join(name.split(".")[:2]) for name, c in found.candidates.items() if c.weights > 4}


def test_a_wrong_count_of_blocks_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: blocks by list, not by number, so that all of them count as one."""
    made = table(NAMES, PLAIN)
    monkeypatch.setattr(allocate, "block_of", lambda name: name.split(".")[0])
    assert len(high_blocks(allocate.best(made, recipe(high_blocks=1), 8.5, "size"))) == 4


def test_a_value_of_several_blocks_makes_none_of_them_high() -> None:
    candidates = tuple(Candidate(4, a) for a in (4, 8))
    made = table(NAMES, candidates, ["prompt"] * len(NAMES))
    found = allocate.best(made, recipe(weights=(4,), activations=(4, 8), high_blocks=0), 32.0, "bops")
    assert {c.activations for c in found.candidates.values()} == {8}


def test_too_small_a_budget_names_the_smallest() -> None:
    made = table(NAMES, PLAIN)
    with pytest.raises(RecipeError, match=r"no allocation needs as little as 4\.2 bits a weight; .* possible is 4\.5$"):
        allocate.best(made, recipe(), 4.2, "size")
    assert allocate.best(made, recipe(), 4.5, "size").cost == pytest.approx(4 + OVERHEAD)


def test_overrides_are_kept() -> None:
    made = table(NAMES, PLAIN)
    settings = recipe(weights=(4, 6))
    kept = Recipe(
        name="test",
        summary="test",
        allocate=settings.allocate,
        override=(Override(match="*.to_out", why="retained", weights=8),),
    )
    found = allocate.best(made, kept, 6.6, "size")
    assert {found.candidates[n].weights for n in NAMES if n.endswith("to_out")} == {8}
    assert {found.candidates[n].weights for n in NAMES if n.endswith("to_q")} == {4}


def test_readers_of_one_value_that_want_different_bits() -> None:
    candidates = tuple(Candidate(4, a) for a in (4, 8))
    made = table(["a", "b"], candidates, ["v", "v"])
    rules = (Override(match="a", why="", activations=4), Override(match="b", why="", activations=8))
    settings = Recipe(name="test", summary="", allocate=AllocateRecipe(weights=(4,)), override=rules)
    with pytest.raises(RecipeError, match="a, b read one value"):
        allocate.best(made, settings, 8.0, "size")


def test_the_front_runs_from_cheapest_to_best() -> None:
    made = table(NAMES, PLAIN)
    found = allocate.front(made, recipe(), "size")
    assert found[0].cost == pytest.approx(4 + OVERHEAD)
    assert found[-1].cost == pytest.approx(8 + OVERHEAD)
    for one in found:
        assert allocate.best(made, recipe(), one.cost + EXACT, "size").error == pytest.approx(one.error)


def test_why_says_what_was_to_choose_from() -> None:
    made = table(NAMES, PLAIN)
    found = allocate.explain(made, allocate.best(made, recipe(), 6.0, "size"), recipe(), "mean 5.9 of 6")
    assert all("of 3 candidates from" in one.why and one.why.endswith("mean 5.9 of 6") for one in found.values())
    assert len({one.weights for one in found.values()}) > 1
