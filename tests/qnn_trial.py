"""What the Hexagon compiler and its emulator make of a small graph, asked in a process that may crash.

The backend does not only refuse graphs: of some it makes programs that read past their buffers.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import onnx
from onnx.reference import ReferenceEvaluator

from tests.qdq_models import Array
from vdq_export.errors import CompileError
from vdq_export.metrics import bounded_sqnr_db
from vdq_export.targets.qnn import hexagon

NATIVE, FLOATS = 3, (562, 534)  # in the backend's JSON: a tensor inside the graph; float32 and float16


class Outcome(NamedTuple):
    """sqnr_db: emulator against reference evaluator, worst output; floats: values inside the graph left float."""

    refused: str = ""
    sqnr_db: float = 0.0
    floats: int = 0
    crashed: bool = False


def outcome(model: onnx.ModelProto, feeds: dict[str, Array], arch: str) -> Outcome:
    try:
        return _pool().submit(_outcome, model.SerializeToString(), feeds, arch).result(timeout=60)
    except BrokenProcessPool:
        _pool.cache_clear()
        return Outcome(crashed=True)


@cache
def _pool() -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"))  # a fork would inherit threads that do not run


def _outcome(model: bytes, feeds: dict[str, Array], arch: str) -> Outcome:
    with TemporaryDirectory() as folder:
        try:
            session = hexagon.emulator(model, arch, dump_json=Path(folder))
        except CompileError as error:
            return Outcome(refused=str(error))
        floats = sum(_float_values(path) for path in Path(folder).glob("*.json"))
    expected = ReferenceEvaluator(onnx.load_from_string(model)).run(None, feeds)
    return Outcome(sqnr_db=min(map(bounded_sqnr_db, expected, session.run(None, feeds))), floats=floats)


def _float_values(dump: Path) -> int:
    tensors = json.loads(dump.read_bytes()).get("graph", {}).get("tensors", {})
    return sum(tensor["type"] == NATIVE and tensor["data_type"] in FLOATS for tensor in tensors.values())
