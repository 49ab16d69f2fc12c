"""`python -m benchmarks.fidelity`: measure what is missing, then write the tables to benchmarks/results/fidelity-*.

Stop it whenever you like; the next run goes on. Work is split by sample and seed over --jobs processes of one thread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed

from benchmarks.fidelity.rows import TABLES
from benchmarks.fidelity.run import Plan, run_group

SAMPLES = ("digits", "digits-hard", "digits-moe")
SEEDS = 3  # fewer, or not all samples: the tables go to build/


def parse() -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [table.name for table in TABLES]
    made.add_argument("--only", action="append", choices=names, help="this table; may be repeated (default: all)")
    made.add_argument("--sample", action="append", choices=SAMPLES, help="may be repeated (default: all)")
    made.add_argument("--seeds", type=int, default=SEEDS, help="calibration sets and sets of cases (default 3)")
    made.add_argument("--clips", type=int, default=4, help="clips a row and seed compared one by one (default 4)")
    made.add_argument("--judged", type=int, default=24, help="clips the judge sees of a headline row (default 24)")
    made.add_argument("--calibration", type=int, default=8, help="cases to calibrate on (default 8)")
    made.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    made.add_argument("--fresh", action="store_true", help="measure again what was measured before")
    made.add_argument("--report", action="store_true", help="measure nothing, write the tables of what there is")
    made.add_argument("--small", action="store_true", help="does it run at all? Results go to build/")
    return made.parse_args()


def main() -> None:
    arguments = parse()
    if arguments.small:
        arguments.seeds, arguments.clips, arguments.judged, arguments.calibration = 1, 1, 1, 2
    plan = Plan(
        tables=tuple(arguments.only or [table.name for table in TABLES]),
        clips=arguments.clips,
        judged=max(arguments.clips, arguments.judged),
        calibration=arguments.calibration,
        fresh=arguments.fresh,
        small=arguments.small,
        partial=bool(arguments.small or arguments.sample or arguments.seeds < SEEDS),
    )
    samples = [f"sample:{name}" for name in arguments.sample or SAMPLES]
    groups = [(sample, seed) for seed in range(arguments.seeds) for sample in samples]
    if not arguments.report:
        # Before the children start: their thread pools are made when they import.
        os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(max_workers=min(arguments.jobs, len(groups)), mp_context=context) as pool:
            running = {pool.submit(run_group, plan, *group): group for group in groups}
            for done in as_completed(running):
                print(f"{running[done][0]} seed {running[done][1]}: {done.result()}", file=sys.stderr)
    from benchmarks.fidelity.report import write_tables

    write_tables(plan, samples, arguments.seeds)


if __name__ == "__main__":
    main()
