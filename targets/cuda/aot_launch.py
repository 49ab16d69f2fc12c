"""What Triton compiles a kernel for, written down without compiling it, and handed back to Triton later.

record() runs a program (on meta tensors: nothing is computed, no memory is taken) with a stand-in for the device's
driver. Triton specializes every launch as it would there: types, alignment, constants, options. Before it compiles, it
calls a hook, and the hook ends the launch. What the hook is given, Triton's JSON for JITFunction.preload, is a Launch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from itertools import count
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

from vdq_export.errors import VdqError
from vdq_export.targets.cuda.kernels import _backend, _config

_NUMBERS = count(1000)  # of stand-ins; no real device has one of these
PACKAGE = "vdq_export.targets.cuda.kernels."


class AotError(VdqError):
    """A kernel cannot be compiled ahead of time, or what a bundle says about its kernels makes no sense."""


@dataclass(frozen=True, order=True)
class Launch:
    """kernel: "module:function" below PACKAGE; arch: "sm_90"; specialization: what JITFunction.preload takes."""

    kernel: str
    arch: str
    specialization: str

    @property
    def name(self) -> str:
        """For people: linear_int8:_kernel."""
        return self.kernel.removeprefix(PACKAGE)


def record(program: Callable[[], object], arch: str, package: str = PACKAGE) -> list[Launch]:
    """Every different launch of the package's kernels that `program` makes on this architecture, in order of name.

    Raises ConfigError where the architecture has no such kernel, AotError in Triton's interpreter.
    """
    if knobs.runtime.interpret:
        raise AotError("kernels of Triton's interpreter cannot be compiled", hint="unset TRITON_INTERPRET")
    found: set[Launch] = set()

    def hook(*, fn: Any, compile: dict[str, Any], **_: object) -> bool:
        kernel = f"{fn.module}:{fn.name}"
        if kernel.startswith(package):
            data = json.loads(compile["specialization_data"])
            data["options"].pop("extern_libs", None)  # a path of this machine; Triton fills in its own
            found.add(Launch(kernel, arch, json.dumps(data)))  # unsorted: the signature is in the order of arguments
        return True  # Triton neither compiles nor launches

    token = _backend.recording.set(True)
    try:
        with _config.assume(arch), stand_in(arch), knobs.runtime.scope():
            knobs.runtime.jit_cache_hook = hook
            program()
    finally:
        _backend.recording.reset(token)
    return sorted(found)


def preload(launch: Launch) -> Any:
    """Have Triton find or compile the launch for the active device, and keep it: Triton's CompiledKernel.

    Raises AotError for a kernel that this version does not have.
    """
    module, _, name = launch.kernel.partition(":")
    if not launch.kernel.startswith(PACKAGE) or not name.isidentifier():
        raise AotError(f"{launch.kernel!r} is no kernel of this package")
    try:
        function = getattr(import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise AotError(f"{launch.kernel} does not exist in this version") from error
    if not isinstance(function, triton.JITFunction):
        raise AotError(f"{launch.kernel} is no kernel, or this process interprets kernels")
    return function.preload(launch.specialization)


@contextmanager
def stand_in(arch: str) -> Iterator[None]:
    """Triton takes the current device for one of this architecture. Nothing can be launched within."""
    before = driver._active  # `active` would look for a GPU
    driver.set_active(_StandIn(int(arch.removeprefix("sm_"))))
    try:
        yield
    finally:
        driver._active = before


class _StandIn:
    """As much of a Triton driver as specializing and compiling ask for."""

    def __init__(self, capability: int) -> None:
        self._capability = capability
        # Triton remembers compiled kernels by the device's number, and launches them without calling the hook.
        self._number = next(_NUMBERS)

    def get_current_device(self) -> int:
        return self._number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)
