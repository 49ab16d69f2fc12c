"""Bundles whose graphs are in parts: the same numbers as whole ones, and nothing run more often than it has to be."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.hoisted_bundle import STEPS, Kind, inputs, write
from vdq_export.bundle import Bundle
from vdq_export.errors import BundleError, ScheduleError
from vdq_export.graph import Array
from vdq_export.plan import Branch
from vdq_export.runtime import families, load
from vdq_export.runtime.ahead import Ahead
from vdq_export.runtime.providers import CPU, Backend
from vdq_export.runtime.transformer import Transformer

BRANCHES: tuple[Branch, ...] = ("cond", "uncond")
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}
OTHER_STEPS = (970.0, 812.5, 640.0, 500.0, 333.0, 4.0)  # of a sampler that nobody calibrated


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hoisted")


def bundle(folder: Path, kind: Kind) -> Path:
    """Each kind is written once."""
    place = folder / "-".join(map(str, [*kind._replace(rows=()), len(kind.rows)]))
    return place if place.exists() else write(place, kind).path


@contextmanager
def unoptimised(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every operator as it stands, in all sessions, on weights that are packed, as when the tables were made."""
    make = Backend.session

    def plain(self: Backend, model: str | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "0")
        return make(self, model, options)

    with monkeypatch.context() as patch:
        patch.setattr(Backend, "session", plain)
        yield


def clip(
    transformer: Transformer, seed: int = 0, steps: Sequence[float] = STEPS, branches: Sequence[str] = BRANCHES
) -> list[Array]:
    """What each call of one clip gives; the second branch has another prompt."""
    call, found = inputs(seed=seed), list[Array]()
    prompts = [inputs(seed=1000 + seed + place)["encoder_hidden_states"] for place, _ in enumerate(branches)]
    for t in steps:
        outputs = []
        for branch, prompt in zip(branches, prompts, strict=True):
            with transformer.cache_context(branch):
                # As pipelines do: arrays made anew for each call.
                call["encoder_hidden_states"] = prompt.copy()
                outputs.append(transformer(**call, timestep=np.array([t], np.float32)).sample)
        call["hidden_states"] = call["hidden_states"] - np.float32(0.1) * np.mean(outputs, axis=0, dtype=np.float32)
        found += outputs
    return found


def clips(whole: Path, parts: Path, steps: Sequence[float] = STEPS, **options: Any) -> tuple[list[Array], list[Array]]:
    with load(whole, threads=1, **options) as one, load(parts, threads=1, **options) as other:
        return clip(one, steps=steps), clip(other, steps=steps)


# -- the same numbers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("branches", [("any",), BRANCHES])
@pytest.mark.parametrize(  # other steps than those of the tables want a graph that makes their values
    ("step", "tables", "steps"),
    [(True, True, STEPS), (True, False, STEPS), (False, True, STEPS), (True, True, OTHER_STEPS),
     (True, False, OTHER_STEPS)],
)  # fmt: skip
def test_a_clip_is_the_whole_graphs_to_the_last_bit(
    folder: Path, monkeypatch: pytest.MonkeyPatch, branches: Any, step: bool, tables: bool, steps: Sequence[float]
) -> None:
    kind = Kind(branches=branches, step=step, tables=tables)
    whole, parts = bundle(folder, Kind(hoist=False, branches=branches)), bundle(folder, kind)
    with unoptimised(monkeypatch):
        expected, found = clips(whole, parts, steps)
    np.testing.assert_array_equal(found, expected)
    assert len({one.tobytes() for one in found}) == len(found)
    np.testing.assert_allclose(*clips(whole, parts, steps), **TOLERANCE)  # the runtime's own fusions


def test_every_part_matters(folder: Path) -> None:
    """The comparison has teeth: another prompt, timestep or expert is far beyond the tolerance."""
    with load(bundle(folder, Kind()), threads=1) as transformer:
        call = inputs()
        base = transformer(**call, timestep=STEPS[0]).sample
        others = [
            transformer(**call, timestep=STEPS[1])[0],
            transformer(
                **{**call, "encoder_hidden_states": call["encoder_hidden_states"] + 1}, timestep=STEPS[0]
            ).sample,
            transformer(**{**call, "mask": 0 * call["mask"]}, timestep=STEPS[0]).sample,
        ]
        assert all(np.abs(other - base).max() > 0.01 for other in others)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), group=st.sampled_from([1, 3]), tables=st.booleans())
