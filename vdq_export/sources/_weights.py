"""A diffusers transformer from its folder: config.json says what it is, mapped safetensors hold its weights.

The network is built without weights, which stay in their files; headers are compared with the config before any is
read. No pickles, no code from the folder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch

from vdq_export.errors import ModelError
from vdq_export.sources import _remote_code, families
from vdq_export.weights import learned, on_demand
from vdq_export.weights.checkpoint import Checkpoint, Stored, read_header
from vdq_export.weights.learned import Learned, is_learned

STEM = "diffusion_pytorch_model"
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


@dataclass(frozen=True)
class Network:
    """A transformer without weights and its weights. notes: what a person should know about how it was read.

    module: on the meta device; it loads the checkpoint when it is first called. fixed: arguments of every call.
    """

    module: torch.nn.Module
    class_name: str
    config: dict[str, Any]
    notes: tuple[str, ...]
    checkpoint: Checkpoint
    build: Callable[[], torch.nn.Module]
    learned: Learned | None = None
    fixed: dict[str, Any] = field(default_factory=dict)

    def make(self) -> torch.nn.Module:
        """The network once more, for tracing: its saved buffers are real, its parameters nobody's."""
        made = self.build()
        saved = {name: buffer for name, buffer in made.named_buffers() if name in self.checkpoint}
        for name, buffer in saved.items():
            buffer.copy_(torch.from_numpy(np.array(self.checkpoint[name], np.float64)))
        if self.fixed:
            made.forward = partial(made.forward, **self.fixed)
        return made

    def fix(self, arguments: Mapping[str, Any]) -> None:
        """Give the arguments that no step changes once, so that they become constants of the graph."""
        self.fixed.update(arguments)
        if arguments:
            self.module.forward = partial(self.module.forward, **arguments)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ModelError naming the file."""
    try:
        # the standard library's reader: diffusers writes -Infinity into some configurations
        return msgspec.convert(json.loads(path.read_text(encoding="utf-8")), dict[str, Any])
    except FileNotFoundError as error:
        raise ModelError(f"{path} is missing", hint="give the whole folder, as save_pretrained() writes it") from error
    except (ValueError, RecursionError, msgspec.ValidationError) as error:
        raise ModelError(f"{path} cannot be read: {error}", hint="restore the file it was saved as") from error


def read(folder: Path) -> Network:
    """The transformer in `folder`. Raises ModelError, naming the file, for whatever does not fit together."""
    config = read_json(folder / "config.json")
    kind = _class(config, folder / "config.json")
    files = _files(folder)  # before the network is built: a missing shard is known at once
    settings = {name: value for name, value in config.items() if not name.startswith("_")}
    expected = kind._get_init_keys(kind)
    unknown = sorted(settings.keys() - expected)
    notes = (
        [f"{folder / 'config.json'}: {kind.__name__} does not know {', '.join(unknown)}; ignored"] if unknown else []
    )
    build = partial(_build, kind, {k: v for k, v in settings.items() if k in expected})
    try:
        with _without_weights():
            module: torch.nn.Module = build()
    except Exception as error:  # what a class makes of settings that cannot be is its own affair
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ModelError(
            f"{folder / 'config.json'}: {kind.__name__} cannot be built from it: {why}", hint="restore the file"
        ) from error
    optional = getattr(kind, "_keys_to_ignore_on_load_unexpected", None) or ()
    scales = {name: file for name, file in files.items() if is_learned(name)}
    checkpoint, told = _checked(module, {n: f for n, f in files.items() if n not in scales}, folder, optional)
    found = _learned(scales, checkpoint, folder)
    if found is not None:
        told.append(f"{folder}: {len(found.layers)} layers have scales learned in training, which are used as they are")
    on_demand.on_demand(module, checkpoint, str(folder))
    return Network(module, kind.__name__, config, (*notes, *told), checkpoint, build, found)


def _learned(files: Mapping[str, Path], checkpoint: Checkpoint, folder: Path) -> Learned | None:
    """The scales in `files` ({tensor: its file}), beside the checkpoint's weights."""
    headers = {file: read_header(file) for file in set(files.values())}
    held = {name: headers[file][name] for name, file in files.items() if name in headers[file]}
    return learned.read(held, Checkpoint({**checkpoint.tensors, **held}), str(folder))


def _build(kind: Any, settings: Mapping[str, Any]) -> torch.nn.Module:
    """The network, its shapes independent of data."""
    network: torch.nn.Module = kind.from_config(dict(settings))
    family = families.find(kind.__name__)
    if family is not None and family.prepare is not None:
        family.prepare(network)
    return network


