"""Clips made with a bundle's own graphs, some layers of them in float."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np
import onnxruntime

from vdq_export import ort
from vdq_export.bisect.candidates import Candidate, Place
from vdq_export.bisect.float_layers import put_back
from vdq_export.bundle import Bundle
from vdq_export.graph import Graph
from vdq_export.metrics import bounded, psnr_db
from vdq_export.model import Model
from vdq_export.progress import Advance
from vdq_export.runtime import families
from vdq_export.runtime.ahead import Ahead
from vdq_export.runtime.engine import Engine
from vdq_export.runtime.families import Family
from vdq_export.runtime.probes import Probes
from vdq_export.runtime.providers import Backend
from vdq_export.runtime.session import SessionFactory
from vdq_export.runtime.transformer import Transformer

SESSIONS, KEPT_BYTES = 24, 4 << 30  # kept, while they fit: runs that follow each other differ in few bins


class Trials:
    """Clips made with some layers in float, against those of the float model. Counts its runs; close() it.

    Mean PSNR (dB) of the clips 0 … count − 1: those that `verify --clips` compares.
    """

    def __init__(self, bundle: Bundle, model: Model, found: Sequence[Candidate], count: int, advance: Advance) -> None:
        self._bundle, self._model = bundle, model
        self._linears = {one.place: one.linear for one in found}
        self._sessions: OrderedDict[tuple[int, frozenset[str]], onnxruntime.InferenceSession] = OrderedDict()
        self._families = families.alone([bundle.graph_path(index) for index in range(len(bundle.schedule.bins))])
        self._ahead = Ahead(bundle)
        self._exact = []
        for case in range(count):
            self._exact.append(self._model.clip(model.module, case))
            advance(case + 1, count)
        self.runs = 0

    def __call__(self, places: Iterable[Place]) -> float:
        """dB with `places` in float."""
        chosen: dict[int, set[str]] = {}
        for place in places:
            chosen.setdefault(place.bin, set()).add(place.layer)

        def session(family: Family) -> onnxruntime.InferenceSession:
            (index,) = family.bins
            return self._session(index, frozenset(chosen.get(index, ())))

        self.runs += 1
        schedule, bundle = self._bundle.schedule, self._bundle
        engine = Engine(self._families, schedule, session, self._ahead, prefetch=False)
        probes = Probes(
            bundle.path, schedule.reuse, bundle.manifest.signature, SessionFactory(Backend(), {}, None), self._ahead
        )
        with Transformer(bundle, schedule, engine, probes) as transformer:
            made = [self._model.clip(transformer, case) for case in range(len(self._exact))]
        found = [bounded(psnr_db(a, b)) for a, b in zip(self._exact, made, strict=True)]
        return float(np.mean(found))

    def _session(self, index: int, layers: frozenset[str]) -> onnxruntime.InferenceSession:
        key = index, layers
        if key not in self._sessions:
            graph = Graph.load(self._bundle.graph_path(index))
            put_back(graph, [self._linears[Place(name, index)] for name in sorted(layers)])
            self._sessions[key] = ort.session(graph, options=self._bundle.manifest.session)
            while len(self._sessions) > min(SESSIONS, max(1, KEPT_BYTES // self._bundle.size)):
                self._sessions.popitem(last=False)
        self._sessions.move_to_end(key)
        return self._sessions[key]

    def close(self) -> None:
        self._sessions.clear()
        self._ahead.close()
