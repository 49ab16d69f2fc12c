"""The solver of one group of layers, and the processes that solve groups side by side."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from vdq_export.calib import clip, group, weight_ranges
from vdq_export.calib.dynamic import quantize_rows
from vdq_export.calib.formats import WeightFormat
from vdq_export.calib.gptq import factorise, gptq
from vdq_export.calib.group import GroupResult, GroupTask, LayerWeights, solve_group, solve_groups
from vdq_export.calib.low_rank import split
from vdq_export.calib.ranges import Grid, affine
from vdq_export.calib.workers import in_order
from vdq_export.errors import CalibrationError
from vdq_export.graph import Array
from vdq_export.plan import Dynamic, Range
from vdq_export.recipe import ActivationRecipe, GptqRecipe, Recipe, WeightRecipe
from vdq_export.weights.number_grid import dequantize
from vdq_export.work.engine import Local
from vdq_export.work.store import WorkStore

INT4_32 = WeightFormat("int4", 4, 7, 32)
INT4 = WeightFormat("int4", 4, 7)
GRID = Grid("uint8", 4)
K = 64


def recipe(rounding: str = "gptq", clip_ratios: tuple[float, ...] = (), **weights: object) -> Recipe:
    return Recipe(
        name="test",
        summary="",
        weights=WeightRecipe(rounding=rounding, **weights),  # type: ignore[arg-type]
        activations=ActivationRecipe(bits=4, clip=clip_ratios),
    )


def task(
    seed: int = 0, ranks: tuple[int, ...] = (0, 4), dynamic: bool = False, made: Recipe | None = None
) -> GroupTask:
    """Two layers behind one value of 64 correlated channels, three bins of 200 rows, the later ones larger."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((K, K)) / 8 + np.eye(K)
    rows = tuple(((rng.standard_normal((200, K)) @ mixing) * size).astype(np.float32) for size in (1, 2, 4))
    ranges = []
    for x in rows:
        lo, hi = float(x.min()), float(x.max())
        scale, zero = affine(lo, hi, GRID)
        ranges.append(Range(lo=lo, hi=hi, scale=scale, zero_point=zero, why="min and max"))
    return GroupTask(
        names=(f"block.{seed}.q", f"block.{seed}.k"),
        rows=rows,
        ranges=() if dynamic else tuple(ranges),
        dynamic=(Dynamic(kind="token", why="test"),) * 3 if dynamic else (),
        grid=GRID,
        weights=tuple(rng.standard_normal((K, n)).astype(np.float32) for n in (24, 40)),
        formats=(INT4_32, INT4),
        ranks=ranks,
        recipe=made or recipe(),
    )


def restored(layer: LayerWeights, weight: Array, fmt: WeightFormat) -> Array:
    """Ŵ + D·U from the plan and the tensors, as the passes read them."""
    scale = layer.tensors["scale"] if fmt.group else np.array(layer.weight.scale, np.float32)
    branch = layer.tensors["down"] @ layer.tensors["up"] if layer.low_rank else np.float32(0)
    codes = layer.tensors["codes"] if layer.weight.codes else weight_ranges.quantize(weight - branch, scale, fmt)
    return dequantize(codes, scale)


def output_error(one: GroupTask, result: GroupResult, index: int) -> float:
    """‖X'W' − (X̂·R̂ + X'·D·U)‖² / ‖X'W'‖² over all bins."""
    layer, weight, fmt = result.layers[index], one.weights[index], one.formats[index]
    hat, error, power = restored(layer, weight, fmt), 0.0, 0.0
    for x, how in zip(one.rows, result.ranges or result.dynamic, strict=True):
        wanted = x @ weight
        got = quantize_rows(x, how, one.grid) @ hat
        if layer.low_rank:
            got += x @ layer.tensors["down"] @ layer.tensors["up"]
        error += float(np.square(wanted - got, dtype=np.float64).sum())
        power += float(np.square(wanted, dtype=np.float64).sum())
    return error / power


