"""What test_cuda_aot.py does in a process whose Triton does not interpret: a step in a folder.

"On the device": a stand-in for an H100's driver is active, launches end where the driver would be called, and Triton's
compiler raises when it is reached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tests.cuda_kernel_cases import CASES
from tests.triton_process import serve
from vdq_export.bundle import Bundle
from vdq_export.manifest import FileEntry, Manifest, ModelIdentity, Signature

CASE = "normalize"  # compiles in a second


def seal(folder: Path) -> None:
    """Write a manifest of what lies in the folder now."""
    files = sorted(place for place in folder.rglob("*") if place.is_file() and place.name != "manifest.json")
    entries = tuple(
        FileEntry(
            path=place.relative_to(folder).as_posix(),
            size=place.stat().st_size,
            sha256=hashlib.sha256(place.read_bytes()).hexdigest(),
        )
        for place in files
    )
    signature = Signature(inputs=(), outputs=(), timestep="t")
    identity = ModelIdentity(name="a model", weight_hash="0")
    manifest = Manifest(model=identity, target="cuda", isa="sm_90", signature=signature, files=entries)
    (folder / "manifest.json").write_bytes(manifest.to_json())


def make(folder: Path) -> object:
    """A bundle with the kernels of the case for sm_90."""
    from vdq_export.targets.cuda import aot

    said: list[str] = []
    launches = aot.record_all(CASES[CASE].program, ["sm_90"], said.append)
    for path, data in aot.compile_all(launches, jobs=1, say=said.append):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)
    seal(folder)
    return {"launches": len(launches), "said": said}


def record_again(folder: Path) -> object:
    """How many launches are written down before Triton has compiled them, and after."""
    from triton import knobs

    from vdq_export.targets.cuda.aot_launch import preload, record, stand_in

    launches = record(CASES[CASE].program, "sm_90")
    with knobs.cache.scope(), stand_in("sm_90"):
        knobs.cache.dir = str(folder)
        for one in launches:
            preload(one)
    return [len(launches), len(record(CASES[CASE].program, "sm_90"))]


def record_block(folder: Path) -> object:
    """The kernels of a quantized block for sm_90, by meta tensors; and whether real tensors launch the same."""
    from tests.cuda_blocks import INT8, Block
    from vdq_export.targets.cuda import aot, fuse
    from vdq_export.targets.cuda.lower import lower

    graph, _ = Block(INT8, smooth=True, rank=4, attention="q k v").merged()
    fuse.run(graph)
    model = graph.to_proto()
    by_meta = aot.launches_of(model, archs=["sm_90"])
    program = lower(model)
    feeds = {one.name: torch.zeros(one.shape, dtype=one.dtype) for one in program.inputs}
    return {
        "kernels": sorted({one.name.partition(":")[0] for one in by_meta}),
        "same": by_meta == aot.record_all(lambda: program(feeds), ["sm_90"]),
    }


def install(folder: Path) -> object:
    """On the device: how many kernels Triton took."""
    return _on_the_device(folder)


def install_elsewhere(folder: Path) -> object:
    """On another device."""
    return _on_the_device(folder, arch="sm_120")


def install_other_source(folder: Path) -> object:
    """On the device, with a kernel whose source is not the one that was compiled."""
    from vdq_export.targets.cuda.kernels import _rows

    kernel: Any = _rows.row_kernel
    kernel._unsafe_update_src(kernel.src.replace("tl.program_id(0)", "(tl.program_id(0) + 0)"))
    return _on_the_device(folder)


def run(folder: Path) -> object:
    """On the device: the kernels are installed and the case runs."""
    return _on_the_device(folder, runs=True)


def run_bare(folder: Path) -> object:
    """On the device: the case runs without what the bundle brings."""
    return _on_the_device(folder, runs=True, installs=False)


def _on_the_device(folder: Path, arch: str = "sm_90", *, installs: bool = True, runs: bool = False) -> object:
    from vdq_export.errors import VdqError
    from vdq_export.targets.cuda import aot, aot_launch
    from vdq_export.targets.cuda.kernels import _backend, _config

    said: list[str] = []
    manifest = Manifest.from_json((folder / "manifest.json").read_bytes(), "manifest.json")
    bundle = Bundle(folder, manifest, None, ())  # type: ignore[arg-type]
    _backend.recording.set(True)
    with aot_launch.stand_in(arch), _config.assume(arch), _no_device() as launched:
        try:
            taken = aot.install(bundle, said.append) if installs else 0
            if runs:
                CASES[CASE].program()
        except (VdqError, AssertionError) as error:
            return {"error": str(error)}
    return {"taken": taken, "launched": launched, "said": said}


@contextmanager
def _no_device() -> Iterator[list[object]]:
    """Launches are listed, with whether their arguments are in the kernel's order; the compiler is not reached."""
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.compiler.compiler import CompiledKernel

    launched: list[object] = []

    def refuse(*_: object) -> None:
        raise AssertionError("Triton compiles")

    def run(kernel: Any) -> Any:
        ordered = list(kernel.src.signature) == list(kernel.src.fn.arg_names)
        return lambda *_: launched.append([kernel.name, ordered])

    CUDABackend.add_stages = refuse
    CompiledKernel.launch_metadata = lambda *_: None
    CompiledKernel.run = property(run)
    yield launched


def _step(name: str, folder: str) -> object:
    steps = (make, record_again, record_block, install, install_elsewhere, install_other_source, run, run_bare)
    return {one.__name__: one for one in steps}[name](Path(folder))


if __name__ == "__main__":
    serve(_step)
