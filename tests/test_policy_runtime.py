"""Policies on whole bundles: the ends are exact, the middle follows the definition, clips and threads stay apart."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch

from tests.policy_cases import STEPS, Array, Kind, clip, network, start, write
from vdq_export.bundle import Bundle
from vdq_export.errors import BundleError, ScheduleError, UnknownNameError
from vdq_export.metrics import relative_change
from vdq_export.plan import Branch
from vdq_export.policy import DeltaPolicy
from vdq_export.runtime import load
from vdq_export.runtime.transformer import Transformer
from vdq_export.schedule import Schedule

GUIDED: tuple[Branch, ...] = ("cond", "uncond")
KINDS = {
    "shared session": Kind(),
    "other weights": Kind(other_weights=True),
    "branches": Kind(branches=GUIDED),
    "batch of two": Kind(group=2),
}


@pytest.fixture(scope="module", params=KINDS, ids=list(KINDS))
def each(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Kind, Path]:
    kind = KINDS[request.param]
    return kind, write(tmp_path_factory.mktemp("each") / "out", kind, bits={"low": 4.0, "high": 8.0}).path


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("policy") / "out", bits={"low": 4.0, "high": 8.0}).path


@pytest.fixture
def closing() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def settings(kind: Kind) -> dict[str, Any]:
    """How a sampler calls a bundle of this kind."""
    return {"branches": kind.branches if kind.branches == GUIDED else (None,), "batch": kind.group}


def clips(path: Path, policy: str | None, count: int = 1, **how: Any) -> list[Array]:
    with load(path, threads=1, policy=policy) as transformer:
        return [one for seed in range(count) for one in clip(transformer, seed, **how)]


def delta_by_definition(low: Transformer, high: Transformer, delta: float, seed: int = 0) -> tuple[list[Array], str]:
    """(outputs, "LLH…") of one clip, from two transformers that know no policy."""
    x, context = start(seed)
    e, outputs, chosen = 0.0, list[Array](), ""
    for t in STEPS:
        if len(outputs) > 1:
            e += float(
                np.abs(outputs[-1] - outputs[-2]).sum(dtype=np.float64) / np.abs(outputs[-2]).sum(dtype=np.float64)
            )
        chosen += "L" if e < delta else "H"
        e = e if e < delta else 0.0
        outputs.append(network(low if chosen[-1] == "L" else high, x, t, context))
        x = x - np.float32(0.1) * outputs[-1]
    return outputs, chosen


# -- exactness -------------------------------------------------------------------------------------------------------


def test_at_its_ends_delta_is_the_high_and_the_low_bundle(each: tuple[Kind, Path], tmp_path: Path) -> None:
    """To the last bit, two clips long, against static policies and against bundles that have one precision only."""
    kind, path = each
    results = {}
    for end, precision in (("0", "high"), ("inf", "low")):
        results[precision] = clips(path, f"delta={end}", 2, **settings(kind))
        np.testing.assert_array_equal(results[precision], clips(path, f"static:{precision}", 2, **settings(kind)))
        if not kind.other_weights or precision == "low":
            alone = write(tmp_path / precision, kind._replace(precisions=(precision,), with_probe=False))  # type: ignore[arg-type]
            np.testing.assert_array_equal(results[precision], clips(alone.path, None, 2, **settings(kind)))
    assert np.abs(np.subtract(results["low"], results["high"])).max() > 0.1  # the precisions differ


@pytest.mark.parametrize("delta", [0.05, 0.15, 0.3, 0.8])
def test_delta_gives_what_its_definition_gives(out: Path, closing: ExitStack, delta: float) -> None:
    low = closing.enter_context(load(out, threads=1, policy="static:low"))
    high = closing.enter_context(load(out, threads=1, policy="static:high"))
    switching = closing.enter_context(load(out, threads=1, policy=f"delta={delta}"))
    bits = []
    for seed in range(3):
        expected, chosen = delta_by_definition(low, high, delta, seed)
        np.testing.assert_array_equal(clip(switching, seed), expected)
        assert 0 < chosen.count("H") < len(chosen)
        bits += [{"L": 4, "H": 8}[letter] for letter in chosen]
    counts = switching.statistics
    assert (counts.calls, counts.steps, counts.reused_steps) == (30, 30, 0)
    assert (counts.low_steps, counts.high_steps) == (bits.count(4), bits.count(8))
    assert counts.average_bits == pytest.approx(np.mean(bits))


def test_a_larger_delta_never_spends_more_on_the_first_clip(out: Path) -> None:
    """Without feedback of the choice on the outputs this holds for any; here for a sweep, as the paper's figure."""
    spent = []
    for delta in (0.0, 0.05, 0.15, 0.3, 0.8, float("inf")):
        with load(out, threads=1, policy=f"delta={delta}") as transformer:
            clip(transformer)
            spent.append(transformer.statistics.average_bits or 0.0)
    assert spent == sorted(spent, reverse=True) and spent[0] == 8 and spent[-1] == 4


