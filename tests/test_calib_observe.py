"""Observation on a hand-made graph, against values computed from its definition."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests import calib_cases as cases
from vdq_export.calib.observe import observe, observed_values
from vdq_export.calib.record import CalibrationRecord
from vdq_export.errors import CalibrationError, VdqError
from vdq_export.model import Step

TRAJECTORIES = [cases.steps(seed=s) for s in range(3)]


@pytest.fixture(scope="module")
def record() -> CalibrationRecord:
    return observe(cases.graph(), cases.model(TRAJECTORIES))


def test_watches_each_value_once_with_all_its_readers() -> None:
    found = {o.name: o for o in observed_values(cases.graph())}
    assert found["norm/Mul"].readers == ("attn.to_q", "attn.to_k", "attn.to_v")
    assert {n for n, o in found.items() if o.kind == "attention"} == {
        "attn.to_q/Add", "attn/Transpose", "attn/Softmax", "attn.to_v/Add",
    }  # fmt: skip
    assert found["context"].kind == "linear", "a graph input that a linear reads directly"


def test_extremes_and_peaks_are_those_of_all_tokens(record: CalibrationRecord) -> None:
    truth = cases.hidden(TRAJECTORIES)
    seen = record.value("norm/Mul")
    peak, rows = seen.linear()
    assert record.slots == tuple(sorted(truth, key=lambda s: (-s.t, s.branch)))
    for index, slot in enumerate(record.slots):
        x = truth[slot]
        # ORT may fuse or reorder the two float32 operations before the product: a few units in the last place
        np.testing.assert_allclose(seen.lo[index], x.min(axis=0), rtol=1e-6)
        np.testing.assert_allclose(seen.hi[index], x.max(axis=0), rtol=1e-6)
        by_call = np.abs(x).reshape(3, cases.TOKENS, -1).max(axis=1).mean(axis=0)
        np.testing.assert_allclose(peak[index], by_call, rtol=1e-6)
        assert seen.count[index] == len(x) == 21
        distances = np.abs(rows[index][:, None] - x[None]).max(axis=2)
        assert distances.min(axis=1).max() < 1e-5, "a sampled row is a row that was there"
        assert len(set(distances.argmin(axis=1).tolist())) == 21, "fewer rows than asked for: each is drawn once"


def test_sample_is_bounded_and_without_repeats() -> None:
    seen = observe(cases.graph(), cases.model(TRAJECTORIES), rows=4).value("norm/Mul")
    _, rows = seen.linear()
    assert rows.shape == (12, 4, cases.WIDTH)
    assert all(len(np.unique(r, axis=0)) == 4 for r in rows)


def test_rows_of_largest_norm_are_kept_whichever_call_has_them(record: CalibrationRecord) -> None:
    seen = record.value("norm/Mul")
    assert seen.top is not None and seen.top.shape == (12, 4, cases.WIDTH)
    calls = set()
    for index, x in enumerate(cases.hidden(TRAJECTORIES)[slot] for slot in record.slots):
        norms = np.linalg.norm(x, axis=1)
        order = np.argsort(-norms)
        np.testing.assert_allclose(seen.top[index], x[order[:4]], rtol=1e-6, atol=1e-6)  # as above
        calls |= {int(k) // cases.TOKENS for k in order[:4]}
    assert calls == {0, 1, 2}, "the case is no test otherwise: an implementation that keeps one call's rows must fail"


def test_rows_of_some_slots(record: CalibrationRecord) -> None:
    seen = record.value("norm/Mul")
    rows = seen.linear()[1]
    np.testing.assert_array_equal(seen.sample([2, 5]), rows[[2, 5]].reshape(-1, cases.WIDTH))
    assert seen.top is not None
    both = seen.sample([2, 5], top=True)
    assert len(both) == 2 * (4 + rows.shape[1])
    np.testing.assert_array_equal(both[:4], seen.top[2])


def test_graph_input_read_by_a_linear_is_observed(record: CalibrationRecord) -> None:
    first = TRAJECTORIES[0][0]["inputs"]["context"].numpy()
    assert (record.value("context").lo[0] <= first[0].min(axis=0)).all()


def test_attention_operands_have_extremes_only(record: CalibrationRecord) -> None:
    softmax = record.value("attn/Softmax")
    assert softmax.lo.shape == (12, cases.TOKENS)
    assert 0 <= softmax.lo.min() <= softmax.hi.max() <= 1
    with pytest.raises(CalibrationError, match="not calibrated as the input of a linear"):
        softmax.linear()


def test_split_into_sessions_changes_nothing(record: CalibrationRecord) -> None:
    split = observe(cases.graph(), cases.model(TRAJECTORIES), limit=1)  # every value in a session of its own
    for name, value in record.values.items():
        for what, array in value.tensors.items():
            np.testing.assert_allclose(
                split.value(name).tensors[what], array, rtol=1e-6, atol=1e-7, err_msg=f"{name} {what}"
            )


def test_progress_counts_calls() -> None:
    ticks: list[tuple[int, int | None]] = []
    observe(cases.graph(), cases.model(TRAJECTORIES), progress=lambda done, total: ticks.append((done, total)))
    assert ticks[0] == (1, 36) and ticks[-1] == (36, 36)


def test_trajectories_may_be_a_callable_that_yields() -> None:
    made = cases.model(TRAJECTORIES)
    made.trajectories = lambda: iter(TRAJECTORIES)
    ticks: list[int | None] = []
    assert observe(cases.graph(), made, progress=lambda _, total: ticks.append(total)).calls == 36
    assert set(ticks) == {None}


def test_bfloat16_inputs_are_fed_as_the_graph_wants_them() -> None:
    def lower(step: Step) -> None:
        step["inputs"]["x"] = step["inputs"]["x"].to(torch.bfloat16)

    made = cases.model([cases.steps(1)])
    made.trajectories = [cases.steps(1, change=lower)]
    assert observe(cases.graph(), made).calls == 2


def test_nan_names_layer_and_timestep() -> None:
    def spoil(step: Step) -> None:
        if step["t"] < 300 and step["branch"] == "uncond":
            step["inputs"]["x"][0, 2, 3] = float("nan")

    with pytest.raises(CalibrationError, match=r"input of attn.to_q, .* at timestep 240 \(uncond\)"):
        observe(cases.graph(), cases.model([cases.steps(change=spoil)]))


def test_nan_that_no_linear_reads_is_found_in_the_output() -> None:
    arrays = cases.weights()
    arrays["attn.to_o.bias"][0] = np.inf
    with pytest.raises(CalibrationError, match="output out at timestep 1000"):
        observe(cases.graph(arrays), cases.model(TRAJECTORIES))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["inputs"].pop("context"), "no input context at timestep 1000"),
        (lambda s: s["inputs"].update(x=torch.zeros(1, 3, cases.WIDTH)), r"step 0: input 'x' is float32 \[1, 3, 6\]"),
    ],
)
def test_inputs_that_do_not_fit(change: object, message: str) -> None:
    made = cases.model()
    made.trajectories = [cases.steps(change=change)]  # type: ignore[arg-type]
    with pytest.raises(VdqError, match=message):
        observe(cases.graph(), made)


def test_no_trajectories() -> None:
    with pytest.raises(CalibrationError, match="no trajectories"):
        observe(cases.graph(), cases.model([]))


# -- the file --------------------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same(record: CalibrationRecord, tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    record.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    again = CalibrationRecord.load(path, record.graph_hash)
    assert (again.slots, again.model_hash, again.calls) == (record.slots, "weights-of-the-test", 36)
    for name, value in record.values.items():
        assert again.value(name).readers == value.readers
        for what, array in value.tensors.items():
            np.testing.assert_array_equal(again.value(name).tensors[what], array)
    copy = tmp_path / "again.safetensors"
    again.save(copy)
    assert copy.read_bytes() == path.read_bytes()


def test_record_of_another_graph(record: CalibrationRecord, tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    record.save(path)
    other = cases.graph(cases.weights(1)).hash()
    with pytest.raises(CalibrationError, match=f"another model.*{record.graph_hash[:12]}.*{other[:12]}"):
        CalibrationRecord.load(path, other)


@pytest.mark.parametrize(
    ("what", "cut"), [("peak", (slice(3),)), ("rows", (slice(3),)), ("top", (slice(None), slice(None), slice(2)))]
)
def test_arrays_of_another_shape(record: CalibrationRecord, tmp_path: Path, what: str, cut: tuple[slice, ...]) -> None:
    value = record.value("attn/MatMul_1")
    spoilt = type(value)(**{**_fields(value), what: value.tensors[what][cut]})
    path = tmp_path / "calibration.safetensors"
    type(record)(**{**_fields(record), "values": {**record.values, value.name: spoilt}}).save(path)
    with pytest.raises(CalibrationError, match="sampled rows do not fit 12 slots"):
        CalibrationRecord.load(path)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_file(record: CalibrationRecord, tmp_path: Path, keep: int) -> None:
    path = tmp_path / "calibration.safetensors"
    record.save(path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CalibrationError, match="missing or damaged"):
        CalibrationRecord.load(path)


def test_missing_file_and_foreign_file(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    with pytest.raises(CalibrationError, match="missing or damaged"):
        CalibrationRecord.load(tmp_path / "none.safetensors")
    save_file({"a": np.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(CalibrationError, match="no calibration record"):
        CalibrationRecord.load(tmp_path / "foreign.safetensors")


def test_nan_in_a_file_names_layer_and_timestep(record: CalibrationRecord, tmp_path: Path) -> None:
    value = record.value("attn/MatMul_1")
    hi = value.hi.copy()
    hi[3, 1] = np.nan
    values = {**record.values, value.name: type(value)(**{**_fields(value), "hi": hi})}
    path = tmp_path / "calibration.safetensors"
    type(record)(**{**_fields(record), "values": values}).save(path)
    spoilt = CalibrationRecord.load(path)
    spoilt.value("norm/Mul")  # another one, which is sound
    with pytest.raises(CalibrationError, match=r"input of attn.to_o at timestep 810 \(uncond\)"):
        spoilt.value(value.name)


def _fields(item: object) -> dict[str, object]:
    return {name: getattr(item, name) for name in type(item).__dataclass_fields__}  # type: ignore[attr-defined]