def same(a: GroupResult, b: GroupResult) -> bool:
    alike = (a.ranges, a.dynamic) == (b.ranges, b.dynamic)
    for mine, theirs in zip(a.layers, b.layers, strict=True):
        alike &= (mine.weight, mine.low_rank) == (theirs.weight, theirs.low_rank)
        alike &= mine.tensors.keys() == theirs.tensors.keys()
        alike &= all(np.array_equal(mine.tensors[name], theirs.tensors[name]) for name in mine.tensors)
    return alike


# -- one group -------------------------------------------------------------------------------------------------------


def test_result_is_what_its_parts_say() -> None:
    one = task()
    result = solve_group(one)
    first, second = result.layers
    assert first.low_rank is None
    assert set(first.tensors) == {"codes", "scale"}
    assert set(second.tensors) == {"codes", "down", "up"}
    assert (first.weight.scale, len(second.weight.scale)) == ((), 40)
    assert (first.weight.group, first.weight.bits, first.weight.codes) == (32, 4, True)
    branch = split(one.weights[1], 4)
    assert second.low_rank is not None
    assert (second.low_rank.rank, second.low_rank.error) == (4, branch.error)
    assert "SVD" in second.low_rank.why
    assert np.array_equal(second.tensors["down"], branch.down)
    assert "GPTQ: held-out output error" in second.weight.why
    assert result.ranges == one.ranges


def test_gptq_sees_the_quantized_input_of_all_bins() -> None:
    """Codes of the first layer from the definition: H of X̂ of all three bins but every eighth row."""
    one = task()
    quantized = np.concatenate([quantize_rows(x, r, GRID) for x, r in zip(one.rows, one.ranges, strict=True)])
    learnt = quantized[np.arange(len(quantized)) % group.HELD_OUT != 1]
    factor = factorise(learnt.T @ learnt, GptqRecipe())
    wanted = gptq(one.weights[0], factor, INT4_32, lambda w: weight_ranges.scales(w, INT4), GptqRecipe())
    assert np.array_equal(solve_group(one).layers[0].tensors["codes"], wanted.codes)
    exact = np.concatenate(one.rows)[np.arange(600) % group.HELD_OUT != 1]
    other = gptq(
        one.weights[0],
        factorise(exact.T @ exact, GptqRecipe()),
        INT4_32,
        lambda w: weight_ranges.scales(w, INT4),
        GptqRecipe(),
    )
    assert not np.array_equal(other.codes, wanted.codes)


@pytest.mark.parametrize("dynamic", [False, True])
def test_each_step_lowers_the_output_error(dynamic: bool) -> None:
    """Nearest rounding, then with a branch, then with GPTQ, then clipped: each on the same rows."""
    ratios = (0.6, 0.7, 0.8, 0.9, 1.0)
    errors = []
    for ranks, made in (
        ((0, 0), recipe("nearest")),
        ((8, 8), recipe("nearest")),
        ((8, 8), recipe("gptq")),
        ((8, 8), recipe("gptq", ratios)),
    ):
        one = task(1, ranks, dynamic, made)
        result = solve_group(one)
        errors.append(output_error(one, result, 0) + output_error(one, result, 1))
    assert errors[1] < errors[0]
    assert errors[2] < errors[1]
    assert errors[3] <= errors[2]  # ratio 1 where none gains


def test_wrong_tensors_show_in_the_output_error() -> None:
    """output_error() has teeth: rows of `up` exchanged, another layer's scale, codes off by one channel."""
    one = task()
    result = solve_group(one)
    for name, index, change in (
        ("up", 1, lambda a: a[::-1]),
        ("down", 1, lambda a: -a),
        ("scale", 0, lambda a: a[::-1]),
        ("codes", 0, lambda a: np.roll(a, 1, axis=0)),
    ):
        layer = result.layers[index]
        wrong = replace(layer, tensors={**layer.tensors, name: change(layer.tensors[name])})
        layers = tuple(wrong if i == index else other for i, other in enumerate(result.layers))
        assert output_error(one, replace(result, layers=layers), index) > 1.1 * output_error(one, result, index)


