"""Runs bins: each on its family's session and with its own constants, the next family loaded before it is needed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import onnxruntime as ort

from vdq_export.plan import Branch, Precision
from vdq_export.runtime.ahead import Ahead, bind
from vdq_export.runtime.families import Array, Family
from vdq_export.runtime.session import SessionPool
from vdq_export.schedule import Schedule


@dataclass
class Statistics:
    """What running cost beside the graphs: `loads` of sessions, `switches` from bin to bin, `stall_…` waits at them.

    Of all `steps` (docs/schedule.md), so many ran in low and in high precision, and so many did not run at all.
    average_bits: of activations over the steps that ran; None before the first, or when the bundle does not say.
    …_runs: of the graphs that run ahead of the bins', table_hits: calls whose timestep had its row (docs/hoisting.md).
    """

    calls: int = 0
    steps: int = 0
    low_steps: int = 0
    high_steps: int = 0
    reused_steps: int = 0
    average_bits: float | None = None
    loads: int = 0
    switches: int = 0
    stall_seconds: float = 0.0
    longest_stall: float = 0.0
    first_load_seconds: float = 0.0
    prompt_runs: int = 0
    step_runs: int = 0
    mixed_runs: int = 0
    table_hits: int = 0


class Engine:
    """The sessions of a bundle's families, and of what runs ahead of them. Thread-safe; close() it."""

    device = "cpu"
    keeps_all = False  # sessions that are neither used nor foreseen are dropped

    def __init__(
        self,
        families: Sequence[Family],
        schedule: Schedule,
        make: Callable[[Family], ort.InferenceSession],
        ahead: Ahead,
        *,
        prefetch: bool = True,
    ) -> None:
        self._families = list(families)
        self._family_of = {index: number for number, family in enumerate(families) for index in family.bins}
        # Values made once: a run hands over pointers, however many constants a bin brings.
        self._constants = {
            index: {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in values.items()}
            for family in families
            for index, values in family.constants.items()
        }
        self._taken: dict[int, tuple[str, ...]] = {}  # by each bin's graph, of inputs and what runs ahead
        self._schedule = schedule
        self._ahead = ahead
        self._prefetch = prefetch
        self._pool = SessionPool(lambda number: make(self._families[number]))
        self._lock = threading.Lock()
        self._current: dict[Branch, int] = {}
        self._statistics = Statistics()

    def run(self, index: int, branch: Branch, inputs: Mapping[str, Array], output: str) -> Array:
        """The value `output` of bin `index` for the model's inputs, contiguous; its graph may take some of them only.

        branch: of the call, to foresee what comes next. Raises BundleError when a graph does not load and after
        close(), ScheduleError for a timestep that the bundle has nothing for.
        """
        session, constants = self._session(index, branch), self._constants[index]
        if index not in self._taken:
            self._taken[index] = tuple(one.name for one in session.get_inputs() if one.name not in constants)
        binding = bind(session, self._ahead.feeds(index, self._taken[index], inputs))
        for name, constant in constants.items():
            binding.bind_ortvalue_input(name, constant)
        binding.bind_output(output)
        session.run_with_iobinding(binding)
        result: Array = binding.copy_outputs_to_cpu()[0]
        return result

    def count_call(self) -> None:
        with self._lock:
            self._statistics.calls += 1

    def count_step(self, precision: Precision | None) -> None:
        """precision: None for a step that reused the output of the one before."""
        with self._lock:
            counts = self._statistics
            counts.steps += 1
            counts.low_steps += precision == "low"
            counts.high_steps += precision == "high"
            counts.reused_steps += precision is None

    @property
    def statistics(self) -> Statistics:
        """A copy of the counts so far."""
        with self._lock:
            counted = {"loads": self._pool.loads, "average_bits": self._average_bits(), **vars(self._ahead.counts)}
            return replace(self._statistics, **counted)

    def _average_bits(self) -> float | None:
        counts, bits = self._statistics, self._schedule.bits
        ran = counts.steps - counts.reused_steps
        plain = ran - counts.low_steps - counts.high_steps
        shares: list[tuple[Precision, int]] = [("low", counts.low_steps), ("high", counts.high_steps), ("", plain)]
        if not ran or any(count and precision not in bits for precision, count in shares):
            return None
        return sum(bits[precision] * count for precision, count in shares if count) / ran

    @property
    def loaded(self) -> list[int]:
        """Bins whose sessions are in memory or on their way, ascending."""
        return sorted(index for number in self._pool.loaded for index in self._families[number].bins)

    def close(self) -> None:
        """Free sessions and threads; idempotent."""
        self._pool.close()
        self._ahead.close()

    @property
    def one_timestep(self) -> frozenset[int]:
        """Bins that take a single timestep in each run."""
        return self._ahead.one_timestep

    def _session(self, index: int, branch: Branch) -> ort.InferenceSession:
        with self._lock:
            before = self._current.get(branch)
            self._current[branch] = index
            wanted = {self._family_of[one] for one in self._current.values()}
            foreseen = [self._schedule.upcoming(one, kind) for kind, one in self._current.items() if self._prefetch]
        session, waited = self._pool.get(self._family_of[index])
        if before != index:
            with self._lock:
                self._count(before, waited)
            coming = {self._family_of[one] for following in foreseen for one in following}
            if not self.keeps_all:
                self._pool.keep(wanted | coming)
            for number in coming:
                self._pool.prefetch(number)
        return session

    def _count(self, before: int | None, waited: float) -> None:
        if before is None:
            self._statistics.first_load_seconds += waited
            return
        self._statistics.switches += 1
        self._statistics.stall_seconds += waited
        self._statistics.longest_stall = max(self._statistics.longest_stall, waited)
