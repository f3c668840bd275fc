"""Where the time of an epoch of `ganvas train` goes: what is a kernel of the networks, and what is not.

    python benchmarks/epoch.py classifier --data mnist --root PATH
    python benchmarks/epoch.py gan --data mnist --root PATH --images 6400

Functions are replaced by ones that time themselves, the outermost of them wins. The first epoch is left out, since
first calls measure and allocate; evaluation is a forward pass over the test images and stands on its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ganvas.data import BatchLoader, InMemoryDataset, load
from ganvas.losses import DiscriminatorLoss
from ganvas.training import ClassifierConfig, GANConfig, classifier, gan, run
from ganvas.training.averages import Averages
from ganvas.training.gan_steps import AveragedGenerator
from ganvas.training.run import TrainingRun
from ganvas.training.run_folder import RunFolder

JOBS: dict[str, tuple[Any, Any, int | None]] = {  # config, recipe, side of the images in pixels
    "classifier": (ClassifierConfig, classifier.train_classifier, None),
    "gan": (GANConfig, gan.train_gan, 32),
}
OPTIMIZERS = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
KERNELS = {
    "forward": [(nn.Module, "__call__"), (DiscriminatorLoss, "with_metrics"), (F, "cross_entropy")],
    "backward": [(torch.Tensor, "backward"), (torch.autograd, "grad")],
    "optimiser": [(optimizer, "step") for optimizer in OPTIMIZERS],
}
OTHERS = {
    "evaluation": [(classifier, "evaluate_classifier"), (gan._Evaluation, "of_epoch")],
    "zero_grad": [(torch.optim.Optimizer, "zero_grad")],
    "schedule": [(torch.optim.lr_scheduler.OneCycleLR, "step")],
    "moving average": [(AveragedGenerator, "update_parameters")],
    "log": [(Averages, "add"), (TrainingRun, "_close_window"), (classifier, "_accuracy")],
    "checkpoints": [(TrainingRun, "_save"), (RunFolder, "save_weights")],
    "report page": [(run, "write_report")],
    "checks for NaN": [(run, "check_finite")],
}
BATCHES = "batches"


class Stopwatch:
    """Seconds by part, of whatever part was entered first."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._running = False

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        if self._running:
            yield
            return
        self._running, begin = True, time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - begin
            self._running = False

    def function(self, part: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Any:
            if self._running:
                return function(*args, **options)
            with self(part):
                return function(*args, **options)

        return timed

    def iterator(self, part: str, function: Callable) -> Callable:
        @functools.wraps(function)
        def timed(*args: Any, **options: Any) -> Iterator:
            items = function(*args, **options)
            while True:
                with self(part):
                    item = next(items, None)
                if item is None:
                    return
                yield item

        return timed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("job", choices=["classifier", "gan"])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--root", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--flip", action="store_true", help="mirror training images at random")
    parser.add_argument("--images", type=int, default=12800, help="training images of an epoch, at most")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    watch = Stopwatch()
    for part, functions in (KERNELS | OTHERS).items():
        for owner, name in functions:
            setattr(owner, name, watch.function(part, getattr(owner, name)))
    BatchLoader._batches = watch.iterator(BATCHES, BatchLoader._batches)  # type: ignore[method-assign]

    started: list[float] = []
    run_batches = TrainingRun.batches

    def batches(self: TrainingRun) -> Iterator:
        if self.epoch == 1:
            watch.seconds.clear()
            started.append(time.perf_counter())
        return run_batches(self)

    def end_epoch(self: TrainingRun, *args: Any, timed: Callable = TrainingRun.end_epoch) -> None:
        timed(self, *args)
        if self.epoch == 2:
            report(watch.seconds, time.perf_counter() - started[0])
            raise SystemExit

    TrainingRun.batches, TrainingRun.end_epoch = batches, end_epoch  # type: ignore[method-assign, assignment]
    config_type, train, size = JOBS[arguments.job]
    sets = [load(arguments.data, root=arguments.root, split=split, size=size) for split in ("train", "test")]
    given = {name: value for name in ("model", "flip") if (value := getattr(arguments, name))}
    with tempfile.TemporaryDirectory() as folder:
        config = config_type(
            data=arguments.data, root=arguments.root, out=Path(folder) / "run", epochs=3, threads=arguments.threads,
            **given,
        )  # fmt: skip
        train(config, train_data=first(sets[0], arguments.images), test_data=first(sets[1], arguments.images // 6))


def first(dataset: Any, count: int) -> InMemoryDataset:
    return dataclasses.replace(dataset, images=dataset.images[:count], labels=dataset.labels[:count])


def report(seconds: Counter[str], total: float) -> None:
    kernels = sum(seconds[part] for part in KERNELS)
    training = total - seconds["evaluation"]
    print(f"\n{training:.1f} s and {seconds['evaluation']:.1f} s of evaluation\n")
    print("| part | seconds | share |\n|---|---|---|")
    parts = {part: seconds[part] for part in (*KERNELS, BATCHES, *OTHERS) if part != "evaluation" and seconds[part]}
    parts["rest of the loop"] = total - sum(seconds.values())
    parts["**not a kernel**"] = training - kernels
    for part, value in parts.items():
        print(f"| {part} | {value:.3f} | {value / training:.2%} |")


if __name__ == "__main__":
    main()