def test_the_bundles_own_policy_is_followed(tmp_path: Path) -> None:
    path = write(tmp_path / "out", policy=DeltaPolicy(delta=0.3)).path
    np.testing.assert_array_equal(clips(path, None), clips(path, "delta=0.3"))
    assert clips(path, None)[-1].tolist() != clips(path, "static:high")[-1].tolist()


# -- clips, branches, batches, threads -------------------------------------------------------------------------------


def test_a_second_clip_is_as_if_it_were_the_first(out: Path) -> None:
    for policy in ("delta=0.3", "cache=0.2", "delta=0.3+cache=0.2", "pattern=sba"):
        both = clips(out, policy, 2)
        with load(out, threads=1, policy=policy) as fresh:
            np.testing.assert_array_equal(both[len(STEPS) :], clip(fresh, 1))


def test_a_clip_given_up_is_forgotten_on_reset(out: Path) -> None:
    with load(out, threads=1, policy="delta=0.3+cache=0.2") as transformer:
        expected = clip(transformer, 1, steps=STEPS[4:])
        for forget in (transformer.reset, lambda: None):
            transformer.reset()
            clip(transformer, 0, steps=STEPS[:4])
            forget()
            same = np.array_equal(clip(transformer, 1, steps=STEPS[4:]), expected)
            assert same == (forget == transformer.reset)  # without it, the next clip goes on where the last one was


def test_the_first_call_of_a_step_decides_for_both_branches(out: Path) -> None:
    """The definition, applied to the conditional outputs alone, counts as many high steps."""
    with load(out, threads=1, policy="delta=0.3") as transformer:
        cond = clip(transformer, branches=GUIDED)
        counts = transformer.statistics
        assert (counts.calls, counts.steps) == (2 * len(STEPS), len(STEPS))
        assert counts.low_steps and counts.high_steps
    changes = [0.0, 0.0, *(relative_change(now, before) for before, now in pairwise(cond))][: len(cond)]
    e, high = 0.0, 0
    for one in changes:
        e += one
        if e >= 0.3:
            e, high = 0.0, high + 1
    assert counts.high_steps == high


def test_both_branches_in_one_batch_get_one_decision(tmp_path: Path) -> None:
    """A batch of two on graphs of two, and on graphs of one, which run twice, alike."""
    found = {}
    for group in (1, 2):
        path = write(tmp_path / f"{group}", Kind(group=group)).path
        with load(path, threads=1, policy="delta=0.3+cache=0.2") as transformer:
            found[group] = clip(transformer, batch=2)
            counts = transformer.statistics
            assert (counts.calls, counts.steps) == (len(STEPS), len(STEPS))
            assert counts.reused_steps and counts.low_steps and counts.high_steps
    # float32 sums of 64 products, in another order where one product has twice the rows
    np.testing.assert_allclose(found[1], found[2], rtol=1e-5, atol=1e-5)


