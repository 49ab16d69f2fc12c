"""Tables of configurations: which rule decides, what damaged ones are told, tuning on a device (a pretended one)."""

from __future__ import annotations

import copy
import json
import os
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton has wheels for Linux only")

from vdq_export.errors import UnknownNameError
from vdq_export.targets.cuda.kernels import _config, _tuning
from vdq_export.targets.cuda.kernels._config import ARCHS, Config, ConfigError

KERNELS = ("attention", "linear_fp8", "linear_int4", "linear_int8", "linear_weight_only", "normalize", "rope")
SHAPE = {"m": 4096, "n": 1536, "k": 1536}


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_architecture_has_every_kernel(arch: str, kernel: str) -> None:
    with _config.assume(arch):
        assert f"sm_{_config.capability()[0]}{_config.capability()[1]}" == arch == _config.arch()
        for m in (1, 17, 512, 32760):
            assert _config.config(kernel, m=m, n=1536, k=128, group=0)["num_warps"] in (1, 2, 4, 8, 16)


def test_a_kernel_that_an_architecture_cannot_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_config, "table", lambda name: {**_table([]), "unsupported": {"two": "no such instruction"}})
    with pytest.raises(ConfigError, match="two does not run on sm_90: no such instruction"):
        _config.config("two", **SHAPE)


def test_the_first_rule_that_fits_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    rules = [_rule(1, m=[1, 16], group=[32]), _rule(2, m=[1, 16]), _rule(4, m=[17, None]), _rule(8)]
    monkeypatch.setattr(_config, "table", lambda name: _table(rules))
    chosen = {(m, group): _config.rule("sm_90", "one", {"m": m, "n": 1, "k": 1}, {"group": group})["num_warps"]
              for m in (0, 16, 17, 10**6) for group in (0, 32)}  # fmt: skip
    assert chosen == {(0, 0): 8, (0, 32): 8, (16, 0): 2, (16, 32): 1, (17, 0): 4, (17, 32): 4, (10**6, 0): 4,
                      (10**6, 32): 4}  # fmt: skip


def test_what_is_handed_out_is_a_copy() -> None:
    _config.config("rope", **SHAPE)["num_warps"] = 3
    assert _config.config("rope", **SHAPE)["num_warps"] != 3


def _damage_unknown_field(table: Any) -> None:
    table["kernels"]["one"][0]["color"] = 1


def _damage_power(table: Any) -> None:
    table["kernels"]["one"][0]["config"]["num_warps"] = 3


def _damage_type(table: Any) -> None:
    table["kernels"]["one"][0]["config"]["num_stages"] = "3"


def _damage_range(table: Any) -> None:
    table["kernels"]["one"][0]["when"]["m"] = [1]


def _damage_last(table: Any) -> None:
    table["kernels"]["one"].pop()


def _damage_keys(table: Any) -> None:
    table["kernels"]["one"][1]["config"]["BLOCK_M"] = 64


def _damage_both(table: Any) -> None:
    table["unsupported"]["one"] = "no reason"


def _damage_whole(table: Any) -> None:
    del table["note"]


DAMAGES: dict[Callable[[Any], None], str] = {
    _damage_unknown_field: "rule 0: a rule has when, why, config",
    _damage_power: "rule 0: num_warps cannot be 3",
    _damage_type: "rule 0: num_stages cannot be '3'",
    _damage_range: "is no condition",
    _damage_last: "the last rule does not fit everything",
    _damage_keys: "rule 1: not the parameters of the first rule",
    _damage_both: "one is said to be unsupported and has rules",
    _damage_whole: "not a table of configurations",
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_table_is_told(damage: Callable[[Any], None]) -> None:
    table = _table([_rule(4, m=[1, 16]), _rule(8)])
    assert _config.check(copy.deepcopy(table), "sm_90.json") == table
    damage(table)
    with pytest.raises(ConfigError, match=r"sm_90\.json") as told:
        _config.check(table, "sm_90.json")
    assert DAMAGES[damage] in str(told.value)


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 6), "sm_89"), ((8, 9), "sm_89"), ((9, 0), "sm_90"), ((10, 3), "sm_100"),
     ((12, 1), "sm_120"), ((13, 0), "sm_120")],
)  # fmt: skip
def test_a_device_has_the_next_older_table(capability: tuple[int, int], arch: str) -> None:
    assert _config.nearest(*capability) == arch


