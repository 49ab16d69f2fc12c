"""Compiles kernels without a GPU, in a process whose Triton does not interpret: PTX, registers, spills.

python -m tests.cuda_compile [--arch sm_90] [CASE …]        a table of the cases of tests/cuda_kernel_cases.py
"""

from __future__ import annotations

import argparse
import io
import re
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests.cuda_kernel_cases import CASES, Case
from tests.triton_process import TritonProcess, serve
from vdq_export.targets.cuda.kernels._config import SHARED


@dataclass(frozen=True)
class Compiled:
    """One compiled launch. spilled: bytes of registers stored to and loaded from local memory; shared: bytes.

    serialized: why ptxas waits after each asynchronous product, "" where it does not.
    """

    kernel: str
    ptx: str
    registers: int
    spilled: int
    serialized: str
    shared: int
    seconds: float


def wrong(case: Case, kernels: Sequence[Compiled], arch: str = "sm_90") -> list[str]:
    """What a case's kernels are not as they were written to be."""
    found = [] if kernels else ["nothing was launched"]
    found += [f"no {form}" for form in case.forms if not any(re.search(form, one.ptx) for one in kernels)]
    for one in kernels:
        if any(re.search(form, one.ptx) for form in case.forms):  # one that lays memory out anew may
            found += [f"{one.kernel} has {form}" for form in case.never if re.search(form, one.ptx)]
        if one.serialized:
            found.append(f"{one.kernel} waits after each product: {one.serialized}")
        if one.spilled:
            found.append(f"{one.kernel} spills {one.spilled} bytes")
        if one.shared > SHARED[arch]:
            found.append(f"{one.kernel} takes {one.shared} bytes of shared memory")
    return found


class Compiler(TritonProcess):
    """A context manager: one process that compiles case after case."""

    def __init__(self) -> None:
        super().__init__("tests.cuda_compile")

    def compiled(self, case: str, arch: str = "sm_90") -> list[Compiled]:
        """The kernels that a case launches. Raises RuntimeError with the compiler's words."""
        return [Compiled(**one) for one in self.ask(case, arch)]


def compile_case(case: str, arch: str) -> list[dict[str, Any]]:
    """In this process, which must not interpret."""
    from tests.cuda_faults import FAULTS, PACKAGE
    from vdq_export.targets.cuda import aot_launch

    if case in FAULTS:
        launches = aot_launch.record(FAULTS[case].program, arch, PACKAGE)
    else:
        launches = aot_launch.record(CASES[case].program, arch)
    return [asdict(_compile(launch)) for launch in launches]


def _compile(launch: Any) -> Compiled:
    from triton import knobs

    from vdq_export.targets.cuda.aot_launch import stand_in

    began, output = time.monotonic(), io.StringIO()
    module, _, name = launch.kernel.partition(":")
    function = getattr(import_module(module), name)
    with TemporaryDirectory() as folder, knobs.cache.scope(), knobs.nvidia.scope(), stand_in(launch.arch):
        knobs.cache.dir = folder
        knobs.nvidia.dump_ptxas_log = True
        with redirect_stdout(output):
            kernel = function.preload(launch.specialization)
    log = output.getvalue()
    return Compiled(
        kernel=launch.name,
        ptx=kernel.asm["ptx"],
        registers=_number(r"Used (\d+) registers", log),
        spilled=_number(r"(\d+) bytes spill stores", log) + _number(r"(\d+) bytes spill loads", log),
        serialized=" ".join(re.findall(r"Potential Performance Loss: (wgmma.*? serialized.*)", log)),
        shared=kernel.metadata.shared,
        seconds=time.monotonic() - began,
    )


def _number(pattern: str, log: str) -> int:
    found = re.search(pattern, log)
    if found is None:
        raise RuntimeError(f"ptxas -v said nothing like {pattern!r}: {log!r}")
    return int(found[1])


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.cuda_compile")
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--ptx", help="write the PTX of each kernel below this folder")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    arguments = parser.parse_args()
    if arguments.serve:
        serve(compile_case)
        return
    print(f"{'case':26} {'kernel':30} {'registers':>9} {'spilled':>7} {'shared':>7} {'seconds':>7}  tensor cores")
    with Compiler() as compiler:
        for case in arguments.cases:
            try:
                for one in compiler.compiled(case, arguments.arch):
                    print(_line(case, one), flush=True)
                    if arguments.ptx:
                        _write(
                            one, Path(arguments.ptx) / f"{case.replace(' ', '_')}.{one.kernel.partition(':')[0]}.ptx"
                        )
            except RuntimeError as error:
                print(f"{case:26} {error}")


def _line(case: str, one: Compiled) -> str:
    forms = re.findall(r"(?:wgmma\.mma_async|tcgen05\.mma|mma\.sync)[\w.:]*", one.ptx)
    numbers = f"{one.registers:9} {one.spilled:7} {one.shared:7} {one.seconds:7.1f}"
    slow = "  serialized" if one.serialized else ""
    return f"{case:26} {one.kernel:30} {numbers}  {' '.join(sorted(set(forms)))}{slow}"


def _write(one: Compiled, place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(one.ptx, encoding="utf-8")


if __name__ == "__main__":
    main()