def test_samples_of_one_call_at_different_timesteps(out: Path) -> None:
    x, context = start(batch=2)
    call: dict[str, Any] = {"hidden_states": x, "timestep": np.array([0.9, 0.2]), "encoder_hidden_states": context}
    for policy in ("delta=0.3", "pattern=abs", "cache=0.1"):
        with (
            load(out, threads=1, policy=policy) as transformer,
            pytest.raises(ScheduleError, match="different timesteps"),
        ):
            transformer(**call)
    with load(out, threads=1, policy="static:low") as transformer:
        assert transformer(**call).sample.shape == x.shape


def test_threads_make_clips_of_their_own(out: Path) -> None:
    seeds = list(range(4))
    for policy in ("delta=0.3", "delta=0.3+cache=0.2"):
        with load(out, threads=1, policy=policy) as transformer:
            alone = [clip(transformer, seed) for seed in seeds]
            counted = transformer.statistics
            barrier = Barrier(len(seeds))

            def one(seed: int, transformer: Transformer = transformer, barrier: Barrier = barrier) -> list[Array]:
                barrier.wait()
                return clip(transformer, seed)

            with ThreadPoolExecutor(len(seeds)) as threads:
                together = list(threads.map(one, seeds))
            twice = transformer.statistics
        np.testing.assert_array_equal(together, alone)
        assert (twice.low_steps, twice.high_steps) == (2 * counted.low_steps, 2 * counted.high_steps)
        assert twice.reused_steps == 2 * counted.reused_steps


# -- reuse -----------------------------------------------------------------------------------------------------------


def test_reuse_gives_the_very_output_and_follows_its_definition(out: Path) -> None:
    x, context = start()
    with load(out, threads=1, policy="cache=0.2") as transformer, load(out, threads=1, policy="static:high") as plain:
        made = clip(transformer)
        total, value, last, reused = 0.0, np.zeros(0), np.zeros(0), 0
        for step, t in enumerate(STEPS):
            before, value = value, x * np.float32(1 + t)
            if step and step < len(STEPS) - 1:
                total += float(np.abs(value - before).sum() / np.abs(before).sum())
            if step in (0, len(STEPS) - 1) or total >= 0.2:
                last, total = network(plain, x, t, context), 0.0
            else:
                reused += 1
            np.testing.assert_array_equal(made[step], last)
            x = x - np.float32(0.1) * last
        counts = transformer.statistics
        assert (counts.steps, counts.reused_steps, counts.high_steps) == (10, reused, 10 - reused)
        assert 2 < reused < 8 and counts.average_bits == 8.0


def test_writing_into_an_output_does_not_change_the_next_one(out: Path) -> None:
    x, context = (torch.from_numpy(one) for one in start())
    with load(out, threads=1, policy="cache=9") as transformer:
        seen = []
        for t in STEPS[:4]:
            sample = transformer(hidden_states=x, timestep=t, encoder_hidden_states=context).sample
            seen.append(sample.clone())
            sample.mul_(0)
        assert transformer.statistics.reused_steps == 3
    assert all(torch.equal(one, seen[0]) for one in seen) and seen[0].abs().max() > 0.1


def test_reuse_and_bit_switching_add_up(out: Path) -> None:
    with load(out, threads=1, policy="delta=0.3+cache=0.2") as transformer:
        clip(transformer)
        counts = transformer.statistics
    assert counts.low_steps and counts.high_steps and counts.reused_steps
    assert counts.low_steps + counts.high_steps + counts.reused_steps == counts.steps == len(STEPS)
    ran = counts.low_steps + counts.high_steps
    assert counts.average_bits == pytest.approx((4 * counts.low_steps + 8 * counts.high_steps) / ran)


