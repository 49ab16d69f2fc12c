"""Score the float model: `python -m vdq_export.samples.digits.evaluate [--cases 200] [--guidance 3]`.

Prints the judge's scores on evaluation cases 0 … N-1, of prompts in turn and noise the training never saw, and the
hardware and minutes it took.
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import torch

from vdq_export.samples.digits import NAMES, load
from vdq_export.samples.digits.judge import DigitsJudge
from vdq_export.samples.digits.sampler import DigitsSampler


def evaluate(module: torch.nn.Module, cases: int, guidance: float, batch: int) -> dict[str, float]:
    """{measure: fraction right} of `module` over evaluation cases 0 … cases-1 at a guidance scale."""
    numbers = range(cases)
    clips = DigitsSampler(guidance=guidance).generate_many(module, numbers, batch)
    return DigitsJudge()(clips, numbers)


def main() -> None:
    default = DigitsSampler().guidance
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--guidance", type=float, nargs="+", default=[default], help=f"scales (default {default:g})")
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--name", default="digits", choices=NAMES)
    parser.add_argument(
        "--weights", type=Path, default=None, help="another checkpoint (safetensors; of digits-moe a folder of two)"
    )
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    module = load(arguments.name, arguments.weights).module
    print(f"# {arguments.name}, {arguments.cases} cases, {torch.get_num_threads()} CPU threads ({platform.machine()}, "
          f"{torch.backends.cpu.get_cpu_capability()}), torch {torch.__version__}")  # fmt: skip
    for guidance in arguments.guidance:
        begun = time.monotonic()
        scores = evaluate(module, arguments.cases, guidance, arguments.batch)
        text = " ".join(f"{measure} {score:.3f}" for measure, score in scores.items())
        print(f"guidance {guidance:g}: {text} minutes {(time.monotonic() - begun) / 60:.1f}", flush=True)


if __name__ == "__main__":
    main()