def _class(config: Mapping[str, Any], path: Path) -> Any:
    """The class a config names, of the installed diffusers."""
    import diffusers.models.transformers as transformers

    if "auto_map" in config:
        named = config["auto_map"]
        module, _, kind = str(next(iter(named.values()), "") if isinstance(named, dict) else named).rpartition(".")
        return _remote_code.load(path.parent, module, kind, path)
    if "quantization_config" in config:
        raise ModelError(f"{path} describes quantized weights", hint="give the original, unquantized model")
    name = config.get("_class_name")
    if (family := families.find(str(name))) is not None and family.network is not None:
        return family.network_class()
    known = sorted(n for n in dir(transformers) if n.endswith("Transformer3DModel"))
    if name not in known:
        near = get_close_matches(str(name), known, n=3, cutoff=0.5) or known
        raise ModelError(
            f"{path}: _class_name {name!r} is no video transformer of the installed diffusers",
            hint=f"*Transformer3DModel classes are taken: {', '.join(near)}",
        )
    return getattr(transformers, name)


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, from the index of the shards or the one file's header."""
    index = folder / f"{STEM}.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise ModelError(f"{index} has no weight_map", hint="restore the file it was saved as")
        if outside := sorted({name for name in weight_map.values() if Path(name).name != name}):
            raise ModelError(f"{index} names a file outside its folder: {outside[0]}", hint="restore the index")
        for shard in sorted(set(weight_map.values())):
            if not (folder / shard).is_file():
                raise ModelError(f"{folder / shard} is missing, a shard that {index.name} names", hint="fetch it again")
        return {name: folder / shard for name, shard in weight_map.items()}
    only = folder / f"{STEM}.safetensors"
    found = [only] if only.is_file() else sorted(folder.glob("*.safetensors"))
    if len(found) == 1:
        return dict.fromkeys(read_header(found[0]), found[0])
    if found:
        raise ModelError(
            f"{folder} has {len(found)} safetensors files and no {index.name}", hint=f"keep one, as {only.name}"
        )
    if pickles := sorted(p.name for pattern in _PICKLED for p in folder.glob(pattern)):
        raise ModelError(
            f"{folder}: {pickles[0]} is a pickled checkpoint, which can run code when it is loaded, and is refused",
            hint="convert the weights to .safetensors",
        )
    raise ModelError(f"{folder} has no weights: {only.name} is missing", hint="fetch it again")


def _checked(
    module: torch.nn.Module, files: Mapping[str, Path], folder: Path, optional: Any
) -> tuple[Checkpoint, list[str]]:
    """(every parameter and saved buffer of `module`, notes). Only headers are read."""
    wanted, aliases = module.state_dict(), _aliases(module)
    files = {name: file for name, file in files.items() if name in wanted or not _matches(name, optional)}
    # A parameter that several modules share is stored once, under any of its names.
    stored_as = {name: next((x for x in names if x in files), name) for names in aliases for name in names}
    if missing := sorted(name for name in wanted if stored_as.get(name, name) not in files):
        raise ModelError(
            f"{_source(folder)}: tensor {missing[0]} is missing{_others(missing)}",
            hint="the weights and config.json do not match",
        )
    if extra := sorted(files.keys() - wanted.keys()):
        raise ModelError(
            f"{files[extra[0]]}: tensor {extra[0]} is unexpected{_others(extra)}",
            hint="the weights and config.json do not match",
        )
    tensors, cast = dict[str, Stored](), dict[str, int]()
    for file in sorted(set(files.values())):
        held = read_header(file)
        for name in sorted(n for n, f in files.items() if f == file):
            if name not in held:
                raise ModelError(f"{file}: tensor {name} is missing", hint="the index and this shard do not match")
            _check(held[name], name, wanted[name])
            tensors[name] = held[name]
            if wanted[name].is_floating_point() and held[name].kind != "F32":
                kind = _FLOATS[held[name].kind]
                cast[kind] = cast.get(kind, 0) + 1
    notes = [
        f"{folder}: {count} tensors of {kind} are computed in float32, as every CPU kernel here does"
        for kind, count in sorted(cast.items())
    ]
    return Checkpoint(tensors, {name: as_ for name, as_ in stored_as.items() if name not in tensors}), notes


def _aliases(module: torch.nn.Module) -> list[list[str]]:
    """The names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [found for found in names.values() if len(found) > 1]


def _check(stored: Stored, name: str, wanted: torch.Tensor) -> None:
    """Raises ModelError for a tensor that is not what the network takes."""
    if stored.shape != tuple(wanted.shape):
        raise ModelError(
            f"{stored.file}: tensor {name} has shape {list(stored.shape)}, config.json says {list(wanted.shape)}",
            hint="the weights and config.json do not match",
        )
    if wanted.is_floating_point() and stored.kind not in _FLOATS:
        raise ModelError(
            f"{stored.file}: tensor {name} is of type {stored.kind}, where the model has floating-point weights",
            hint=f"save the unquantized weights as one of {', '.join(_FLOATS)}",
        )
    if not wanted.is_floating_point() and str(wanted.dtype) != f"torch.{stored.dtype.name}":
        raise ModelError(
            f"{stored.file}: tensor {name} is of type {stored.kind}, not {wanted.dtype}", hint="restore the file"
        )


@contextmanager
def _without_weights() -> Iterator[None]:
    """Parameters that modules make meanwhile have shapes and no memory; buffers (rotary tables) are real."""
    register = torch.nn.Module.register_parameter

    def shape_only(self: torch.nn.Module, name: str, param: torch.nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:  # one that is: shared with another module, and stays so
            param = torch.nn.Parameter(param.to("meta"), param.requires_grad)
        register(self, name, param)

    torch.nn.Module.register_parameter = shape_only  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]


def _source(folder: Path) -> Path:
    """The file that lists a folder's tensors."""
    index = folder / f"{STEM}.safetensors.index.json"
    return index if index.is_file() else next(iter(sorted(folder.glob("*.safetensors"))), folder)


def _matches(name: str, patterns: Any) -> bool:
    return any(re.search(pattern, name) for pattern in patterns)


def _others(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
