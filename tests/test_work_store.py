"""The store of finished work: what comes back is what was put, or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdq_export.plan import Range
from vdq_export.recipe import Recipe
from vdq_export.work import store as work_store
from vdq_export.work import units
from vdq_export.work.engine import Local
from vdq_export.work.store import WorkStore, WorkStoreError, key

KEY = key("unit")


def entry(store: WorkStore, of: str = KEY) -> Path:
    return store.folder / "units" / of[:2] / of


# -- entries ---------------------------------------------------------------------------------------------------------


def test_what_was_put_comes_back_in_this_process_and_the_next(tmp_path: Path) -> None:
    with WorkStore(tmp_path / "work") as store:
        assert store.get(KEY) is None
        assert not store.folder.exists(), "nothing is written before there is something to keep"
        store.put(KEY, b"result")
        store.put(KEY, b"again")
    again = WorkStore(tmp_path / "work")
    assert again.get(KEY) == b"again"
    assert (store.hits, store.misses, again.hits, again.misses) == (0, 1, 1, 0)


@given(data=st.binary(max_size=200), cut=st.integers(0, 300))
def test_a_torn_entry_is_absent(tmp_path_factory: pytest.TempPathFactory, data: bytes, cut: int) -> None:
    store = WorkStore(tmp_path_factory.mktemp("torn"))
    store.put(KEY, data)
    whole = entry(store).read_bytes()
    entry(store).write_bytes(whole[:cut])
    assert store.get(KEY) == (data if cut >= len(whole) else None)
    store.put(KEY, data)
    assert store.get(KEY) == data, "and can be put again"


@given(data=st.binary(max_size=200), where=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_damaged_entry_is_absent(tmp_path_factory: pytest.TempPathFactory, data: bytes, where: int, bit: int) -> None:
    store = WorkStore(tmp_path_factory.mktemp("damaged"))
    store.put(KEY, data)
    raw = bytearray(entry(store).read_bytes())
    raw[where % len(raw)] ^= 1 << bit
    entry(store).write_bytes(raw)
    assert store.get(KEY) is None


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL")
@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.replace", "vdq_export.work.store.sync_folder"])
def test_killed_while_putting_leaves_the_old_entry_or_the_new_one(tmp_path: Path, moment: str) -> None:
    WorkStore(tmp_path).put(KEY, b"old")
    module, name = moment.rsplit(".", 1) if "Path" not in moment else ("pathlib", "Path.replace")
    script = (
        "import os, signal, sys, importlib\n"
        "from vdq_export.work.store import WorkStore\n"
        f"owner = importlib.import_module({module!r})\n"
        f"*path, last = {name!r}.split('.')\n"
        "for one in path: owner = getattr(owner, one)\n"
        "setattr(owner, last, lambda *_: os.kill(os.getpid(), signal.SIGKILL))\n"
        f"WorkStore({str(tmp_path)!r}).put({KEY!r}, b'new')\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    assert WorkStore(tmp_path).get(KEY) == (b"new" if moment.endswith("sync_folder") else b"old")


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("taken")
    with pytest.raises(WorkStoreError, match=r"cannot keep finished work in .*/file: .*; --work DIR puts it elsewhere"):
        WorkStore(tmp_path / "file").put(KEY, b"")


def test_only_keys_name_entries(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no key"):
        WorkStore(tmp_path).get("../" + "0" * 61)


# -- the end ---------------------------------------------------------------------------------------------------------


def test_cleared_work_leaves_nothing(tmp_path: Path) -> None:
    with WorkStore(tmp_path / "work") as store:
        store.put(KEY, b"result")
        store.clear()
    assert list(tmp_path.iterdir()) == []


def test_work_that_another_process_uses_is_not_cleared(tmp_path: Path) -> None:
    one, other = WorkStore(tmp_path / "work"), WorkStore(tmp_path / "work")
    one.put(KEY, b"result")
    other.put(key("other"), b"")
    one.clear()
    assert other.get(KEY) == b"result"
    other.clear()
    assert list(tmp_path.iterdir()) == []


def test_marks_of_dead_processes_hinder_nobody(tmp_path: Path) -> None:
    script = (
        "import os, signal\nfrom vdq_export.work.store import WorkStore\n"
        f"WorkStore({str(tmp_path / 'work')!r}).put({KEY!r}, b'kept')\nos._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 9
    store = WorkStore(tmp_path / "work")
    assert len(list((store.folder / "users").iterdir())) == 1
    assert store.get(KEY) == b"kept"
    store.clear()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_things_in_it_is_not_cleared(tmp_path: Path) -> None:
    store = WorkStore(tmp_path)
    store.put(KEY, b"result")
    (tmp_path / "letter.txt").write_text("dear")
    store.clear()
    assert (tmp_path / "letter.txt").read_text() == "dear" and store.get(KEY) == b"result"


# -- keys ------------------------------------------------------------------------------------------------------------

plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(max_size=5)
    | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=3).map(tuple) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)


def shown(value: Any) -> str:
    """Tells 1, 1.0 and True apart, -0.0 and 0.0 too; a dict's order does not count."""
    if isinstance(value, dict):
        return f"dict({sorted((shown(k), shown(v)) for k, v in value.items())})"
    if isinstance(value, tuple):
        return f"tuple({[shown(one) for one in value]})"
    return f"{type(value).__name__}({value!r})"


