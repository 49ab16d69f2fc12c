"""Compiles launches in a process of its own: one JSON line in, one out. Started by aot.py.

A process, because Triton compiles on one core, its compiler may crash, and the caller may run Triton's interpreter.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from triton import knobs

from vdq_export.targets.cuda.aot_launch import Launch, preload, stand_in


def compiled(launch: Launch) -> dict[str, Any]:
    """The entry of Triton's cache for a launch: key, name, bytes of shared memory, files; and the seconds it took."""
    began = time.monotonic()
    with TemporaryDirectory() as folder, knobs.cache.scope(), stand_in(launch.arch):
        # Without the paths of this machine in the binary. As an environment variable it would change the key.
        knobs.propagate_env = False
        knobs.compilation.disable_line_info = True
        knobs.cache.dir = folder
        kernel = preload(launch)
        places = {name: Path(place) for name, place in kernel.metadata_group.items()}
        files = {name: place.read_bytes() for name, place in places.items() if place.suffix in (".json", ".cubin")}
        described = next(name for name in files if name.endswith(".json"))
        key = places[described].parent.name
        files[described] = _portable(files[described])
    texts = {name: base64.b64encode(data).decode() for name, data in files.items()}
    seconds = time.monotonic() - began
    return {"key": key, "name": described, "shared": kernel.metadata.shared, "seconds": seconds, "files": texts}


def _portable(metadata: bytes) -> bytes:
    data: Mapping[str, Any] = json.loads(metadata)
    # The device library is linked in already; its path is this machine's.
    return json.dumps({**data, "extern_libs": []}, sort_keys=True).encode()


def main() -> None:
    """Until the input ends."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # Triton prints what ptxas refuses; the answers stay clean
    for line in sys.stdin:
        try:
            answer = compiled(Launch(**json.loads(line)))
        except Exception as error:  # whatever it is, the next launch may compile
            answer = {"error": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