def test_devices_and_names_that_are_not_known() -> None:
    with pytest.raises(ConfigError, match="sm_75 is older than sm_80"):
        _config.nearest(7, 5)
    with pytest.raises(UnknownNameError, match="did you mean sm_90"), _config.assume("sm_91"):
        pass
    with pytest.raises(UnknownNameError, match="did you mean linear_int"):
        _config.config("linear_int", **SHAPE)


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A pretended H200 that can be timed; the folder of the user."""
    monkeypatch.setenv("VDQ_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "pretended")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    _config._of_device.cache_clear()
    _tuning.forget()
    yield tmp_path
    _config._of_device.cache_clear()
    _tuning.forget()


def _fastest(monkeypatch: pytest.MonkeyPatch, best: Config) -> list[Config]:
    """Timing says that `best` is fastest, the second candidate does not run; what was timed is listed."""
    timed: list[Config] = []

    def seconds(one: Config, run: object) -> float | None:
        timed.append(one)
        return None if len(timed) == 2 else 1.0 + (one != best)

    monkeypatch.setattr(_tuning, "_seconds", seconds)
    return timed


def _candidates() -> list[Config]:
    return _config.candidates("linear_int8", "sm_90", SHAPE, {"group": 0})


def _ask(**kind: object) -> Config:
    return _config.config("linear_int8", lambda one: None, **SHAPE, **kind)  # type: ignore[arg-type]


def test_tuning_times_once_and_remembers(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = _candidates()[-1]
    assert best != _candidates()[0] and _ask(group=0) == _candidates()[0], "off until it is asked for"
    timed = _fastest(monkeypatch, best)
    with _tuning.tuning():
        assert _ask(group=0) == best
        assert timed == _candidates()
        assert _ask(group=0) == best and len(timed) == len(_candidates()), "remembered"
    assert _ask(group=0) == best, "also where tuning is off"
    _tuning.forget()
    assert _ask(group=0) == best, "also in another process"
    assert _ask(group=64) != best, "of another question nothing is known"


def test_nothing_is_timed_during_capture_or_on_another_architecture(
    device: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = _fastest(monkeypatch, _candidates()[-1])
    with _tuning.tuning():
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert _ask(group=0) == _candidates()[0] and not timed
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        with _config.assume("sm_90"):
            assert _ask(group=0) == _candidates()[0] and not timed
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert _ask(group=0) == _candidates()[0] and not timed


WRONG_VALUE = {"config": {"num_warps": 5, "num_stages": 1}}
WRONG_KEYS = {"config": {"num_warps": 4, "num_stages": 1}}
WRONG_QUESTION = {"question": {}}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe", WRONG_VALUE, WRONG_KEYS, WRONG_QUESTION])
def test_a_damaged_result_is_ignored_with_a_warning(
    device: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | dict[str, Any]
) -> None:
    _fastest(monkeypatch, _candidates()[-1])
    with _tuning.tuning():
        _ask(group=0)
    (place,) = (device / "tuned").iterdir()
    written = json.loads(place.read_text())
    place.write_bytes(content if isinstance(content, bytes) else json.dumps({**written, **content}).encode())
    _tuning.forget()
    with pytest.warns(UserWarning, match=f"{place.name} is ignored"):
        assert _ask(group=0) == _candidates()[0]


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="needs a folder that refuses")
def test_a_folder_that_cannot_be_written(device: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device.chmod(0o500)
    _fastest(monkeypatch, _candidates()[-1])
    with _tuning.tuning(), pytest.warns(UserWarning, match="is not written"):
        assert _ask(group=0) == _candidates()[-1]


def test_many_writers_leave_one_whole_result(device: Path) -> None:
    answers = [{"num_warps": 2**number, "num_stages": 1} for number in range(5)]
    writers = [threading.Thread(target=lambda one=one: [_tuning._write('{"a": 1}', one) for _ in range(20)])  # type: ignore[misc]
               for one in answers]  # fmt: skip
    for writer in writers:
        writer.start()
    for _ in range(100):
        with warnings.catch_warnings(action="error"):
            assert _tuning._read('{"a": 1}', answers[0].keys()) in [None, *answers]
    for writer in writers:
        writer.join()
    assert len(list((device / "tuned").iterdir())) == 1, "no draft is left"


def _rule(warps: int, **when: Any) -> dict[str, Any]:
    return {"when": when, "why": "a test", "config": {"num_warps": warps, "num_stages": 1}}


def _table(rules: list[dict[str, Any]]) -> dict[str, Any]:
    return {"device": "a device", "note": "", "unsupported": {}, "kernels": {"one": rules}}
