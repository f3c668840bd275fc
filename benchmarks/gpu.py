"""Everything there is to measure on one NVIDIA GPU, within minutes: tables, and a JSON file that is kept up to date.

    python benchmarks/gpu.py --json gpu.json
    python benchmarks/gpu.py --only layers --minutes 20

    machine   bandwidth of a copy, peak of a bfloat16 product, versions
    kernels   BatchNorm + LeakyReLU and GAN losses on arrays of 256 MiB, in parts of that bandwidth
    layers    convolution, BatchNorm, LeakyReLU: forward and training step, beside torch and the floors
    chains    four such layers
    models    training steps of whole models: images per second, peak memory
    choices   what ran: backends, measured choices, kernels

Candidates take turns; a time is the median of their turns by the GPU's events. `eager graph` is plain torch in a CUDA
graph; the better of torch.compile's two modes counts. Each part has a share of the minutes, and the whole an end. What
does not fit is listed, and so is what fails or gives a wrong result, which is not timed. A first round goes without
torch.compile, a second one with it as far as the time goes; what it has compiled lies in torch's cache and takes the
next run less time.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from on_gpu import plan, tables
from on_gpu.cases import Executor, Row, Stage, Worker, run
from on_gpu.device import Gpu
from on_gpu.report import Report

_LAST_SECONDS = 3.0  # for ending the process, and the tables


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the numbers, written anew after each row")
    parser.add_argument(
        "--minutes", type=float, default=7.75, help="at the end of which it ends (default: %(default)s)"
    )
    parser.add_argument("--only", choices=plan.SECTIONS, help="one section, and machine, in the same time")
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes must be positive; got {options.minutes:g}")
    if options.json and not options.json.absolute().parent.is_dir():
        parser.error(f"--json must lie in a folder that exists; got {options.json}")
    if not torch.cuda.is_available():
        print(f"benchmarks/gpu.py measures an NVIDIA GPU; torch {torch.__version__} finds none", file=sys.stderr)
        return 2
    log = options.json.with_suffix(".log") if options.json else Path(tempfile.gettempdir()) / "ganvas_benchmark_gpu.log"
    log.unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    worker = Worker(Gpu, log)
    try:
        measure(plan.stages(plan.Sizes(), options.only), worker, options.minutes, options.json)
    finally:
        worker.close()
        print(f"\nwhat torch and the kernels printed is in {log}")
    return 0


def measure(stages: Sequence[Stage], execute: Executor, minutes: float, path: Path | None) -> Report:
    """Run the stages, say what is done, and print the tables at the end, also at one that comes early."""
    report = Report(path, minutes, plan.SECTIONS)

    def add(section: str, name: str, row: Row) -> None:
        report.add(section, name, row)
        print(f"{report.seconds():5.0f} s  {section}, {name}: {row['status']}", file=sys.stderr, flush=True)

    try:
        run(stages, execute, max(0.0, 60 * minutes - _LAST_SECONDS), add)
        report.complete = True
    finally:
        report.write()
        print("\n".join(tables.lines(report)))
    return report


if __name__ == "__main__":
    sys.exit(main())
