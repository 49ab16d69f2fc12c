"""What a bundle's graphs hand to each other: checked when the bundle is opened, so that no step fails for it later."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from safetensors import SafetensorError, safe_open

from vdq_export.errors import BundleError
from vdq_export.manifest import SCHEDULE, Manifest
from vdq_export.schedule import Hoisted, Schedule

Values = dict[str, str]  # name -> type and shape in words
# numpy's names for the types of safetensors files.
_TYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32",
          "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}  # fmt: skip


@dataclass(frozen=True)
class Interface:
    """Inputs that have to be fed, and outputs, of one graph."""

    inputs: Values
    outputs: Values


def interface(model: onnx.ModelProto) -> Interface:
    """Of a model whose weights need not be loaded."""
    defaults = {tensor.name for tensor in model.graph.initializer}
    return Interface(
        {value.name: _described(value) for value in model.graph.input if value.name not in defaults},
        {value.name: _described(value) for value in model.graph.output},
    )


def check(root: Path, manifest: Manifest, schedule: Schedule, graphs: Mapping[str, Interface]) -> None:
    """Everything that bins, probes and the parts that run ahead of them take is an input of the model or given by
    exactly one part, in the same type and shape. graphs: by bundle path.

    Raises BundleError that names what is missing or given twice.
    """
    for path in schedule.graphs:
        if path not in graphs:
            raise BundleError(f"{root / SCHEDULE}: {path!r} is no .onnx file")
    given = {index: Values() for index in range(len(schedule.bins))}
    for hoisted in schedule.hoisted:
        given |= dict.fromkeys(hoisted.bins, _given(root, manifest, hoisted, graphs))
    for index, one in enumerate(schedule.bins):
        _check_inputs(root, manifest, one.graph, graphs[one.graph], given[index])
    for probe in schedule.reuse.probes if schedule.reuse else ():
        of_expert = [given[i] for i, one in enumerate(schedule.bins) if probe.expert in ("", one.when.expert)]
        for values in of_expert:
            _check_inputs(root, manifest, probe.graph, graphs[probe.graph], values)


def _given(root: Path, manifest: Manifest, hoisted: Hoisted, graphs: Mapping[str, Interface]) -> Values:
    """All that the parts give, checked on the way."""
    model = {one.name for one in manifest.signature.inputs}
    timestep = manifest.signature.timestep
    makers: dict[str, str] = {}
    given = Values()
    for path, taken in ((hoisted.prompt, model - {timestep}), (hoisted.step, {timestep})):
        if path:
            _check_inputs(root, manifest, path, graphs[path], {}, taken)
            _add(root, makers, given, path, graphs[path].outputs)
    if hoisted.tables:
        tables = _tables(root, manifest, hoisted, graphs[hoisted.step].outputs if hoisted.step else None)
        _add(root, makers, given, hoisted.tables, {} if hoisted.step else tables)
    if hoisted.mixed:
        _check_inputs(root, manifest, hoisted.mixed, graphs[hoisted.mixed], given)
        _add(root, makers, given, hoisted.mixed, graphs[hoisted.mixed].outputs)
    for name in given.keys() & model:
        raise BundleError(f"{root / makers[name]}: {name} is an input of the model already")
    return given


def _add(root: Path, makers: dict[str, str], given: Values, path: str, values: Mapping[str, str]) -> None:
    for name, kind in values.items():
        if name in makers:
            raise BundleError(f"{root / path}: {name} comes from {makers[name]} too", hint="one part gives each value")
        makers[name], given[name] = path, kind


def _check_inputs(
    root: Path, manifest: Manifest, path: str, graph: Interface, given: Mapping[str, str], taken: set[str] | None = None
) -> None:
    """taken: those of the model's inputs that this graph may have; None: all."""
    model = {one.name: f"{one.dtype}[{','.join(map(str, one.shape))}]" for one in manifest.signature.inputs}
    for name, kind in graph.inputs.items():
        if name in model and taken is not None and name not in taken:
            raise BundleError(f"{root / path}: it takes {name}, which this part must not depend on")
        known = model.get(name, given.get(name))
        if known is None:
            raise BundleError(
                f"{root / path}: nothing gives its input {name}", hint="no input of the model, and of no part"
            )
        if known != kind:
            raise BundleError(f"{root / path}: it takes {name} as {kind}, and is given {known}")


def _tables(root: Path, manifest: Manifest, hoisted: Hoisted, step: Values | None) -> Values:
    """The values in the tables; step: what the step graph gives, which they have to hold."""
    file = root / hoisted.tables
    if manifest.file(hoisted.tables) is None:
        raise BundleError(f"{root / SCHEDULE}: {hoisted.tables!r} is not in the bundle")
    if not hoisted.timesteps or any(high <= low for high, low in pairwise(hoisted.timesteps)):
        raise BundleError(f"{root / SCHEDULE}: the timesteps of {hoisted.tables!r} do not fall from row to row")
    found = Values()
    for name, kind, (rows, *shape) in _tensors(file):
        if rows != len(hoisted.timesteps):
            raise BundleError(f"{file}: {name} has {rows} rows for {len(hoisted.timesteps)} timesteps")
        found[name] = f"{kind}[{','.join(map(str, shape))}]"
    if step is not None and found != step:
        differ = sorted(name for name in found.keys() | step.keys() if found.get(name) != step.get(name))
        raise BundleError(f"{file}: {differ[0]} is not as {hoisted.step} gives it")
    return found


def _tensors(file: Path) -> Iterator[tuple[str, str, list[int]]]:
    """(name, type, shape) of each tensor of a safetensors file."""
    try:
        with safe_open(file, framework="numpy") as opened:
            for name in opened.keys():  # noqa: SIM118  (it is no dict)
                tensor = opened.get_slice(name)
                yield name, _TYPES.get(tensor.get_dtype(), tensor.get_dtype()), tensor.get_shape() or [0]
    except SafetensorError as error:
        raise BundleError(f"{file}: no tables: {error}") from error


def _described(value: onnx.ValueInfoProto) -> str:
    kind = value.type.tensor_type
    if not kind.elem_type:
        return "no tensor"
    dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)).name
    return f"{dtype}[{','.join(dim.dim_param or str(dim.dim_value) for dim in kind.shape.dim)}]"