def test_any_batch_of_any_timesteps(
    folder: Path, monkeypatch: pytest.MonkeyPatch, data: st.DataObject, group: int, tables: bool
) -> None:
    t = data.draw(st.lists(st.sampled_from([*STEPS, 930.0, 130.0]), min_size=1, max_size=7))
    size, call = len(t), inputs(len(t), seed=len(t))
    prompts = data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size))
    call["encoder_hidden_states"] = call["encoder_hidden_states"][np.minimum(prompts, size - 1)]
    wanted: dict[str, Any] = {"threads": 1, "prefetch": False}
    whole, parts = bundle(folder, Kind(hoist=False, group=group)), bundle(folder, Kind(group=group, tables=tables))
    with unoptimised(monkeypatch), load(whole, **wanted) as one, load(parts, **wanted) as other:
        for _ in range(2):
            expected, found = (x(**call, timestep=np.array(t, np.float32)).sample for x in (one, other))
            np.testing.assert_array_equal(found, expected)


def test_bins_of_one_expert_share_a_session(folder: Path) -> None:
    opened = Bundle.open(bundle(folder, Kind()))
    found = families.find([opened.graph_path(index) for index in range(4)])
    assert [one.bins for one in found] == [(0, 1), (2, 3)]


def test_providers_other_than_the_cpu_run_the_bins_only(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set[tuple[str, str]]()
    make = Backend.session

    def watched(self: Backend, model: str | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
        seen.add((Path(str(model)).stem.split(".")[0], str(self.providers[0])))
        return make(self, model, options)

    monkeypatch.setattr(Backend, "session", watched)
    other = (CPU, {"arena_extend_strategy": "kSameAsRequested"})  # stands for any that is not the plain one
    kind = Kind(branches=BRANCHES)
    with load(bundle(folder, kind._replace(hoist=False)), threads=1) as whole:
        expected = clip(whole)
    seen.clear()
    with load(bundle(folder, kind), threads=1, providers=[other], prefetch=False) as transformer:
        np.testing.assert_allclose(clip(transformer), expected, **TOLERANCE)
    assert seen == {("body", str(other)), ("prompt", CPU), ("mixed", CPU)}


# -- how often -------------------------------------------------------------------------------------------------------


def counts(transformer: Transformer) -> tuple[int, int, int, int]:
    one = transformer.statistics
    return one.prompt_runs, one.step_runs, one.mixed_runs, one.table_hits


def test_prompts_run_once_a_video_and_branch(folder: Path) -> None:
    with load(bundle(folder, Kind(branches=BRANCHES)), threads=1) as transformer:
        clip(transformer)
        # Of each of two experts: two prompts. The upper one has the steps 1000 … 500, the lower one the others.
        assert counts(transformer) == (4, 0, 16, 16)
        clip(transformer, seed=10)  # other prompts
        assert counts(transformer) == (8, 0, 32, 32)
        clip(transformer, seed=10)  # the same ones again: no prompt runs
        assert transformer.statistics.prompt_runs == 8


def test_one_expert_of_one_branch(folder: Path) -> None:
    with load(bundle(folder, Kind()), threads=1) as transformer:
        clip(transformer, steps=STEPS[:4], branches=["any"])
        assert counts(transformer) == (1, 0, 4, 4)


def test_timesteps_without_a_row_run_the_step_graph(folder: Path) -> None:
    with load(bundle(folder, Kind(branches=BRANCHES)), threads=1) as transformer:
        clip(transformer, steps=(990.0, 875.0, 640.0))
        assert counts(transformer) == (2, 2, 6, 2)  # once for both branches
    with load(bundle(folder, Kind(branches=BRANCHES, tables=False)), threads=1) as transformer:
        clip(transformer)
        assert counts(transformer) == (4, 8, 16, 0)


def test_a_timestep_that_went_through_float32_has_its_row(folder: Path) -> None:
    kind = Kind(rows=tuple(t * (1 + 4e-7) for t in STEPS))
    with load(bundle(folder, kind), threads=1) as transformer:
        transformer(**inputs(), timestep=np.float32(875.0))
        assert counts(transformer)[1::2] == (0, 1)
        transformer(**inputs(), timestep=np.float32(875.01))
        assert counts(transformer)[1::2] == (1, 1)


def test_a_prompt_written_in_place_runs_again(folder: Path) -> None:
    """That the array is the same object says nothing; the last bit of one element does."""
    call = inputs()
    prompt = call["encoder_hidden_states"]
    with load(bundle(folder, Kind()), threads=1) as transformer:
        before = transformer(**call, timestep=875.0).sample
        transformer(**call, timestep=875.0)
        assert counts(transformer)[0] == 1
        prompt[-1, 0, -1] = np.nextafter(prompt[-1, 0, -1], np.float32(9))
        transformer(**call, timestep=875.0)
        assert counts(transformer)[0] == 2
        prompt[:] = -prompt
        assert np.abs(transformer(**call, timestep=875.0).sample - before).max() > 0.1
        call["mask"][:] = 0  # the mask is of the prompt, too
        transformer(**call, timestep=875.0)
        assert counts(transformer)[0] == 4
        call["mask"][:] = -0.0
        transformer(**call, timestep=875.0)
        assert counts(transformer)[0] == 5


def test_batches_run_each_prompt_once(folder: Path) -> None:
    """Pipelines put both guidance branches into one batch; the graphs here take one sample."""
    call = inputs(4)
    with load(bundle(folder, Kind()), threads=1) as transformer:
        for t in STEPS[:4]:
            call["hidden_states"] = call["hidden_states"] + 1
            transformer(**call, timestep=t)
        assert counts(transformer) == (4, 0, 16, 16)
    call["encoder_hidden_states"][:] = call["encoder_hidden_states"][:1]
    with load(bundle(folder, Kind()), threads=1) as transformer:
        transformer(**call, timestep=1000.0)
        assert counts(transformer) == (1, 0, 1, 4)  # of one prompt and timestep


def test_threads_share_what_is_computed_ahead(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = bundle(folder, Kind(branches=BRANCHES))
    with unoptimised(monkeypatch), load(path, threads=1) as transformer:
        expected = [clip(transformer, seed) for seed in range(2)]
    with unoptimised(monkeypatch), load(path, threads=1) as transformer, ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda number: clip(transformer, number % 2), range(8)))
        for number, one in enumerate(found):
            np.testing.assert_array_equal(one, expected[number % 2])
        assert counts(transformer)[0] == 2 * 3  # two experts; seeds 0 and 1 have one of their prompts in common


# -- timesteps that nothing is there for -----------------------------------------------------------------------------


def test_without_a_step_graph_the_schedule_says_what_other_timesteps_get(folder: Path) -> None:
    path, call = bundle(folder, Kind(step=False)), inputs()
    with load(path, threads=1) as transformer:
        at_row = transformer(**call, timestep=875.0).sample
        with pytest.warns(UserWarning, match=r"timestep 880 has no row in the tables; using the nearest, of 875"):
            np.testing.assert_array_equal(transformer(**call, timestep=880.0).sample, at_row)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # said once
            transformer(**call, timestep=700.0)
        assert transformer.statistics.table_hits == 1
    with load(path, threads=1, uncalibrated="refuse") as strict:
        strict(**call, timestep=875.0)
        with pytest.raises(ScheduleError, match="timestep 880 has no row"):
            strict(**call, timestep=880.0)


def test_a_timestep_for_each_token_has_no_row(folder: Path) -> None:
    """As models have it whose first frame is given: here every sample of a run has its own."""
    call = {**inputs(3), "timestep": np.array([1000, 875, 875], np.float32)}
    with closing(Ahead(Bundle.open(bundle(folder, Kind(group=3))))) as ahead:
        found = ahead.feeds(0, ["time/Add", "hidden_states"], call)
        assert found["hidden_states"] is call["hidden_states"]
        for t, sample in ((1000.0, 0), (875.0, 1)):
            whole = ahead.feeds(0, ["time/Add"], {**call, "timestep": np.full(3, t, np.float32)})["time/Add"]
            np.testing.assert_allclose(found["time/Add"].numpy()[sample], whole[sample], **TOLERANCE)
        assert (ahead.counts.step_runs, ahead.counts.table_hits) == (1, 2)
    with closing(Ahead(Bundle.open(bundle(folder, Kind(group=3, step=False))))) as ahead:
        with pytest.raises(BundleError, match="one timestep at a time"):
            ahead.feeds(0, ["time/Add"], call)
        with pytest.raises(BundleError, match="nothing in the bundle gives 'unknown'"):
            ahead.feeds(0, ["unknown"], call)


# -- policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["cache=0.05", "cache=9", "cache=0"])
def test_probes_are_given_what_was_computed_ahead(folder: Path, policy: str) -> None:
    """The probe here takes a value of the step part, of the expert whose turn it is. An expert's first step runs."""
    with load(bundle(folder, Kind(with_probe=True)), threads=1, policy=policy) as transformer:
        clip(transformer, branches=["any"])
        counted = transformer.statistics
    expected = {"cache=0.05": 0, "cache=0": 0, "cache=9": 5}[policy]
    assert (counted.reused_steps, counted.steps) == (expected, 8)


def test_closed_is_closed(folder: Path) -> None:
    transformer = load(bundle(folder, Kind()), threads=1)
    transformer(**inputs(), timestep=875.0)
    ahead = transformer._engine._ahead
    assert ahead._prompts.nbytes > 0
    transformer.close()
    assert ahead._prompts.nbytes == ahead._steps.nbytes == 0
    with pytest.raises(BundleError, match="closed"):
        transformer(**inputs(), timestep=875.0)