@given(plain, plain)
def test_keys_are_equal_exactly_for_equal_parts(one: Any, other: Any) -> None:
    assert (key(one) == key(other)) == (shown(one) == shown(other))


def test_keys_see_type_shape_and_content_of_arrays_and_nothing_of_their_layout() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    others = [array.reshape(3, 2), array.astype(np.float64), array.view(np.int32), -array, array.T]
    assert len({key(one) for one in [array, *others]}) == 6
    assert key(array) == key(np.asfortranarray(array)) == key(np.repeat(array, 2, axis=0)[::2])


def test_keys_see_every_field_of_settings() -> None:
    recipe = Recipe(name="r", summary="s")
    assert key(recipe) == key(Recipe(name="r", summary="s")) != key(msgspec.structs.replace(recipe, tsw=7))
    assert key((1, 2), 3) != key(1, (2, 3))
    with pytest.raises(TypeError, match="object cannot be part of a key"):
        key(object())


def test_another_version_of_the_code_has_other_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key("unit")
    monkeypatch.setattr(work_store, "code_version", lambda: "another")
    assert key("unit") != before


# -- results ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    ranges: tuple[Range, ...]
    tensors: dict[str, np.ndarray[Any, Any]]
    note: float | None = None


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int8, np.int64, "bfloat16", "int4", "float4_e2m1fn"])
def test_results_come_back_bit_for_bit(dtype: Any) -> None:
    kind = np.dtype(getattr(ml_dtypes, dtype) if isinstance(dtype, str) else dtype)
    array = np.arange(6).astype(kind).reshape(2, 3)
    known = Range(lo=-0.1, hi=1 / 3, scale=float(np.float32(0.1)), zero_point=3, why="±")
    result = Result((known,), {"codes": array, "turned": array.T, "empty": array[:0]}, np.float64(0.1))
    back = work_store.decode(work_store.encode(result), Result)
    assert back.ranges == result.ranges and back.note == 0.1
    for name, wanted in result.tensors.items():
        found = back.tensors[name]
        assert (found.dtype, found.shape, found.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())
        assert found.flags.writeable


def test_what_is_no_result_is_refused() -> None:
    with pytest.raises(msgspec.MsgspecError):
        work_store.decode(b"nonsense", Result)
    with pytest.raises(msgspec.MsgspecError):
        work_store.decode(work_store.encode((1, 2)), Result)


# -- units -----------------------------------------------------------------------------------------------------------

DONE: list[int] = []


def square(number: int) -> int:
    DONE.append(number)
    return number * number


def squares(store: WorkStore | None, numbers: range, **choices: Any) -> list[int]:
    DONE.clear()
    light = {"is_light": lambda number: True}  # in this process, so that DONE tells
    return list(units.in_order(Local(2), store, square, numbers, int, name=str, **light, **choices))


def test_only_units_that_are_not_in_the_store_are_done(tmp_path: Path) -> None:
    store = WorkStore(tmp_path)
    assert squares(store, range(2, 5)) == [4, 9, 16]
    assert squares(store, range(6)) == [0, 1, 4, 9, 16, 25]
    assert sorted(DONE) == [0, 1, 5]
    assert squares(store, range(6)) == [0, 1, 4, 9, 16, 25]
    assert DONE == []
    assert squares(None, range(3)) == [0, 1, 4] and sorted(DONE) == [0, 1, 2]


def test_units_that_are_not_worth_it_are_not_kept(tmp_path: Path) -> None:
    store = WorkStore(tmp_path)
    squares(store, range(4), is_worth=lambda number: number > 2)
    assert squares(store, range(4)) == [0, 1, 4, 9]
    assert sorted(DONE) == [0, 1, 2]


def test_what_a_store_holds_of_another_kind_is_computed_again(tmp_path: Path) -> None:
    store = WorkStore(tmp_path)
    store.put(KEY, b"nonsense")
    assert units.once(store, KEY, lambda: (1, 2.5), tuple[int, float]) == (1, 2.5)
    assert units.once(store, KEY, lambda: (0, 0.0), tuple[int, float]) == (1, 2.5)


def test_settings_of_results_stay_as_they_are() -> None:
    """replace() of what came back works: it is the real type."""
    back = work_store.decode(work_store.encode(Result((), {})), Result)
    assert replace(back, note=1.0).note == 1.0