def test_without_reuse_and_policy_nothing_is_kept(out: Path) -> None:
    """A static bundle serves any order of calls for ever."""
    with load(out, threads=1, policy="static:low") as transformer:
        x, context = start()
        for _ in range(50):
            network(transformer, x, 0.5, context)
        assert transformer._clip._now == [] and transformer._clip._before == []


# -- what a bundle can follow ----------------------------------------------------------------------------------------


def test_policies_that_a_bundle_cannot_follow(tmp_path: Path) -> None:
    one = write(tmp_path / "one", Kind(precisions=(), with_probe=False)).path
    for policy in ("delta=0.3", "pattern=abs", "static:low"):
        with pytest.raises(ScheduleError, match=r"no graphs in .*low precision.*schedule\.delta"):
            load(one, policy=policy)
    with pytest.raises(ScheduleError, match=r"no probe graph.*schedule\.cache"):
        load(one, policy="cache=0.1")
    with pytest.raises(UnknownNameError, match="did you mean delta"):
        load(one, policy="dleta=0.3")
    with load(one, threads=1, policy="static+cache=0") as transformer:
        clip(transformer)
        counts = transformer.statistics
        assert (counts.steps, counts.low_steps, counts.high_steps, counts.average_bits) == (10, 0, 0, None)
    assert clips(write(tmp_path / "bits", Kind(precisions=()), bits={"": 6.0}).path, "cache=0.2")


def test_two_precisions_need_a_choice(tmp_path: Path) -> None:
    two = write(tmp_path / "two").path
    with pytest.raises(ScheduleError, match=r"high and low precision.*static:low"):
        load(two, policy="static")


def test_a_probe_belongs_to_the_bundle(out: Path, tmp_path: Path) -> None:
    bundle = Bundle.open(out)
    assert bundle.schedule.graphs[-1] == "graphs/probe.onnx"
    with pytest.raises(BundleError, match=r"graphs/prob\.onnx' is not in the bundle"):
        text = (out / "schedule.json").read_bytes().replace(b"graphs/probe.onnx", b"graphs/prob.onnx")
        damaged = tmp_path / "damaged"
        _copy(out, damaged, text)
        Bundle.open(damaged)


def _copy(bundle: Path, to: Path, schedule: bytes) -> None:
    """`bundle` with another schedule.json, manifest included."""
    shutil.copytree(bundle, to)
    old = (to / "schedule.json").read_bytes()
    (to / "schedule.json").write_bytes(schedule)
    manifest = (to / "manifest.json").read_text()
    manifest = manifest.replace(hashlib.sha256(old).hexdigest(), hashlib.sha256(schedule).hexdigest())
    (to / "manifest.json").write_text(manifest.replace(f'"size": {len(old)}', f'"size": {len(schedule)}'))
    assert Schedule.from_json(schedule)


# -- sessions --------------------------------------------------------------------------------------------------------


def test_one_session_serves_both_precisions(out: Path) -> None:
    with load(out, threads=1, policy="pattern=abs") as transformer:
        clip(transformer)
        counts = transformer.statistics
        assert (counts.loads, counts.switches) == (1, len(STEPS) - 1)
        assert transformer.loaded == [0, 1, 2, 3]


def test_both_precisions_next_graphs_are_loaded_ahead(tmp_path: Path) -> None:
    """Bins 0, 1 are low, 2, 3 high. Static policies foresee their own only."""
    path, x = write(tmp_path / "out").path, start()
    seen: dict[str, list[list[int]]] = {}
    for policy in ("pattern=itp", "static:low", "static:high"):
        with load(path, threads=1, share=False, policy=policy) as transformer:
            seen[policy] = []
            for t in (1.0, 0.2):
                network(transformer, x[0], t, x[1])
                seen[policy].append(transformer.loaded)
    assert seen["static:low"] == [[0, 1]] * 2 and seen["static:high"] == [[2, 3]] * 2
    assert seen["pattern=itp"] == [[0, 1, 2, 3]] * 2
