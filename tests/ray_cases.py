"""`python -m tests.ray_cases FOLDER`: one export on processes of this machine, FOLDER/local, and one on a Ray cluster
of two machines, FOLDER/ray, of which a process dies in calibration, another in solving, and then a whole machine.

A JSON line says which of them died, how many machines are left, and the seconds of both.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from tests import tiny_model
from vdq_export.calib import group, observe
from vdq_export.calib.group import GroupResult, GroupTask, solve_group
from vdq_export.calib.observe import Job, run_elsewhere
from vdq_export.calib.statistics import Seen

MEMORY = 80 * 2**20  # of a machine's object store: Ray's least is 75 MiB
FOLDER = "VDQ_RAY_CASES"  # variable of the environment: where the dead leave their marks
PATIENCE = 60.0  # seconds


def main(folder: Path) -> None:
    os.environ[FOLDER] = str(folder)
    import ray
    from ray.cluster_utils import Cluster

    from vdq_export import export
    from vdq_export.trace import trace
    from vdq_export.work.engine import load

    model = tiny_model.build()
    graph = trace(model)
    group.LIGHT = 0
    settings: dict[str, Any] = {"tsw": 2, "recipe": "svdquant-gptq"}
    began = time.monotonic()
    export(model, traced={"": graph.copy()}, out=folder / "local", workers=1, **settings)
    local = time.monotonic() - began
    machine = {"num_cpus": 1, "object_store_memory": MEMORY, "include_dashboard": False}
    fast = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 3}
    cluster = Cluster(initialize_head=True, head_node_args={**machine, "_system_config": fast})
    try:
        cluster.add_node(**machine)
        ray.init(address=cluster.address, log_to_driver=False)
        (folder / "head").write_text(ray.get_runtime_context().get_node_id())
        group.solve_group, observe.run_elsewhere = solve_or_die, run_or_die
        began = time.monotonic()
        with load("ray"):  # the cluster this process is in
            export(model, traced={"": graph.copy()}, out=folder / "ray", engine="ray", **settings)
        marks = sorted(one.name for one in folder.glob("died-*"))
        alive = sum(node["Alive"] for node in ray.nodes())
        print(json.dumps({"died": marks, "alive": alive, "local": local, "ray": time.monotonic() - began}))
    finally:
        ray.shutdown()
        cluster.shutdown()


def run_or_die(job: Job, task: Any) -> Seen:
    """The calibration run of a trajectory; the process that gets the second one first dies of it."""
    if task[0] == 1:
        _die("calibration", os.getpid())
    return run_elsewhere(job, task)


def solve_or_die(task: GroupTask) -> GroupResult:
    """A group of layers; a process dies of the first, then the second machine dies of whatever it gets."""
    import ray

    folder = Path(os.environ[FOLDER])
    is_head = ray.get_runtime_context().get_node_id() == (folder / "head").read_text()
    if is_head:
        _die("solving", os.getpid())
        deadline = time.monotonic() + PATIENCE  # nothing more is done until the other machine has had its turn
        while not (folder / "died-machine").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
    else:
        _die("machine", os.getppid())
    return solve_group(task)


def _die(what: str, process: int) -> None:
    """Kill the process and this one, once."""
    try:
        (Path(os.environ[FOLDER]) / f"died-{what}").touch(exist_ok=False)
    except FileExistsError:
        return
    for one in (process, os.getpid()):
        os.kill(one, signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
