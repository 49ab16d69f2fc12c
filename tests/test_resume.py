"""An export that was cut short, anywhere, ends in the bundle it would have made without; and does no unit twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from filecmp import cmpfiles
from pathlib import Path
from typing import Any

import pytest

from tests import calib_cases as cases
from tests import resume_cases
from tests.commands import ENVIRONMENT, ROOT
from vdq_export import pipeline
from vdq_export.calib import observe as observing
from vdq_export.calib import step_reuse, values
from vdq_export.calib.observe import observe
from vdq_export.calib.record import CalibrationRecord
from vdq_export.calib.statistics import Seen
from vdq_export.calib.trajectories import Keyed, Runs, digest
from vdq_export.contract import PassContext
from vdq_export.errors import EngineError
from vdq_export.model import Trajectory
from vdq_export.recorded import Recorded, save
from vdq_export.samples import digits
from vdq_export.work.engine import Local, load
from vdq_export.work.place import at_work
from vdq_export.work.store import WorkStore

TRAJECTORIES = [cases.steps(seed=s) for s in range(3)]
CALLS = 12  # of each


# -- whole exports, killed -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    if os.name != "posix":
        pytest.skip("fork and SIGKILL")
    folder = tmp_path_factory.mktemp("killed")
    command = [sys.executable, "-m", "tests.resume_cases", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True)
    return folder, [json.loads(line) for line in done.stdout.splitlines()]


def test_killed_exports_leave_their_work_and_no_bundle(killed: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (*cut, last, whole) = killed
    assert [one["point"] for one in cut] == list(resume_cases.POINTS)
    assert {one["code"] for one in cut} == {-9}
    for one in cut:
        partial, work = one["left"]
        assert (partial.startswith("out.partial-"), work) == (True, "out.work"), "nothing of the one before"
    assert (last["code"], last["left"]) == (0, ["out"]) and whole["code"] == 0


def test_the_bundle_is_the_one_without_interruption(killed: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, _ = killed
    assert sorted(one.name for one in folder.iterdir()) == ["out", "whole"]
    files = sorted(str(p.relative_to(folder / "whole")) for p in (folder / "whole").rglob("*") if p.is_file())
    assert files == sorted(str(p.relative_to(folder / "out")) for p in (folder / "out").rglob("*") if p.is_file())
    same, different, unreadable = cmpfiles(folder / "whole", folder / "out", files, shallow=False)
    assert (different, unreadable) == ([], []) and "manifest.json" in same


def test_no_unit_is_done_twice(killed: tuple[Path, list[dict[str, Any]]]) -> None:
    _, (*cut, last, whole) = killed
    needed = set(whole["put"])
    assert len(needed) > 5 and whole["taken"] == []
    state = whole["put"][0]  # of calibration, which is put again after each trajectory
    put = [key for one in [*cut, last] for key in one["put"]]
    assert put.count(state) == 2 and len(put) - 1 == len(set(put)), "two trajectories, and each group once"
    assert set(put) == needed
    assert last["put"] == [] and set(last["taken"]) == needed, "the last one had nothing left to do but write"


# -- calibration -----------------------------------------------------------------------------------------------------


class Stopped(Exception):
    pass


def interrupted(store: WorkStore, after: int, trajectories: Any = TRAJECTORIES) -> None:
    """Calibration that ends before its call number `after` + 1 is counted."""

    def stop(done: int, total: int | None) -> None:
        if done == after:
            raise Stopped

    model = cases.model()
    model.trajectories = trajectories
    with pytest.raises(Stopped):
        observe(cases.graph(), model, progress=stop, store=store)


def same(one: CalibrationRecord, other: CalibrationRecord) -> bool:
    arrays = [{(v.name, n): a.tobytes() for v in r.values.values() for n, a in v.tensors.items()} for r in (one, other)]
    return arrays[0] == arrays[1] and replace(one, values={}) == replace(other, values={})


def begun(trajectories: Any, store: WorkStore, wanted: CalibrationRecord) -> int:
    """The number of the first call that was made to get the record that is wanted."""
    model, ticks = cases.model(), list[int]()
    model.trajectories = trajectories
    assert same(observe(cases.graph(), model, store=store, progress=lambda done, _: ticks.append(done)), wanted)
    return ticks[0]


@pytest.fixture(scope="module")
def whole() -> CalibrationRecord:
    return observe(cases.graph(), cases.model(TRAJECTORIES))


@pytest.mark.parametrize("after", [1, CALLS, CALLS + 1, 2 * CALLS, 3 * CALLS - 1, 3 * CALLS])
def test_calibration_goes_on_behind_the_last_finished_trajectory(
    after: int, whole: CalibrationRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observing, "WORTH", 0)
    store, ticks = WorkStore(tmp_path), list[tuple[int, int | None]]()
    interrupted(store, after)
    record = observe(cases.graph(), cases.model(TRAJECTORIES), store=store, progress=lambda *tick: ticks.append(tick))
    assert same(record, whole)
    finished = (after - 1) // CALLS  # a trajectory whose last call was just made is not counted yet
    assert ticks[0] == (finished * CALLS + 1, 3 * CALLS) and ticks[-1] == (3 * CALLS, 3 * CALLS)


def test_a_finished_calibration_runs_nothing(whole: CalibrationRecord, tmp_path: Path) -> None:
    store = WorkStore(tmp_path)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(observing, "WORTH", 0)
        observe(cases.graph(), cases.model(TRAJECTORIES), store=store)
        patch.setattr(observing.ort, "session", None)
        assert same(observe(cases.graph(), cases.model(TRAJECTORIES), store=store), whole)


def test_other_trajectories_weights_or_settings_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observing, "WORTH", 0)
    store = WorkStore(tmp_path)
    observe(cases.graph(), cases.model(TRAJECTORIES[:2]), store=store)
    others = [TRAJECTORIES[1], TRAJECTORIES[0]], [TRAJECTORIES[0]], TRAJECTORIES
    for trajectories, first in zip(others, (1, 1, 2 * CALLS + 1), strict=True):
        observe(cases.graph(), cases.model(TRAJECTORIES[:2]), store=store)
        wanted = observe(cases.graph(), cases.model(trajectories))
        assert begun(trajectories, store, wanted) == first
    assert same(
        observe(cases.graph(cases.weights(1)), cases.model(TRAJECTORIES), store=store),
        observe(cases.graph(cases.weights(1)), cases.model(TRAJECTORIES)),
    )
    assert observe(cases.graph(), cases.model(TRAJECTORIES), rows=4, store=store).value("norm/Mul").rows is not None


def test_keeping_what_was_seen_costs_a_small_share_of_seeing_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds, store, puts = [0.0], WorkStore(tmp_path), list[str]()

    def passed(more: float) -> None:
        seconds[0] += more

    def put(key: str, data: bytes) -> None:
        puts.append(key)
        passed(2)

    monkeypatch.setattr(observing.time, "monotonic", lambda: seconds[0])
    monkeypatch.setattr(store, "put", put)
    model = cases.model([cases.steps(1, seed=s) for s in range(30)])
    observe(cases.graph(), model, store=store, progress=lambda done, total: passed(0.5))  # two calls a trajectory
    assert len(puts) == 2, "after the first second, and when twenty more have passed"


@pytest.mark.parametrize("engine", [Local(2)])
def test_trajectories_in_other_processes_give_the_same_record(engine: Local, whole: CalibrationRecord) -> None:
    engine.is_remote = True  # as if its processes were far away
    assert same(observe(cases.graph(), cases.model(TRAJECTORIES), engine=engine), whole)


def test_an_error_in_another_process_names_timestep_and_layer() -> None:
    engine = Local(1)
    engine.is_remote = True
    bad = cases.steps(2)
    bad[2]["inputs"]["x"][0, 2, 3] = float("nan")
    with pytest.raises(Exception, match=r"input of attn.to_q, .* at timestep 50 \(cond\)"):
        observe(cases.graph(), cases.model([bad]), engine=engine)


def test_what_was_seen_survives_the_disk_bit_for_bit() -> None:
    job = observing.Job("", cases.graph(), tuple(observing.observed_values(cases.graph())), 4, 2**20, 1)
    seen = job.run(5, TRAJECTORIES[0])
    back = Seen.from_bytes(seen.to_bytes())
    assert (back.first, back.trajectories, back.calls, back.constant) == (5, 1, CALLS, seen.constant)
    assert back.slots == seen.slots
    assert back.to_bytes() == seen.to_bytes()


# -- trajectories that need not be made again ------------------------------------------------------------------------


class Made(Keyed):
    """Trajectories that count how often each is made."""

    def __init__(self) -> None:
        self.made: list[int] = []

    def __len__(self) -> int:
        return 3

    def keys(self) -> tuple[str, ...]:
        return ("a", "b", "c")

    def __getitem__(self, number: int) -> Trajectory:
        self.made.append(number)
        return TRAJECTORIES[number]

    def __iter__(self) -> Iterator[Trajectory]:
        return (self[number] for number in range(3))


def test_finished_trajectories_are_not_made_again(
    whole: CalibrationRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observing, "WORTH", 0)
    store, first, second = WorkStore(tmp_path), Made(), Made()
    interrupted(store, CALLS + 1, first)
    assert first.made == [0, 1]
    assert begun(second, store, whole) == CALLS + 1
    assert second.made == [1, 2]


def test_a_source_that_only_iterates_is_read_again(
    whole: CalibrationRecord, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observing, "WORTH", 0)
    store = WorkStore(tmp_path)
    source: Any = lambda: iter(TRAJECTORIES)  # noqa: E731
    interrupted(store, CALLS + 1, source)
    assert begun(source, store, whole) == CALLS + 1


def test_digests_see_every_bit_of_every_step() -> None:
    assert digest(cases.steps(2)) == digest(cases.steps(2)) != digest(cases.steps(2, seed=1))
    other = cases.steps(2)
    other[3]["inputs"]["x"][0, 0, 0] += 1e-6
    assert digest(other) != digest(cases.steps(2))


def test_samples_and_recordings_say_what_their_trajectories_depend_on(tmp_path: Path) -> None:
    for number, trajectory in enumerate(TRAJECTORIES[:2]):
        save(trajectory, tmp_path / f"{number}.safetensors")
    recorded = Recorded(tmp_path)
    model = cases.model(TRAJECTORIES)
    model.trajectories = recorded
    assert Runs(model).keys is not None and len(set(recorded.keys())) == 2
    assert digest(recorded[1]) == digest(TRAJECTORIES[1])
    before = recorded.keys()
    save(TRAJECTORIES[2], tmp_path / "1.safetensors")
    assert recorded.keys()[0] == before[0] and recorded.keys()[1] != before[1]
    sample = digits.load(calibration_cases=2).trajectories
    assert isinstance(sample, Keyed) and len(set(sample.keys())) == 2


# -- the other things that look at data ------------------------------------------------------------------------------


def test_extremes_of_all_values_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, model = WorkStore(tmp_path), cases.model(TRAJECTORIES)
    wanted = values.observe_values(cases.graph(), model)
    assert values.observe_values(cases.graph(), model, store=store) == wanted
    monkeypatch.setattr(values.ort, "session", None)
    assert values.observe_values(cases.graph(), model, store=store) == wanted
    assert (store.hits, store.misses) == (1, 1)


def test_the_polynomial_of_step_reuse_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, traced: Any, tiny: Any
) -> None:
    store, graph = WorkStore(tmp_path), traced.copy()
    pipeline.run_passes(graph, pipeline.CANONICAL, PassContext())
    wanted = step_reuse.learn(graph, tiny).coefficients
    assert step_reuse.learn(graph, tiny, store=store).coefficients == wanted
    monkeypatch.setattr(step_reuse.ort, "session", None)
    assert step_reuse.learn(graph, tiny, store=store).coefficients == wanted


# -- where it is kept ------------------------------------------------------------------------------------------------


def test_work_lies_beside_the_bundle_until_it_is_there(tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    with pytest.raises(Stopped), at_work(out, workers=1) as place:
        assert place.store is not None
        place.store.put("0" * 64, b"")
        raise Stopped
    assert [one.name for one in tmp_path.iterdir()] == ["bundle.work"]
    with at_work(out, workers=1) as place:
        assert place.store is not None and place.store.get("0" * 64) == b""
    assert list(tmp_path.iterdir()) == []


def test_work_in_a_folder_of_ones_own_stays(tmp_path: Path) -> None:
    with at_work(tmp_path / "bundle", work=tmp_path / "mine") as place:
        assert place.store is not None
        place.store.put("0" * 64, b"")
    assert [one.name for one in tmp_path.iterdir()] == ["mine"]
    with at_work(work=place) as again:
        assert again is place
    with at_work() as nothing:
        assert nothing.store is None


@pytest.mark.parametrize(
    ("name", "hint"), [("slurm", "known: local, ray, ray://HOST:PORT"), ("lcal", "did you mean local")]
)
def test_an_unknown_engine_is_said(name: str, hint: str) -> None:
    with pytest.raises(EngineError, match=f"unknown engine '{name}'; {hint}"):
        load(name)
