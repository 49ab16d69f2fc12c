"""A bundle that stands where a diffusers pipeline has its transformer.

Needs onnxruntime and numpy; torch is imported only by who passes torch tensors.
"""

from __future__ import annotations

import threading
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vdq_export.bundle import Bundle
from vdq_export.errors import BundleError, ScheduleError
from vdq_export.fixed_arguments import same
from vdq_export.plan import Branch, Precision
from vdq_export.runtime.batching import Array, batch_of, primary, run_batched, timesteps
from vdq_export.runtime.engine import Engine, Statistics
from vdq_export.runtime.probes import Probes
from vdq_export.runtime.steps import Clip
from vdq_export.schedule import Schedule

if TYPE_CHECKING:
    import torch


class Output(NamedTuple):
    """What a call returns where the module did not return a tensor; `sample` is the predicted one."""

    sample: Any


class Config(dict[str, Any]):
    """The transformer's configuration, read by key or by attribute."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the bundle's model has no setting {name!r}") from None


class Transformer:
    """Callable like the module the bundle was made from: tensors by name, or in the order of its forward(); tensor out.

    Torch tensors give a torch tensor of the first input's dtype and device, numpy arrays a numpy array. Each sample
    runs on the graph of its timestep and of the guidance branch named by cache_context(). Thread-safe; close() it.
    A policy that looks at the steps before takes each thread's calls for one clip after another; see reset().
    Arguments that the export fixed may be passed, and must be what they were (model.config.fixed of the manifest).
    """

    def __init__(self, bundle: Bundle, schedule: Schedule, engine: Engine, probes: Probes) -> None:
        self.bundle = bundle
        self.schedule = schedule
        about = bundle.manifest.model.config
        self.config = Config({**_part(about, "settings"), **about})
        self._fixed, self._repeats = _part(about, "fixed"), _part(about, "repeats")
        self._outputs = [(str(one["name"]), tuple(one["shape"])) for one in about.get("outputs") or ()]
        self._seen_fixed: dict[str, Any] = {}
        self._signature = bundle.manifest.signature
        self._engine = engine
        self._probes = probes
        self._local = threading.local()

    def __call__(self, *values: Any, return_dict: bool | None = None, **named: Any) -> Any:
        """One step of the network. Inputs that the graphs do not have must be None or {}, as diffusers passes them.

        Answers as the module did: a tensor, or an Output. return_dict: True for an Output, False for a tuple.
        Raises BundleError for missing, unknown or misshapen inputs, ScheduleError when no graph is meant for the call.
        """
        inputs = self._named(values, named)
        like = inputs[primary(self._signature).name]
        arrays = {info.name: _to_numpy(inputs[info.name], info.dtype) for info in self._signature.inputs}
        batch, name = batch_of(self._signature, arrays), self._signature.timestep
        arrays[name], per_sample = timesteps(self._signature, arrays[name], batch)
        made = self._step(arrays, per_sample)
        self._engine.count_call()
        if not self._outputs:
            return self._answer(_like(made, like), return_dict)
        several = {name: _like(one, like) for name, one in _split(made, self._outputs).items()}
        return namedtuple("Outputs", several)(**several) if return_dict is not False else tuple(several.values())

    forward = __call__

    def _answer(self, made: Any, return_dict: bool | None) -> Any:
        if return_dict is None and self._signature.returns == "tensor":
            return made
        return (made,) if return_dict is False else Output(made)

    def __getattr__(self, name: str) -> Any:
        """A part of the network without weights, which a pipeline may ask for: LTX-2's does for its positions."""
        config = self.__dict__.get("config", {})
        if name.startswith("_") or "class" not in config:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        from vdq_export.runtime import skeleton

        return skeleton.part(config["class"], _part(config, "settings"), name)

    def reset(self) -> None:
        """Begin a new clip on the calling thread.

        A timestep above the last one does so by itself. Needed after a clip that was given up, when the next one begins
        at its last timestep or below.
        """
        self._clip.reset()

    @contextmanager
    def cache_context(self, name: str, **_: Any) -> Iterator[None]:
        """Calls inside are of guidance branch `name`, "cond" or "uncond" (guiders say "pred_cond"); any other
        name means a graph for both.

        Pipelines also say where their loop is (step_index, sigma): the timestep itself decides here.
        """
        before, name = getattr(self._local, "branch", "any"), name.removeprefix("pred_")
        self._local.branch = name if name in ("cond", "uncond") else "any"
        try:
            yield
        finally:
            self._local.branch = before

    @property
    def statistics(self) -> Statistics:
        """A copy of the counts so far."""
        return self._engine.statistics

    @property
    def loaded(self) -> list[int]:
        """Bins whose graphs are in memory or on their way."""
        return self._engine.loaded

    @property
    def dtype(self) -> torch.dtype:
        """Of the latents, as pipelines ask for it."""
        import torch

        found = getattr(torch, primary(self._signature).dtype)
        assert isinstance(found, torch.dtype)
        return found

    @property
    def device(self) -> torch.device:
        """Where the graphs run."""
        import torch

        return torch.device(self._engine.device)

    def to(self, *_where: Any, **_how: Any) -> Transformer:
        """Does nothing: the graphs are compiled for one place and precision."""
        return self

    def eval(self) -> Transformer:
        """Nothing to do: graphs know no training."""
        return self

    def close(self) -> None:
        """Free graphs and threads; calls raise BundleError afterwards. Idempotent."""
        self._engine.close()
        self._probes.close()

    def __enter__(self) -> Transformer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def _clip(self) -> Clip:
        if not hasattr(self._local, "clip"):
            self._local.clip = Clip(self.schedule, self._engine.count_step)
        clip: Clip = self._local.clip
        return clip

    def _step(self, arrays: dict[str, Array], per_sample: list[float]) -> Array:
        """The output for checked inputs; per_sample: t of each."""
        branch: Branch = getattr(self._local, "branch", "any")
        if not self.schedule.stateless and len(set(per_sample)) > 1:
            raise ScheduleError(
                "samples of one call are at different timesteps, and the policy follows the steps of a clip",
                hint='call with one timestep, or load with policy="static:high" or "static:low"',
            )

        def modulated() -> tuple[str, Array]:
            some = self.schedule.policy.precisions[0]
            index = self.schedule.select(per_sample[0], branch, precision=some)
            expert = self.schedule.bins[index].when.expert
            return expert, self._probes.run(index, expert, arrays)

        clip, kind = self._clip, (branch, arrays[primary(self._signature).name].shape)
        call = clip.begin(max(per_sample), kind, modulated)
        result = call.output if call.output is not None else self._run(arrays, per_sample, branch, call.precision)
        clip.finish(kind, call, result)
        return result

    def _run(self, arrays: dict[str, Array], per_sample: list[float], branch: Branch, precision: Precision) -> Array:
        every = dict.fromkeys(per_sample)
        chosen = {t: self.schedule.select(t, branch, precision=precision) for t in every}

        def run(index: int, feeds: dict[str, Array]) -> Array:
            return self._engine.run(index, branch, feeds, self._signature.outputs[0].name)

        bins, apart = [chosen[t] for t in per_sample], self._engine.one_timestep
        return run_batched(self._signature, arrays, bins, run, one_timestep=apart)

    def _named(self, values: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
        names = [info.name for info in self._signature.inputs]
        order = self._signature.positional or tuple(names)
        if len(values) > len(order):
            raise BundleError(f"called with {len(values)} inputs, the module takes {', '.join(order)}")
        placed = dict(zip(order, values, strict=False))
        if twice := sorted(placed.keys() & named.keys()):
            raise BundleError(f"input {twice[0]!r} was given twice")
        inputs, repeated = dict[str, Any](), dict[str, Any]()
        for name, value in {**placed, **named}.items():
            if name in names:
                inputs[name] = value
            elif name in self._fixed:
                self._check_fixed(name, value)
            elif name in self._repeats:
                repeated[name] = value
            elif value is not None and not (isinstance(value, Mapping) and not value):
                raise BundleError(f"the graphs have no input {name!r}", hint=f"they take {', '.join(names)}")
        missing = [name for name in names if inputs.get(name) is None]
        if missing:
            raise BundleError(f"input {missing[0]!r} is missing", hint=f"the graphs take {', '.join(names)}")
        for name, value in repeated.items():
            own = inputs[self._repeats[name]]
            if value is not None and not np.array_equal(_to_numpy(value, "float64"), _to_numpy(own, "float64")):
                raise BundleError(f"{name} differs from {self._repeats[name]}", hint="the graphs know one of them")
        return inputs

    def _check_fixed(self, name: str, value: Any) -> None:
        """An argument that the export fixed, as sizes and rotary tables, is what it was. The last one is remembered."""
        known = self._seen_fixed.get(name)
        if value is not None and value is not known and not same(value, self._fixed[name]):
            raise BundleError(
                f"{name} is not what the graphs were made with",
                hint="call at the frames, height and width of the export, or export again",
            )
        self._seen_fixed[name] = value


def _split(packed: Array, outputs: Sequence[tuple[str, tuple[int, ...]]]) -> dict[str, Array]:
    """The outputs that lie one after the other in a row of each sample, [B, elements]; shapes: with B = 1."""
    ends = np.cumsum([int(np.prod(shape[1:])) for _, shape in outputs])
    parts = np.split(packed, ends[:-1], axis=1)
    return {name: part.reshape(-1, *shape[1:]) for (name, shape), part in zip(outputs, parts, strict=True)}


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The mapping `name` within a model's configuration, which may hold anything; else an empty one."""
    found = config.get(name)
    return found if isinstance(found, Mapping) else {}


def _to_numpy(value: Any, dtype: str) -> Array:
    if hasattr(value, "detach"):
        tensor = value.detach().cpu()
        if str(tensor.dtype) == "torch.bfloat16":  # numpy has no such type
            tensor = tensor.float()
        value = tensor.numpy()
    return np.asarray(value, dtype=dtype)


def _like(result: Array, like: Any) -> Any:
    if not hasattr(like, "detach"):
        return result
    import torch

    tensor = torch.from_numpy(result)
    return tensor.to(like.device, like.dtype) if like.is_floating_point() else tensor.to(like.device)
