"""Trains a classifier by the recipe fast, as ganvas and as plain torch, and prints the wall time and what it reaches.

    python benchmarks/time_to_accuracy.py --data mnist --root PATH --runs 5
    python benchmarks/time_to_accuracy.py --data folder --root PATH --runs 3 --target 0.85

Each run is a process of its own, in turns, with its own seed; its time is from the process's start to its end: imports,
loading and decoding the data, training, measurement, run folder. Same loop, same first weights, same batches for both:
only the layers differ (`ganvas.revert` makes the network plain torch). What happens only once, the files' first reading
and the kernels' first calls on these shapes, is left to a run of a few steps whose time is printed apart. With --target
a run is measured after every epoch and stops once the target is reached. Without --bf16 or --no-bf16 both sides take
what suits the processor.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

import ganvas
from ganvas.data import load
from ganvas.training import ClassifierConfig, SilentProgress, recipe_config, train_classifier
from ganvas.training.metrics_log import read_metrics

CANDIDATES = ("ganvas", "plain")
WARM_UP_STEPS = 3


class Result(NamedTuple):
    """One run: seconds from start to end, those of them before the training, epochs, last accuracy on the test set."""

    seconds: float
    set_up: float
    epochs: int
    accuracy: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--epochs", type=int, help="the recipe's if not given")
    parser.add_argument("--target", type=float, help="stop at this share of the test images")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--candidate", choices=[*CANDIDATES, "both"], default="both")
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, help="both sides in bfloat16, or neither")
    arguments = parser.parse_args()
    candidates = CANDIDATES if arguments.candidate == "both" else (arguments.candidate,)
    given = {"root": arguments.root, "threads": arguments.threads, "bf16": arguments.bf16}
    if arguments.epochs is not None:
        given["epochs"] = arguments.epochs
    if arguments.target is not None:
        given |= {"target_accuracy": arguments.target, "evaluate_every": 1}
    print(f"{arguments.data}, {arguments.threads} threads, torch {torch.__version__}")
    for candidate in candidates:
        print(f"warm-up of {candidate}: {measure(candidate, arguments.data, given, steps=WARM_UP_STEPS).seconds:.1f} s")
    results: dict[str, list[Result]] = {candidate: [] for candidate in candidates}
    for seed in range(arguments.runs):
        for candidate in candidates:
            result = measure(candidate, arguments.data, {**given, "seed": seed})
            results[candidate].append(result)
            print(f"{candidate}, seed {seed}: {result.accuracy:.4f}, {result.epochs} epochs, {result.seconds:.1f} s")
    report(results, arguments.target)


def measure(candidate: str, data: str, given: dict[str, Any], steps: int | None = None) -> Result:
    """One run in a new process; with ``steps``, an epoch of so many."""
    begin = time.time()
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        started, epochs, accuracy = pool.submit(run, candidate, data, given, steps).result()
    return Result(time.time() - begin, started - begin, epochs, accuracy)


def run(candidate: str, data: str, given: dict[str, Any], steps: int | None) -> tuple[float, int, float]:
    """(clock at which training began, epochs, accuracy)."""
    train, test = (load(data, root=given["root"], split=split) for split in ("train", "test"))
    with tempfile.TemporaryDirectory() as folder:
        config = recipe_config("fast", data=data, out=Path(folder) / "run", **given)
        if steps is not None:
            config = dataclasses.replace(config, epochs=1)
            count = min(steps * config.batch_size, len(train))
            train = dataclasses.replace(train, images=train.images[:count], labels=train.labels[:count])
        model = build(config, candidate, train)
        started = time.time()
        train_classifier(config, train_data=train, test_data=test, model=model, progress=SilentProgress())
        last = read_metrics(config.out / "metrics.jsonl")[-1]
    return started, last["epoch"], last["test/accuracy"]


def build(config: ClassifierConfig, candidate: str, train: Any) -> torch.nn.Module:
    options = {"num_classes": len(train.class_names), "channels": train.channels, "size": train.size}
    torch.manual_seed(config.seed)
    model = ganvas.models.create(config.model, **options, width=config.width)
    if candidate == "plain":
        ganvas.revert(model)
    return model


def report(results: dict[str, list[Result]], target: float | None) -> None:
    print("\n| candidate | runs | seconds | of these set-up | epochs | test accuracy | target reached |")
    print("|---|---|---|---|---|---|---|")
    for candidate, runs in results.items():
        seconds, set_up, epochs, accuracies = (list(column) for column in zip(*runs))
        reached = "–" if target is None else f"{sum(accuracy >= target for accuracy in accuracies)} of {len(runs)}"
        cells = [spread(seconds, 1), spread(set_up, 1), spread(epochs, 1), spread([100 * a for a in accuracies], 2)]
        print(f"| {candidate} | {len(runs)} | {' | '.join(cells)} % | {reached} |")
    if len(results) == len(CANDIDATES):
        ratios = sorted(plain.seconds / ours.seconds for ours, plain in zip(*(results[name] for name in CANDIDATES)))
        print(f"\nplain torch takes {statistics.median(ratios):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) times as long")


def spread(values: list[float], digits: int) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.{digits}f} ± {deviation:.{digits}f}"


if __name__ == "__main__":
    main()