def test_nearest_rounding_leaves_codes_to_the_pass() -> None:
    one = task(made=recipe("nearest", range="mse"))
    first, second = solve_group(one).layers
    assert not first.weight.codes
    assert set(first.tensors) == {"scale"}
    assert set(second.tensors) == {"down", "up"}
    assert first.weight.why == "least squared error a group of 32"


def test_gptq_is_not_taken_where_it_gains_nothing() -> None:
    """Channels k and k + 32 are equal in what GPTQ learns from, so that it lets their errors cancel; in the rows held
    out they are opposite."""
    one = task(3, ranks=(0, 0))
    half = np.random.default_rng(3).standard_normal((600, 32)).astype(np.float32)
    sign = np.where(np.arange(600) % group.HELD_OUT == 1, np.float32(-1), np.float32(1))[:, None]
    rows = tuple(np.split(np.concatenate([half, sign * half], axis=1), 3))
    found = solve_group(replace(one, rows=rows)).layers
    assert not any(layer.weight.codes for layer in found)
    assert all("GPTQ gains nothing" in layer.weight.why for layer in found)
    assert "codes" not in found[0].tensors


def test_equal_rows_stay_on_one_side() -> None:
    """A prompt's tokens are the same in every step: half of them held out would be no evidence."""
    rng = np.random.default_rng(0)
    tokens = rng.standard_normal((20, K)).astype(np.float32)
    rows = np.concatenate([tokens, tokens, tokens])
    out = group._held_out(rows)
    assert out.sum() == 3 * 3
    assert not set(map(bytes, rows[out])) & set(map(bytes, rows[~out]))
    assert group._held_out(np.concatenate([tokens[:1]] * 4)).all()


def test_clip_search_sees_branch_and_rounded_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[object, ...]] = []
    real = clip.search

    def spy(*arguments: object) -> object:
        seen.append(arguments)
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(clip, "search", spy)
    one = task(made=recipe("nearest", (0.8,)))
    result = solve_group(one)
    rows, ranges, dynamic, grid, weights, quantized, branches, ratios = seen[0]
    assert (rows, ranges, dynamic, grid, weights, ratios) == (one.rows, one.ranges, (), GRID, one.weights, (0.8,))
    assert branches[0] is None  # type: ignore[index]
    assert np.array_equal(branches[1][0], result.layers[1].tensors["down"])  # type: ignore[index]
    assert np.array_equal(quantized[1], restored(result.layers[1], one.weights[1], INT4))  # type: ignore[index]


def test_errors_name_the_layers() -> None:
    one = task()
    broken = replace(one, rows=(one.rows[0] * np.float32(np.nan), *one.rows[1:]))
    with pytest.raises(CalibrationError, match=r"^block.0.q, block.0.k: the Hessian of its input holds NaN or Inf"):
        solve_group(broken)
    with pytest.raises(CalibrationError, match=r"^block.0.q, block.0.k: ValueError: "):
        solve_group(replace(one, weights=one.weights[:1]))


