"""Values of constants that are computed, or supplied, when somebody reads them, and not kept.

Smoothing, rotation and quantization change every weight of a model. As promises over the mapped checkpoint the changes
take no memory; a reader has one weight at a time. Once the values are in a file, the promise is settled: it is that
file's pages from then on. Two constants that hold the same promise hold the same values.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from math import prod
from typing import Any, Protocol, runtime_checkable

import numpy as np
import onnx_graphsurgeon as gs  # noqa: TID251  (its constants hold these)

from vdq_export.errors import ModelError, PassError

Array = np.ndarray[Any, Any]
Lazy: Any = gs.ir.tensor.LazyValues  # what graphsurgeon reads on first use, and then keeps


class Promise(gs.ir.tensor.LazyValues):  # type: ignore[misc]  # untyped there
    """change(values) of `shape` and `dtype`, by default those of values, computed when it is read.

    identity: a hash that promises of equal values alone have in common, where what they are made of has one.
    """

    def __init__(
        self,
        values: Any,
        change: Callable[[Array], Array],
        shape: Sequence[int] | None = None,
        dtype: Any = None,
        origin: bytes | None = None,
    ) -> None:
        self.shape = tuple(values.shape if shape is None else shape)
        self.dtype = np.dtype(values.dtype if dtype is None else dtype)
        self.nbytes = prod(self.shape) * self.dtype.itemsize
        self._values, self._change = values, change
        self._kept: Callable[[], Array] | None = None
        known = origin or (values.identity if isinstance(values, Promise) else None)
        name = _PLAIN.get(change)
        self.identity: bytes | None = None
        if known is not None and name is not None:
            what = f"{name}|{self.shape}|{self.dtype.name}|".encode()
            self.identity = hashlib.sha256(what + known).digest()

    def load(self) -> Array:
        made_of = self._values  # before it is asked: another thread's settle() sets _kept first
        if self._kept is not None:
            return self._kept()
        values = read(made_of)
        changed = self._change(values).astype(self.dtype, copy=False)
        release(values)
        return changed

    def settle(self, kept: Callable[[], Array]) -> None:
        """The values are what `kept` returns from now on; what they were made of is let go."""
        self._kept, self._values = kept, None

    @property
    def is_settled(self) -> bool:
        return self._kept is not None

    @property
    def is_unbound(self) -> bool:
        """Whether bind() has still to supply what the values are made of."""
        return unbound(self._values)

    def bound(self, tensors: Mapping[str, Array]) -> Promise:
        """The same promise over bound values; itself where there is nothing to bind."""
        values = bound(self._values, tensors)
        return self if values is self._values else Promise(values, self._change, self.shape, self.dtype)


# Changes that are known by name: what they make of equal values is equal.
_PLAIN: Mapping[Any, str] = {np.asarray: "as it is", np.transpose: "transposed"}


class Unbound(gs.ir.tensor.LazyValues):  # type: ignore[misc]  # untyped there
    """Values of parameter `path`, which only bind() supplies."""

    def __init__(self, path: str, shape: Sequence[int], dtype: Any) -> None:
        self.path, self.shape, self.dtype = path, tuple(shape), np.dtype(dtype)
        self.nbytes = prod(self.shape) * self.dtype.itemsize

    def load(self) -> Array:
        raise PassError(f"the graph was traced without weights and {self.path} is needed", hint="bind() them first")


@runtime_checkable
class Identified(Protocol):
    """Tensors whose bytes have been hashed."""

    def identity(self, name: str) -> bytes: ...


class Arrays(MutableMapping[str, Array]):
    """Constants by name, computed at each access where they are promises. `held` has the promises themselves."""

    def __init__(self, held: Mapping[str, Any]) -> None:
        self.held = dict(held)

    def __getitem__(self, name: str) -> Array:
        return read(self.held[name])

    def __setitem__(self, name: str, values: Any) -> None:
        self.held[name] = values

    def __delitem__(self, name: str) -> None:
        del self.held[name]

    def __contains__(self, name: object) -> bool:  # MutableMapping's own would compute the values
        return name in self.held

    def __iter__(self) -> Iterator[str]:
        return iter(self.held)

    def __len__(self) -> int:
        return len(self.held)


class Values(Sequence[Array]):
    """What several constants hold, computed at each access where they are promises."""

    def __init__(self, held: Iterable[Any]) -> None:
        self._held = list(held)

    def __getitem__(self, index: Any) -> Any:
        return read(self._held[index])

    def __len__(self) -> int:
        return len(self._held)


def read(held: Any) -> Array:
    """The values of what a constant holds."""
    values: Array = held.load() if isinstance(held, Lazy) else held
    return values


def ahead(held: Iterable[Any], threads: int = 1) -> Iterator[Array]:
    """read() of each, in order, the next `threads` ones while the caller works on what it has."""
    with ThreadPoolExecutor(threads) as pool:
        waiting: list[Future[Array]] = []
        for one in held:
            waiting.append(pool.submit(read, one))
            if len(waiting) > threads:
                yield waiting.pop(0).result()
        while waiting:
            yield waiting.pop(0).result()


def unbound(values: Any) -> bool:
    return isinstance(values, Unbound) or (isinstance(values, Promise) and values.is_unbound)


def bound(values: Any, tensors: Mapping[str, Array]) -> Any:
    """What a constant holds, with its weight supplied. Raises ModelError for one that is missing or does not fit."""
    if isinstance(values, Promise):
        return values.bound(tensors)
    if not isinstance(values, Unbound):
        return values
    if values.path not in tensors:
        raise ModelError(f"no weight {values.path}", hint="the checkpoint is incomplete or of another model")
    array, origin = tensors[values.path], None
    if isinstance(tensors, Identified):
        origin = tensors.identity(values.path)
    if tuple(array.shape) != values.shape:
        raise ModelError(
            f"weight {values.path} is {tuple(array.shape)}, the model wants {values.shape}",
            hint="config and checkpoint do not belong together",
        )
    if array.dtype == values.dtype and origin is None:
        return array
    return Promise(array, np.asarray, dtype=values.dtype, origin=origin)


def release(array: Array) -> None:
    """Give the pages of an array mapped read-only back; reading it maps them again. Other arrays are left alone.

    For readers that go through all weights one by one: mapped pages stay resident until somebody needs the memory.
    """
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    read_only = not array.flags.writeable  # a private copy-on-write mapping would lose what was written to it
    if read_only and isinstance(base, mmap.mmap) and hasattr(base, "madvise"):  # Windows has no madvise
        base.madvise(mmap.MADV_DONTNEED)
