"""Commands that must refuse: each a process of its own, exit code 2, one line, nothing written.

One process loads the libraries and forks for each case, so that none waits for them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.commands import ENVIRONMENT

# what makes the model's place; arguments, "model/…" being within it; words that the line must have
Case = tuple[Callable[[Path], object], Sequence[str], Sequence[str]]
Answer = tuple[int, str, str]  # exit code, stdout, stderr
_FORKS = """
import json, os, sys, torch, diffusers.models.transformers
from diffusers import WanTransformer3DModel
import vdq_export.compiler, vdq_export.commands.export
from vdq_export.cli import main
for number, arguments in enumerate(json.load(sys.stdin)):
    child = os.fork()
    if child == 0:
        for fd, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_CREAT | os.O_WRONLY), fd)
        sys.argv = ["vdq-export", *arguments]
        try:
            main()
        except SystemExit as stop:  # the libraries' own ends are not made for forks
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(stop.code)
        os._exit(70)
    open(f"{number}.code", "w").write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""


def ask(root: Path, cases: Mapping[str, Case], model: str = "model") -> dict[str, Answer]:
    """Every case's answer, run in the folder above its own. model: what the MODEL argument is called there.

    An option "MODEL=…" names another model, "COMMAND=…" another command than the export.
    """
    arguments = []
    for number, (make, options, _) in enumerate(cases.values()):
        home = root / str(number)
        home.mkdir()
        make(home / model)
        named = dict(one.split("=", 1) for one in options if one.startswith(("MODEL=", "COMMAND=")))
        own = [f"{number}/{x}" if x.startswith("model/") else x for x in options if x.split("=")[0] not in named]
        command = [named["COMMAND"]] if "COMMAND" in named else []
        arguments.append([*command, named.get("MODEL", f"{number}/{model}"), *own, "--out", f"{number}/bundle", "-q"])
    forks = [sys.executable, "-c", _FORKS]
    subprocess.run(forks, input=json.dumps(arguments), text=True, cwd=root, env=ENVIRONMENT, check=True, timeout=200)
    assert not list(root.glob("*/bundle*"))  # nothing is written, not even half
    read = [
        [(root / f"{number}.{part}").read_text() for part in ("code", "out", "err")] for number in range(len(cases))
    ]
    return {case: (int(code), out, err) for case, (code, out, err) in zip(cases, read, strict=True)}