# -- many groups -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def serial() -> list[GroupResult]:
    return [solve_group(task(seed)) for seed in range(4)]


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_processes_give_the_serial_result(
    workers: int, serial: list[GroupResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "LIGHT", 0)
    found = list(solve_groups((task(seed) for seed in range(4)), Local(workers)))
    assert all(same(a, b) for a, b in zip(found, serial, strict=True))
    assert not same(found[0], found[1])


def test_light_groups_need_no_process(serial: list[GroupResult], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    assert all(same(a, b) for a, b in zip(solve_groups(map(task, range(4)), Local(2)), serial, strict=True))
    assert list(solve_groups([], Local(2))) == []


def test_a_failure_in_a_process_names_the_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(group, "LIGHT", 0)
    tasks = [task(0), replace(task(1), weights=task(1).weights[:1]), task(2)]
    results = solve_groups(tasks, Local(2))
    next(results)
    with pytest.raises(CalibrationError, match=r"^block.1.q, block.1.k: ValueError: ") as caught:
        next(results)
    assert "in a worker process" in caught.value.__notes__[0]


def test_it_works_from_a_script_without_a_main_guard(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "print('started')\n"
        "from vdq_export.calib.workers import in_order\n"
        "print(list(in_order(abs, [-1, -2, 3], 2, name=str)))\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout == "started\n[1, 2, 3]\n"


# Tasks of these are small things; the functions are found by name in the processes.


def slowest_first(number: int) -> int:
    time.sleep(0.3 if number == 0 else 0.0)
    return number


def die(number: int) -> int:
    os._exit(7)


def chatter(number: int) -> tuple[int, int]:
    print("noise on stdout")
    return number, int(os.environ["OPENBLAS_NUM_THREADS"])


def test_results_come_in_order_and_stdout_is_free() -> None:
    assert list(in_order(slowest_first, range(6), 3, name=str)) == list(range(6))
    assert list(in_order(chatter, range(2), 1, name=str)) == [(0, 1), (1, 1)]


def test_a_process_that_ends_is_told_with_its_task() -> None:
    with pytest.raises(CalibrationError, match=r"the process that solved layer 5 ended with 7; fewer workers"):
        list(in_order(die, [5], 2, name=lambda n: f"layer {n}"))


def test_an_error_of_the_source_of_tasks_comes_through() -> None:
    def tasks() -> Iterator[int]:
        yield -4
        raise CalibrationError("no record of value v")

    found = in_order(abs, tasks(), 2, name=str)
    assert next(found) == 4
    with pytest.raises(CalibrationError, match="no record of value v"):
        next(found)


def test_tasks_are_drawn_when_there_is_a_process_for_them() -> None:
    drawn: list[float] = []

    def tasks() -> Iterator[float]:
        for seconds in (0, 60, 60, 60):
            drawn.append(seconds)
            yield seconds

    found = in_order(time.sleep, tasks(), 1, name=str)
    next(found)
    found.close()  # type: ignore[attr-defined]
    assert len(drawn) <= 2


def test_leaving_early_ends_the_processes() -> None:
    before = threading.active_count()
    found = in_order(time.sleep, [0, 60, 60, 60], 2, name=str)
    next(found)
    started = time.monotonic()
    found.close()  # type: ignore[attr-defined]
    assert time.monotonic() - started < 5
    assert threading.active_count() == before


def test_what_is_shared_comes_before_the_task() -> None:
    assert list(in_order(pow, range(4), 2, name=str, shared=3)) == [1, 3, 9, 27]
    light = in_order(pow, range(4), 2, name=str, shared=3, is_light=lambda number: number % 2 == 0)
    assert list(light) == [1, 3, 9, 27]


# -- groups that were solved before ----------------------------------------------------------------------------------


def test_costly_groups_are_kept_and_only_they(
    tmp_path: Path, serial: list[GroupResult], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "LIGHT", 0)
    costly = [task(seed) for seed in range(4)]
    assert all(map(group.is_costly, costly))
    cheap = task(ranks=(0, 0), made=recipe("nearest", range="minmax"))
    assert not group.is_costly(cheap)
    list(solve_groups([*costly[:2], cheap], Local(1), store := WorkStore(tmp_path)))
    assert (store.hits, store.misses) == (0, 2)
    found = list(solve_groups(costly, Local(1), store))
    assert (store.hits, store.misses) == (2, 4)
    assert all(same(a, b) for a, b in zip(found, serial, strict=True))


@pytest.mark.parametrize("asked", [b"", b"\x80\x05\x95\xff", pickle.dumps((abs, ())) + pickle.dumps([1] * 99)[:40]])
def test_a_process_whose_asker_was_killed_ends_without_a_word(asked: bytes) -> None:
    command = [sys.executable, "-P", "-m", "vdq_export.calib.workers"]
    done = subprocess.run(command, input=asked, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"", b"")
