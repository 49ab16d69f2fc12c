"""onnxruntime sessions of a bundle's families: weights in memory once, the next one loaded before it is needed.

One family: onnxruntime maps each weight, packs it for its kernels and lets go of the original.
Several: they may read the same weights, which are mapped once and handed to every session as the same values. Two
settings keep it that way: prepacking is off (each session would keep a packed copy of its own; packing in every run is
the price, a quarter of a step's time), and all sessions allocate activations from one arena. Speed before memory:
session_options={"session.disable_prepacking": "0"}.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from vdq_export.errors import BundleError
from vdq_export.runtime.families import Family
from vdq_export.runtime.providers import Backend

SHARING = {"session.disable_prepacking": "1", "session.use_env_allocators": "1"}

_arena_lock = threading.Lock()
_arena_registered = False


class SharedWeights:
    """The external initializers of a bundle's graphs as onnxruntime values, one per place in the store."""

    def __init__(self) -> None:
        self._files: dict[Path, np.ndarray[Any, Any]] = {}
        self._values: dict[tuple[Path, int, int, tuple[int, ...]], ort.OrtValue] = {}
        self._lock = threading.Lock()

    def of_family(self, family: Family) -> dict[str, ort.OrtValue]:
        """{initializer name: value}; 4-bit ones are left to onnxruntime, which maps them itself."""
        model = onnx.load(family.graph, load_external_data=False)
        lifted = family.constants[family.bins[0]]
        found = {}
        for tensor in model.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL and tensor.name not in lifted:
                dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
                if dtype.isbuiltin == 1:
                    found[tensor.name] = self._value(tensor, dtype, family.graph.parent)
        return found

    def _value(self, tensor: onnx.TensorProto, dtype: np.dtype[Any], folder: Path) -> ort.OrtValue:
        fields = {item.key: item.value for item in tensor.external_data}
        file, offset, shape = folder / fields["location"], int(fields.get("offset", 0)), tuple(tensor.dims)
        key = (file, offset, int(tensor.data_type), shape)
        with self._lock:
            if key not in self._values:
                if file not in self._files:
                    self._files[file] = np.memmap(file, dtype=np.uint8, mode="r")
                length = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
                array = self._files[file][offset : offset + length].view(dtype).reshape(shape)
                self._values[key] = ort.OrtValue.ortvalue_from_numpy(array)
            return self._values[key]


class SessionFactory:
    """Makes the session of a family.

    options: onnxruntime config entries; they win over SHARING. threads: of one operator; None lets onnxruntime choose.
    several: more than one of its sessions will be alive. mapped: as the graphs that run ahead want it, see below.
    """

    def __init__(
        self,
        backend: Backend,
        options: Mapping[str, str],
        threads: int | None,
        *,
        several: bool = False,
        mapped: bool = False,
    ) -> None:
        self._backend = backend
        self._mapped = mapped
        self._weights = SharedWeights() if several and backend.on_cpu else None
        self._options = {**(SHARING if self._weights else {}), **options}
        self._threads = threads

    def __call__(self, family: Family) -> ort.InferenceSession:
        """Raises BundleError when onnxruntime refuses the graph or a setting."""
        settings = ort.SessionOptions()
        settings.log_severity_level = 3
        if self._threads:
            settings.intra_op_num_threads = self._threads
        if self._mapped:
            _keep_mapped(settings)
        try:
            if self._options.get("session.use_env_allocators") == "1":
                _share_arena()
            for key, value in self._options.items():
                settings.add_session_config_entry(key, value)
            if family.model:  # bytes have no folder of their own
                folder = str(family.graph.parent)
                settings.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
            if self._weights:
                for name, weight in self._weights.of_family(family).items():
                    settings.add_initializer(name, weight)
            return self._backend.session(family.model or str(family.graph), settings)
        except Exception as error:  # onnxruntime's exceptions share no base class but this one
            raise BundleError(f"onnxruntime cannot load {family.graph}: {str(error).strip()}") from error


def _keep_mapped(settings: ort.SessionOptions) -> None:
    """For graphs that run seldom: weights stay the pages of their file, and one layer's at a time becomes float.

    With its own settings onnxruntime makes integer weights of float inputs into MatMulNBits, which keeps two to three
    times their bytes in memory and rounds the inputs to 8 bits (1.5 % off). Below that level they stay
    DequantizeLinear, which run one at a time in the order that the graphs are written in; nothing that was freed is
    kept for later.
    """
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    settings.enable_cpu_mem_arena = settings.enable_mem_pattern = False
    settings.add_session_config_entry("session.disable_prepacking", "1")


def _share_arena() -> None:
    """Give the process one arena for the sessions that ask for it; onnxruntime accepts one only."""
    global _arena_registered
    with _arena_lock:
        if not _arena_registered:
            where = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
            with suppress(RuntimeError):  # another library in this process registered one: that one is shared
                ort.create_and_register_allocator(where, None)
            _arena_registered = True


class SessionPool:
    """Sessions by number, loaded on background threads. Thread-safe; a session in use outlives its eviction."""

    def __init__(self, load: Callable[[int], ort.InferenceSession]) -> None:
        self._load = load
        self._lock = threading.Lock()
        self._futures: dict[int, Future[ort.InferenceSession]] = {}
        # Two: a graph that is needed now does not queue behind one that was only expected.
        self._executor = ThreadPoolExecutor(max_workers=2, thread_name_prefix="vdq-load")
        self._closed = False
        self.loads = 0

    def prefetch(self, index: int) -> Future[ort.InferenceSession]:
        """Start loading unless that has happened."""
        with self._lock:
            if self._closed:
                raise BundleError("the transformer was closed")
            future = self._futures.get(index)
            if future is None:
                future = self._futures[index] = self._executor.submit(self._load, index)
                self.loads += 1
            return future

    def get(self, index: int) -> tuple[ort.InferenceSession, float]:
        """The session and the seconds waited for it.

        Raises BundleError when it does not load (the next call tries again) and after close().
        """
        start = time.perf_counter()
        future = self.prefetch(index)
        try:
            session = future.result()
        except CancelledError:  # dropped by another thread's keep() before it began
            return self.get(index)
        except BaseException:
            with self._lock:
                if future.done() and self._futures.get(index) is future:
                    del self._futures[index]
            raise
        return session, time.perf_counter() - start

    def keep(self, wanted: Iterable[int]) -> None:
        """Drop every session that is not wanted any more."""
        with self._lock:
            for index in self._futures.keys() - set(wanted):
                self._futures.pop(index).cancel()

    @property
    def loaded(self) -> list[int]:
        """Numbers of the sessions held or being loaded, ascending."""
        with self._lock:
            return sorted(self._futures)

    def close(self) -> None:
        """Drop all sessions and end the threads; idempotent."""
        with self._lock:
            self._closed = True
            self._futures.clear()
        self._executor.shutdown(wait=True, cancel_futures=True)
