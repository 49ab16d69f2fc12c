"""Runs a bundle's probe graphs, which give the modulated input that step reuse looks at."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import onnxruntime as ort

from vdq_export.manifest import Signature
from vdq_export.policy import CachePolicy
from vdq_export.runtime import families
from vdq_export.runtime.ahead import Ahead, bind
from vdq_export.runtime.batching import Array, batch_of, run_batched
from vdq_export.runtime.families import Family


class Probes:
    """The probes of a bundle in the folder `root`, each loaded when it is first asked for. Thread-safe."""

    def __init__(
        self,
        root: Path,
        policy: CachePolicy | None,
        signature: Signature,
        make: Callable[[Family], ort.InferenceSession],
        ahead: Ahead,
    ) -> None:
        self._root = root
        self._policy = policy
        self._signature = signature
        self._make = make
        self._ahead = ahead
        self._lock = threading.Lock()
        self._sessions: dict[str, ort.InferenceSession] = {}

    def run(self, index: int, expert: str, inputs: Mapping[str, Array]) -> Array:
        """The modulated input of `expert` for a call that bin `index` is for; a probe takes what it needs of its inputs
        and of what runs ahead of the bin.

        Raises ScheduleError when the bundle has no probe for `expert`, BundleError when it does not load.
        """
        session = self._session(expert)
        wanted = [one.name for one in session.get_inputs()]

        def run(chosen: int, feeds: dict[str, Array]) -> Array:
            binding = bind(session, self._ahead.feeds(chosen, wanted, feeds))
            binding.bind_output(session.get_outputs()[0].name)
            session.run_with_iobinding(binding)
            result: Array = binding.copy_outputs_to_cpu()[0]
            return result

        return run_batched(self._signature, inputs, [index] * batch_of(self._signature, inputs), run)

    def close(self) -> None:
        with self._lock:
            self._sessions.clear()
        self._ahead.close()

    def _session(self, expert: str) -> ort.InferenceSession:
        graph = (self._policy or CachePolicy(threshold=0.0)).probe(expert).graph
        with self._lock:
            if graph not in self._sessions:
                (family,) = families.alone([self._root / graph])
                self._sessions[graph] = self._make(family)
            return self._sessions[graph]
